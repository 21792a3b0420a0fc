"""Tiny models with random weights of every family that the tests go through.

They differ in what matters to a quantizer: where the norms stand, whether their weight is w or
1 + w, which activation lies between two linears, whether queries, keys and values or gate and up
are one matrix, how many heads share a key, and how a block is called and what it returns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
HIDDEN = 32
HEADS = 4
KEY_VALUE_HEADS = 2
INNER = 48
LAYERS = 2
POSITIONS = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    # Nothing ends a generated text, so that its length is known.
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GATED = _COMMON | {"intermediate_size": INNER, "num_key_value_heads": KEY_VALUE_HEADS}
_OPT = _COMMON | {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN, "activation_function": "relu"}
_GPT = _COMMON | {"n_inner": INNER}
_LOCAL_AND_GLOBAL = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _build(name: str, config_name: str, options: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, config_name)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Norms start with ones and biases with zeros, and then many an error in folding
                # does not show.
                parameter.data += 0.3 * torch.randn_like(parameter)
            else:
                # `transformers` starts with 0.02, for which every token predicts about the same.
                parameter.data.normal_(0, 0.2)
    return model


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": partial(_build, "OPTForCausalLM", "OPTConfig", _OPT),
    # Norms after the residual sum, and embeddings of another size, as in OPT-350m.
    "opt-post-norm": partial(
        _build,
        "OPTForCausalLM",
        "OPTConfig",
        _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": HIDDEN // 2},
    ),
    "llama": partial(_build, "LlamaForCausalLM", "LlamaConfig", _GATED),
    "mistral": partial(
        _build, "MistralForCausalLM", "MistralConfig", _GATED | {"sliding_window": 8}
    ),
    "qwen2": partial(_build, "Qwen2ForCausalLM", "Qwen2Config", _GATED),
    # Heads wider than hidden_size / heads: the attention's output has 64 channels.
    "qwen3": partial(_build, "Qwen3ForCausalLM", "Qwen3Config", _GATED | {"head_dim": 16}),
    "gemma2": partial(
        _build,
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GATED | _LOCAL_AND_GLOBAL | {"head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "gemma3": partial(
        _build,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GATED
        | _LOCAL_AND_GLOBAL
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "num_key_value_heads": 1},
    ),
    "phi3": partial(_build, "Phi3ForCausalLM", "Phi3Config", _GATED),
    "gpt-neox": partial(
        _build, "GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON | {"intermediate_size": INNER}
    ),
    "gpt2": partial(_build, "GPT2LMHeadModel", "GPT2Config", _GPT),
    "phi": partial(_build, "PhiForCausalLM", "PhiConfig", _COMMON | {"intermediate_size": INNER}),
    "gptj": partial(_build, "GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 4}),
    "bloom": partial(_build, "BloomForCausalLM", "BloomConfig", _COMMON),
}


def token_ids(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 ``[rows, columns]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)

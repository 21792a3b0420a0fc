"""Tiny models with random weights of every family that the tests go through.

They differ in what matters to a quantizer: where the norms stand, whether their weight is w or
1 + w, which activation lies between two linears, whether queries, keys and values or gate and up
are one matrix, how many heads share a key, and how a block is called and what it returns. Mixtures
of experts differ in their routers, in how the experts' matrices are laid out, and in what stands
beside them.
"""

import inspect
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
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor_name.endswith("e_score_correction_bias"):
                # With zeros a router that forgets it does not show; with much, experts starve.
                tensor.data.normal_(0, 0.05)
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

# How many experts there are, and how many of them every token goes to.
EXPERTS = 4
SLOTS = 2

_FEW = {"num_local_experts": EXPERTS, "num_experts_per_tok": SLOTS}
_MANY = {"num_experts": EXPERTS, "num_experts_per_tok": SLOTS, "moe_intermediate_size": INNER // 2}
# Two groups of experts, of which every token chooses one first; a dense layer, then a sparse one.
_GROUPED = {
    "n_routed_experts": 2 * EXPERTS,
    "num_experts_per_tok": SLOTS,
    "moe_intermediate_size": INNER // 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 8,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": partial(_build, "MixtralForCausalLM", "MixtralConfig", _GATED | _FEW),
    # A dense layer, then experts beside one for all tokens, which has a gate of its own.
    "qwen2-moe": partial(
        _build,
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _GATED
        | _MANY
        | {
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe": partial(
        _build,
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _GATED | _MANY | {"decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 16},
    ),
    "olmoe": partial(
        _build,
        "OlmoeForCausalLM",
        "OlmoeConfig",
        _GATED | {"num_experts": EXPERTS, "num_experts_per_tok": SLOTS, "intermediate_size": 24},
    ),
    # LayerNorms with a bias, and a router that chooses one expert after the other.
    "phimoe": partial(_build, "PhimoeForCausalLM", "PhimoeConfig", _GATED | _FEW),
    "deepseek-v2": partial(
        _build,
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        _GATED
        | _GROUPED
        | _LATENT_ATTENTION
        | {"n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    ),
    # Sigmoid scores, and a bias that has a say in who is chosen, but not in the weights.
    "deepseek-v3": partial(
        _build,
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _GATED | _GROUPED | _LATENT_ATTENTION | {"n_shared_experts": 1},
    ),
    # Matrices [E, K, N] with biases, gate and up interleaved and cut off, a router with a bias.
    "gpt-oss": partial(
        _build,
        "GptOssForCausalLM",
        "GptOssConfig",
        _GATED
        | _FEW
        | _LOCAL_AND_GLOBAL
        | {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": POSITIONS // 4,
            },
        },
    ),
    "granite-moe": partial(_build, "GraniteMoeForCausalLM", "GraniteMoeConfig", _GATED | _FEW),
    # Experts and an MLP for all tokens side by side in the block.
    "granite-moe-shared": partial(
        _build,
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        _GATED | _FEW | {"shared_intermediate_size": 40},
    ),
    # A Mamba layer with a dense MLP, then attention with experts.
    "jamba": partial(
        _build,
        "JambaForCausalLM",
        "JambaConfig",
        _GATED
        | {
            "num_experts": EXPERTS,
            "num_experts_per_tok": SLOTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
        },
    ),
    # The bias of the router is a matrix [1, E].
    "ernie4_5-moe": partial(
        _build,
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        _GATED
        | {
            "moe_num_experts": EXPERTS,
            "moe_k": SLOTS,
            "moe_intermediate_size": INNER // 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    # The router is a module with a linear in it.
    "hunyuan-moe": partial(
        _build,
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        _GATED | {"num_experts": EXPERTS, "moe_topk": SLOTS, "head_dim": 8},
    ),
    "glm4-moe": partial(
        _build,
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _GATED | _GROUPED | {"n_shared_experts": 1, "n_group": 1},
    ),
    # Experts without a gate; a block is either experts or attention.
    "nemotron-h": partial(
        _build,
        "NemotronHForCausalLM",
        "NemotronHConfig",
        _GATED
        | {
            "layers_block_type": ["moe", "attention"],
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": SLOTS,
            "moe_intermediate_size": INNER // 2,
            "moe_shared_expert_intermediate_size": INNER // 2,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}

# What `exclude` must name besides the head, because haq does not know what to do with it.
EXCLUDE: dict[str, tuple[str, ...]] = {"jamba": ("*.A_log", "*.conv1d", "*.dt_proj")}


def with_cache(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """What a model is called with to read and fill a cache: transformers 5.24 renamed it."""
    named = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in named else "past_key_values": cache}


def token_ids(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 ``[rows, columns]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)

"""Tiny models that differ in what stands between the last block and the logits.

Those of `tests.architectures` have a norm and a linear, tied or not, with a bias or without, and
Gemma's cap on the logits. Here are factors before and after the head, heads with layers of their
own, heads of another name, and a norm without a weight.
"""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from tests.architectures import _COMMON, _GATED, HIDDEN, INNER, POSITIONS, _build

_BERT = _COMMON | {"intermediate_size": INNER, "is_decoder": True}

MORE_HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    # Logits times a factor, and tied.
    "cohere": partial(_build, "CohereForCausalLM", "CohereConfig", _GATED | {"logit_scale": 0.3}),
    # Logits divided.
    "granite": partial(
        _build,
        "GraniteForCausalLM",
        "GraniteConfig",
        _GATED | {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    ),
    # Hidden states divided before the head.
    "minicpm3": partial(
        _build,
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        _GATED
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "dim_model_base": HIDDEN // 4,
        },
    ),
    # A norm that has no weight.
    "olmo": partial(_build, "OlmoForCausalLM", "OlmoConfig", _GATED),
    # Its head is called `embed_out`, and tied.
    "gpt-neox-japanese": partial(
        _build, "GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", _COMMON
    ),
    # A linear, an activation and a norm belong to the head, and its bias is tied as well.
    "bert": partial(_build, "BertLMHeadModel", "BertConfig", _BERT),
    "roberta": partial(
        _build,
        "RobertaForCausalLM",
        "RobertaConfig",
        _BERT | {"max_position_embeddings": POSITIONS + 1},
    ),
}

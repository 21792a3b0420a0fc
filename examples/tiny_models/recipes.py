"""The two architectures, how each is trained, and the tokenizer that they share."""

from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 2048
MAX_POSITIONS = 512
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Recipe:
    """How one of the models is trained."""

    folder: str
    steps: int
    batch: int
    learning_rate: float
    bfloat16: bool


RECIPES = {
    "opt": Recipe("opt-python", steps=2100, batch=8, learning_rate=2e-3, bfloat16=True),
    # bfloat16 is no faster here: the experts' small grouped products gain nothing from it.
    "mixtral": Recipe("mixtral-python", steps=1000, batch=8, learning_rate=2e-3, bfloat16=False),
}


def build_opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        **SPECIAL_IDS,
    )
    return OPTForCausalLM(config)


def build_mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        # Without the balancing loss a few experts take all tokens and the others stay random.
        # It counts all layers together, so a single layer may still leave an expert out.
        router_aux_loss_coef=0.02,
        **SPECIAL_IDS,
    )
    return MixtralForCausalLM(config)


BUILDERS = {"opt": build_opt, "mixtral": build_mixtral}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer; it adds no special tokens of its own accord."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )

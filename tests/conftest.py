"""What all tests share: no network, a fixed seed, tiny models built from a configuration."""

import os

# Before anything imports the hub's client, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Processes that tests start would wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

REPOSITORY = Path(__file__).parents[1]

# A hundred processes that tests start compile the same kernels.
os.environ.setdefault("HAQ_KERNEL_CACHE", str(REPOSITORY / ".pytest_cache" / "kernels"))

# `transformers` starts with weights of standard deviation 0.02, and tiny models then predict almost
# the same for every token. This much and a test can tell a right model from a wrong one.
INITIALIZER_RANGE = 0.2

ModelFactory = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models as small as these gain nothing from threads, and wait for them on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Trained models and real text beside the checkout, or where HAQ_SHARED says."""
    path = Path(os.environ.get("HAQ_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "models").is_dir():
        pytest.skip(f"needs the reference data: no models in {path} (set HAQ_SHARED)")
    return path


@pytest.fixture
def tiny_opt() -> ModelFactory:
    """Builds an OPT with random weights: float32, in eval mode, 64 token ids, 512 positions."""

    def build(**changes: Any) -> PreTrainedModel:
        options: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "init_std": INITIALIZER_RANGE,
        }
        return OPTForCausalLM(OPTConfig(**options | changes)).eval()

    return build


@pytest.fixture
def tiny_llama() -> ModelFactory:
    """Builds a Llama with random weights and grouped-query attention; as `tiny_opt`."""

    def build(**changes: Any) -> PreTrainedModel:
        options: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": INITIALIZER_RANGE,
        }
        return LlamaForCausalLM(LlamaConfig(**options | changes)).eval()

    return build


@pytest.fixture
def tiny_mixtral() -> ModelFactory:
    """Builds a Mixtral with random weights, 4 experts and 2 per token; as `tiny_opt`."""

    def build(**changes: Any) -> PreTrainedModel:
        options: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "initializer_range": INITIALIZER_RANGE,
        }
        return MixtralForCausalLM(MixtralConfig(**options | changes)).eval()

    return build

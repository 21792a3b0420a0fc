"""Int8 models whose layers take a token by kernels, and tokens for them."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from haq import QuantizationConfig, quantize_model
from haq.int8 import matmul
from haq.model import steps
from haq.model.anatomy import may_be_layer
from haq.nn.swapped import swap_back
from tests.architectures import ARCHITECTURES, EXCLUDE, MIXTURES, token_ids, with_cache

MODELS = ARCHITECTURES | MIXTURES
PROMPT, NEW = 7, 6

# Their layers have the names and do what is known. Others have other names, or do more: Granite
# scales what it adds, PhiMoE's norms are centered, Ernie rotates neighbours.
FAST = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe"}
FAST |= {"glm4-moe"}

needs_llvm = pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")


def by_llvm() -> contextlib.AbstractContextManager[None]:
    """Whatever was measured to be the fastest one."""
    return matmul.use_backend("llvm") if matmul.compiles() else contextlib.nullcontext()


@functools.cache
def quantized(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Not to be changed."""
    exclude = ("lm_head", *EXCLUDE.get(name, ()))
    config = QuantizationConfig(
        smoothing="none", rounding="nearest", search_tokens=64, exclude=exclude
    )
    model = MODELS[name]()
    if name == "mistral":  # Behind its window there is a mask.
        model.config.sliding_window = 64
    return quantize_model(model.to(dtype), [token_ids(2, 32)], config, progress=False)


def int8(name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return copy.deepcopy(quantized(name, dtype))


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if may_be_layer(module)]


def by_itself(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers go their own way."""
    twin = copy.deepcopy(model)
    for layer in layers_of(twin):
        swap_back(layer)
    return twin


@torch.no_grad()
def decoded(model: PreTrainedModel, seed: int = 0, **kwargs: Any) -> Tensor:
    """Logits of some tokens, one after the other, behind a prompt."""
    tokens = token_ids(1, PROMPT + NEW, seed=seed)
    cache = kwargs.pop("cache", None) or DynamicCache(config=model.config)
    given = with_cache(model, cache)
    model(tokens[:, :PROMPT], **given)
    logits = [
        model(tokens[:, at : at + 1], **given, **kwargs).logits
        for at in range(PROMPT, PROMPT + NEW)
    ]
    return torch.cat(logits)


@contextmanager
def counted() -> Iterator[list[nn.Module]]:
    """The layers that took a token by kernels."""
    seen: list[nn.Module] = []
    take = steps._FastLayer._fast

    def note(layer: Any, *given: Any) -> Tensor | None:
        result = take(layer, *given)
        if result is not None:
            seen.append(layer)
        return result

    steps._FastLayer._fast = note  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        steps._FastLayer._fast = take  # type: ignore[method-assign]

"""Decoder layers that take one new token in two calls, where they are found to be what they seem.

Names say what a layer may be (`haq.model.anatomy`); what it is says its computation, which is
compared before a layer is trusted (`haq.model.trials`). Everything that is not one new token behind
others goes the layer's own way: prompts, batches, masks, gradients, hooks, compiled code, other
implementations of attention. Layers that follow are computed in the same call (`haq.model.ahead`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from haq.int8 import matmul
from haq.model import ahead
from haq.model.anatomy import (
    are_untouched,
    attention_of,
    block_of,
    may_be_layer,
    operations_of,
    parts_of,
    replaced_by,
    slots_of,
)
from haq.model.attention import always_ours
from haq.model.growing import Store
from haq.model.known import NOTHING, Found, know, known_of
from haq.model.trials import agree
from haq.nn.layer import LayerStep
from haq.nn.parts import DTYPES, Parts, fits
from haq.nn.swapped import Swapped, swap

_CACHES = ("cache", "past_key_values")  # transformers 5.24 renamed it.

# Arguments of a layer that change nothing for one token that attends to all before it.
_NO_MATTER = {"position_ids", "use_cache", "cache_position"}


def use_fast_steps(model: PreTrainedModel) -> int:
    """Let the decoder layers of a model take one new token in two calls, in place.

    That is on a CPU, in 16 bits, where all linear layers of a layer's attention are int8 and LLVM
    compiles the kernels. The first token behind others shows whether a layer is one that this is
    known for; the rest stays what it was.

    Args:
        model: on any device; attention and norms are haq's already.

    Returns:
        How many layers may be such.
    """
    layers = [module for module in model.modules() if may_be_layer(module)]
    for layer in layers:
        if not isinstance(layer, _FastLayer):
            swap(layer, _FastLayer)
            know(layer)
    return len(layers)


def may_run(dtype: torch.dtype) -> bool:
    """Whether there are kernels for the layers of a model of this dtype."""
    return dtype in DTYPES and matmul.compiles()


def takes_fast_steps(layer: nn.Module) -> bool:
    """Whether the latest token that a layer could have taken in two calls was taken so."""
    known = known_of(layer)
    return known is not None and known.found.step is not None


class _Token(NamedTuple):
    """What a layer is called with for one token."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    cache: Cache
    cache_name: str


class _FastLayer(Swapped):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        if not torch.compiler.is_compiling():
            result = self._fast(args, kwargs)
            if result is not None:
                return result
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _fast(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The layer's output by kernels; None, and nothing was done, if they cannot run now."""
        assert isinstance(self, nn.Module)
        cache = next((kwargs[name] for name in _CACHES if name in kwargs), None)
        result = ahead.computed(self, args, kwargs, cache)
        token = _one_token(self, args, kwargs) if result is None else None
        if token is None:
            return result
        found = self._find(token, kwargs)
        if found.step is None or found.kind is None or not are_untouched(found.replaced):
            return None
        rotation = token.cos, token.sin
        result = ahead.run(self, found.kind, token.x, rotation, token.cache, kwargs)
        if result is None:
            result = _by_kernels(self, found.step, *token[:4])
        if result is not None:
            ahead.learn(self, token.x, result)
        return result

    def _find(self, token: _Token, kwargs: Mapping[str, Any]) -> Found:
        assert isinstance(self, nn.Module)
        known = known_of(self)
        assert known is not None
        found, kind = known.found, (token.x.dtype, token.cos.shape[-1])
        current = found.step is None or found.step.is_current
        if found.kind == kind and current and found.slots.are_as_before():
            return found
        if not known.lock.acquire(blocking=False):
            return NOTHING  # Another thread tries.
        try:
            slots, parts = slots_of(self), parts_of(self)
            replaced = [] if parts is None else replaced_by(slots, parts)
            if parts is not None and not are_untouched(replaced):
                return NOTHING  # To be tried when nobody looks.
            step = None if parts is None else self._tried(parts, token, kwargs)
            known.found = Found(slots, kind, step, replaced)
        finally:
            known.lock.release()
        return known.found

    def _tried(self, parts: Parts, token: _Token, kwargs: Mapping[str, Any]) -> LayerStep | None:
        """The layer's kernels, if they do what the layer does."""
        assert isinstance(self, nn.Module)
        if not fits(parts, token.x.dtype) or not may_run(token.x.dtype):
            return None
        step = LayerStep(parts, token.x.dtype, token.cos.shape[-1])
        forward = super().forward  # type: ignore[misc]

        def own(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Any:
            given = {**kwargs, token.cache_name: cache, "position_embeddings": (cos, sin)}
            with always_ours():
                return forward(x, **given)

        def fast(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor | None:
            return _by_kernels(self, step, x, cos, sin, cache)

        known = operations_of(parts)
        return step if agree(own, fast, token.x, token.cos, known) else None


def _one_token(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Token | None:
    """What is given, if it is one token with a cache, and nothing that kernels do not know."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or layer.training:
        return None
    (x,) = args
    if x.numel() != x.shape[-1] or x.dim() != 3 or x.dtype not in DTYPES or not x.is_cpu:
        return None
    rotation, cache, cache_name = None, None, ""
    for name, value in kwargs.items():
        if name == "position_embeddings":
            rotation = value
        elif value is None or value is False or name in _NO_MATTER:
            continue
        elif name in _CACHES and cache is None:
            cache, cache_name = value, name
        else:
            return None
    if not isinstance(cache, Cache) or not isinstance(rotation, tuple) or len(rotation) != 2:
        return None
    cos, sin = rotation
    # Norms and routers may be asked for gradients.
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not x.is_contiguous():
        return None
    fit = _is_rotation(cos, x) and _is_rotation(sin, x) and cos.shape == sin.shape
    return _Token(x, cos, sin, cache, cache_name) if fit else None


def _is_rotation(tensor: Any, x: Tensor) -> bool:
    """Whether this may be cos or sin of one token's position."""
    if not isinstance(tensor, Tensor) or tensor.dtype != x.dtype or not tensor.is_cpu:
        return False
    size = tensor.numel()
    return size > 0 and size % 2 == 0 and tensor.shape[-1] == size and tensor.stride(-1) == 1


def _by_kernels(
    layer: nn.Module, step: LayerStep, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache
) -> Tensor | None:
    """The layer's output; None, and nothing was done, if the kernels cannot run now."""
    results = step.run(x, cos, sin, Store(cache, attention_of(layer).layer_idx))
    if results is None or len(results) == 1:
        return None if results is None else results[0]
    total, normed = results
    block = block_of(layer)(normed)
    result: Tensor = total + (block[0] if isinstance(block, tuple) else block)
    return result

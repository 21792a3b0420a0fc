"""Decoder layers that take one new token in two calls, where they are found to be what they seem.

Names say what a layer may be (`haq.model.anatomy`); what it is says its computation, which is
compared before a layer is trusted (`haq.model.trials`). Everything that is not one new token behind
others goes the layer's own way: prompts, batches, masks, gradients, hooks, compiled code, other
implementations of attention.
"""

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from haq.int8 import matmul
from haq.model.anatomy import (
    attention_of,
    block_of,
    is_untouched,
    may_be_layer,
    modules_of,
    parts_of,
)
from haq.model.trials import agree
from haq.nn.layer import LayerStep
from haq.nn.parts import DTYPES, fits
from haq.nn.swapped import Swapped, swap

_CACHES = ("cache", "past_key_values")  # transformers 5.24 renamed it.

# Arguments of a layer that change nothing for one token that attends to all before it.
_NO_MATTER = {"position_ids", "use_cache", "cache_position"}

_STATE = "_haq_step"


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
            vars(layer)[_STATE] = _State()
    return len(layers)


def takes_fast_steps(layer: nn.Module) -> bool:
    """Whether the latest token that a layer could have taken in two calls was taken so."""
    state: _State | None = vars(layer).get(_STATE)
    return state is not None and state.found[1] is not None


class _State:
    """What a layer knows about its kernels. Copies and pickles of the layer have to find it out.

    Attributes:
        lock: of whoever finds it out.
        found: for these modules, of these classes, and such a token: its kernels, or None.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: tuple[list[Any], LayerStep | None] = ([], None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _State, ()

    def __deepcopy__(self, memo: Any) -> "_State":
        return _State()


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
        token = None if torch.compiler.is_compiling() else _one_token(self, args, kwargs)
        if token is not None:
            step = self._step(token, kwargs)
            if step is not None and is_untouched(self, step.parts):
                result = _by_kernels(self, step, *token[:4])
                if result is not None:
                    return result
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _step(self, token: _Token, kwargs: Mapping[str, Any]) -> LayerStep | None:
        assert isinstance(self, nn.Module)
        state: _State = vars(self)[_STATE]
        modules = modules_of(self)
        kind = [*modules, *map(type, modules), token.x.dtype, token.cos.shape[-1]]
        known, step = state.found
        if known == kind and (step is None or step.is_current):
            return step
        if not state.lock.acquire(blocking=False):
            return None  # This is a trial's own call, or another thread tries.
        try:
            step = self._found(token, kwargs)
            state.found = kind, step
        finally:
            state.lock.release()
        return step

    def _found(self, token: _Token, kwargs: Mapping[str, Any]) -> LayerStep | None:
        """The layer's kernels, if they do what the layer does."""
        assert isinstance(self, nn.Module)
        parts = parts_of(self)
        if parts is None or not fits(parts, token.x.dtype) or not matmul.compiles():
            return None
        step = LayerStep(parts, token.x.dtype, token.cos.shape[-1])
        forward = super().forward  # type: ignore[misc]

        def own(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Any:
            given = {**kwargs, token.cache_name: cache, "position_embeddings": (cos, sin)}
            return forward(x, **given)

        def fast(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor | None:
            return _by_kernels(self, step, x, cos, sin, cache)

        known = is_untouched(self, parts) and agree(own, fast, token.x, token.cos)
        return step if known else None


def _one_token(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Token | None:
    """What is given, if it is one token with a cache, and nothing that kernels do not know."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or layer.training:
        return None
    (x,) = args
    if x.dim() != 3 or x.numel() != x.shape[-1] or x.dtype not in DTYPES or not x.is_cpu:
        return None
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    named = [name for name in _CACHES if name in given]
    if len(named) != 1 or given - _NO_MATTER != {named[0], "position_embeddings"}:
        return None
    trains = torch.is_grad_enabled() and x.requires_grad
    if trains or torch.is_autocast_enabled("cpu") or not isinstance(kwargs[named[0]], Cache):
        return None
    rotation = kwargs["position_embeddings"]
    if not isinstance(rotation, tuple) or len(rotation) != 2:
        return None
    cos, sin = rotation
    if not _is_rotation(cos, x) or not _is_rotation(sin, x) or cos.shape != sin.shape:
        return None
    x, cos, sin = (tensor.detach().contiguous() for tensor in (x, cos, sin))
    return _Token(x, cos, sin, kwargs[named[0]], named[0])


def _is_rotation(tensor: Any, x: Tensor) -> bool:
    """Whether this may be cos or sin of one token's position."""
    if not isinstance(tensor, Tensor) or tensor.dtype != x.dtype or not tensor.is_cpu:
        return False
    return tensor.dim() > 0 and tensor.numel() == tensor.shape[-1] and tensor.numel() % 2 == 0


def _by_kernels(
    layer: nn.Module, step: LayerStep, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache
) -> Tensor | None:
    """The layer's output; None, and nothing was done, if the kernels cannot run now."""
    index: int = attention_of(layer).layer_idx
    results = step.run(x, cos, sin, lambda key, value: cache.update(key, value, index))
    if results is None or len(results) == 1:
        return None if results is None else results[0]
    total, normed = results
    block = block_of(layer)(normed)
    result: Tensor = total + (block[0] if isinstance(block, tuple) else block)
    return result

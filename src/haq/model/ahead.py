"""Layers that are computed before they are called.

A model calls its layers one after the other, each with what the one before gave. When a layer whose
followers are known has a new token, all of them are computed at once, and each is given its result
when it is called with what it was computed from: the same token, not written to since, beside the
same arguments, and keys and values that are still those. The cache is given a layer's new ones
no sooner. For everything else the layer goes the way that it would have gone.
"""

import operator
import threading
import weakref
from collections.abc import Mapping, Sequence
from itertools import starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from haq.model.anatomy import are_untouched, attention_of
from haq.model.growing import Store
from haq.model.known import Known, known_of
from haq.nn.layer import LayerStep
from haq.nn.several import SeveralSteps

# So often in a row a layer is computed in vain before it is not any more.
_MOST_WASTED = 3


class _Computed(NamedTuple):
    """A layer, and what it gives if it is called with this.

    Attributes:
        known: of the layer before.
        layer: it.
        x: what that gave.
        state: of ``x``.
        store: is to keep its keys and values.
        result: its output.
    """

    known: Known
    layer: weakref.ref[nn.Module]
    x: Tensor
    state: object
    store: Store
    result: Tensor


class _Ahead(NamedTuple):
    """What is computed already.

    Attributes:
        names: of the arguments of all layers.
        given: their values, but the cache.
        rotation: cos and sin, which are among them, and the state of each.
        mode: the `_mode` of then.
        rest: who is called next is the last.
    """

    names: list[str]
    given: list[object]
    rotation: list[tuple[Tensor, object]]
    mode: tuple[bool, ...]
    rest: list[_Computed]


# By the cache, which is not held by them.
_ahead: "weakref.WeakKeyDictionary[DynamicCache, _Ahead]" = weakref.WeakKeyDictionary()


class _Thread(threading.local):
    layer: "weakref.ref[nn.Module] | None" = None
    result: "weakref.ref[Tensor] | None" = None


_latest = _Thread()


def computed(
    layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], cache: Any
) -> Tensor | None:
    """What a layer gives, if that was computed; the cache is then given its keys and values.

    Args:
        layer: is called.
        args: with this.
        kwargs: and this.
        cache: one of them.
    """
    ahead = _ahead.get(cache) if type(cache) is DynamicCache else None
    if ahead is None:
        return None
    following = ahead.rest.pop()
    if not ahead.rest:
        del _ahead[cache]
    if _is_called(following, ahead, layer, args, kwargs):
        following.known.wasted = 0
        following.store.keep(following.x)
        return following.result
    _ahead.pop(cache, None)
    following.known.wasted += 1
    following.known.follower = None
    return None


def run(
    layer: nn.Module,
    kind: tuple[torch.dtype, int],
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    cache: Cache,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """A layer's output, and, for later, those of the layers that follow.

    Args:
        layer: is called.
        kind: of what it is called with, as in `haq.model.known.Found`.
        x: a token that kernels are known for, ``[1, 1, K]``.
        rotation: its cos and sin.
        cache: takes the keys.
        kwargs: what else the layer is called with, the last two included.

    Returns:
        ``[1, 1, K]``; None, and nothing was done, if no layer is known to follow, or if they cannot
        be computed now.
    """
    known = known_of(layer)
    if type(cache) is not DynamicCache or known is None or known.follower is None:
        return None
    line = _line(layer, kind, cache)
    if len(line) < 2:
        return None
    steps = tuple(each.step for each in line)
    several = known.several
    if several is None or several.layers != steps:
        several = known.several = SeveralSteps(steps)
    results = several.run(x, *rotation, [each.store for each in line])
    if not results:
        return None
    line[0].store.keep(x)
    rest = [
        _Computed(
            before.known, weakref.ref(each.layer), given, _state_of(given), each.store, result
        )
        for before, each, given, result in zip(line, line[1:], results, results[1:], strict=False)
    ]
    if rest:
        given = _but_the_cache(kwargs)
        turned = [(part, _state_of(part)) for part in rotation]
        _ahead[cache] = _Ahead(list(kwargs), given, turned, _mode(), rest[::-1])
    return results[0]


def learn(layer: nn.Module, x: Tensor, result: Tensor) -> None:
    """Who is called with whose output: a layer that was not computed before had ``x``, and gave
    ``result``."""
    before = None if _latest.layer is None else _latest.layer()
    if before is not None and _latest.result is not None and _latest.result() is x:
        known = known_of(before)
        if known is not None and known.wasted < _MOST_WASTED:
            known.follower = weakref.ref(layer)
    _latest.layer, _latest.result = weakref.ref(layer), weakref.ref(result)


class _InLine(NamedTuple):
    """A layer that can be computed with the one before it."""

    layer: nn.Module
    known: Known
    step: LayerStep
    store: Store


def _line(layer: nn.Module, kind: tuple[torch.dtype, int], cache: Cache) -> list[_InLine]:
    """A layer and those that follow, as far as they can be computed and nobody looks at them."""
    line: list[_InLine] = []
    seen: set[nn.Module | None] = {None}
    following: nn.Module | None = layer
    while following not in seen:
        assert following is not None
        known = known_of(following)
        step = None if known is None else _usable(following, known, kind)
        if known is None or step is None:
            break
        store = Store(cache, attention_of(following).layer_idx)
        if not store.grows():
            break
        line.append(_InLine(following, known, step, store))
        seen.add(following)
        following = None if known.follower is None else known.follower()
    return line


def _usable(layer: nn.Module, known: Known, kind: tuple[torch.dtype, int]) -> LayerStep | None:
    """The kernels of a layer, if they can be called in its place."""
    found = known.found
    if found.kind != kind or found.step is None or found.step.parts.block is None:
        return None
    # Whoever looks at a layer may change what the next one is, or what it is given.
    quiet = not layer.training and are_untouched([*found.replaced, layer])
    return found.step if quiet and found.slots.are_as_before() else None


def _is_called(
    following: _Computed,
    ahead: _Ahead,
    layer: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether the layer that was computed is the one that is called, with what it was from."""
    return (
        following.layer() is layer
        and len(args) == 1
        and args[0] is following.x
        and _is_as_before(following.x, following.state)
        and list(kwargs) == ahead.names
        and all(map(operator.is_, _but_the_cache(kwargs), ahead.given))
        and all(starmap(_is_as_before, ahead.rotation))
        and _mode() == ahead.mode
        and following.store.is_as_placed()
    )


def _but_the_cache(kwargs: Mapping[str, Any]) -> list[Any]:
    return [value for value in kwargs.values() if type(value) is not DynamicCache]


def _mode() -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *enabled, torch.is_autocast_enabled("cpu")


def _state_of(x: Tensor) -> object:
    """What tells whether a tensor was written to; one of inference mode does not count that."""
    return x.clone() if x.is_inference() else x._version


def _is_as_before(x: Tensor, state: object) -> bool:
    return torch.equal(x, state) if isinstance(state, Tensor) else x._version == state

"""What several layers make of one tensor, one after the other, is made once.

q, k and v read the same tensor, and so do gate and up: each would round it again. Who reads what is
known by the model's code only, so the latest result is kept for whoever comes next with the same
tensor, for as long as the tensor lives and is not written to.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class _Latest(weakref.ref[Tensor]):
    """A tensor that may die, what was made of it, and who has had that."""

    __slots__ = ("key", "readers", "state", "value")

    key: Hashable
    readers: set[int]
    state: Any
    value: Any


class _Thread(threading.local):
    latest: _Latest | None = None


_thread = _Thread()


def once(x: Tensor, key: Hashable, reader: object, make: Callable[[Tensor], Made]) -> Made:
    """``make(x)``, or what another reader's call, the thread's previous one, gave for this tensor.

    Writing to a tensor's memory from outside torch leaves no trace in it. So nobody is given the
    same result twice: a reader who comes again is one for whom something may have changed.

    Args:
        x: it counts as the same if it is the same object and was not written to since. Where that
            cannot be told cheaply, on a GPU in inference mode, everybody makes his own.
        key: what is made.
        reader: whom it is for.
        make: how. The result is shared: nobody may write to it.

    Examples:
        >>> x = torch.tensor([1.0])
        >>> q, k = (once(x, "twice", reader, lambda x: 2 * x) for reader in "qk")
        >>> k is q
        True
        >>> once(x.add_(1), "twice", "v", lambda x: 2 * x)
        tensor([4.])
    """
    latest = _thread.latest
    if latest is not None and latest() is x and latest.key == key:
        if id(reader) not in latest.readers and _unchanged(x, latest.state):
            latest.readers.add(id(reader))
            kept: Made = latest.value
            return kept
    made = make(x)
    if not x.is_inference():
        keep(x, key, made, state_of(x))
    elif x.device.type == "cpu":
        keep(x, key, made, x.clone())
    if _thread.latest is not None:
        _thread.latest.readers.add(id(reader))
    return made


def keep(x: Tensor, key: Hashable, value: object, state: object) -> None:
    """Leave ``value`` for the next call of `once` with this tensor, in the present state of it."""
    latest = _Latest(x, _forget)
    latest.key, latest.readers, latest.state, latest.value = key, set(), state, value
    _thread.latest = latest


def state_of(x: Tensor) -> object:
    """What must be the same for a result to be that of ``x`` still; not of inference mode.

    On a GPU it is also the stream, on which alone the result is known to be there, and whether it
    is captured: a CUDA graph must make what it reads, and what it makes is nobody else's.
    """
    if not x.is_cuda:
        return x._version
    return x._version, torch.cuda.current_stream(x.device).cuda_stream, is_captured(x)


def is_captured(x: Tensor) -> bool:
    """Whether what is done with ``x`` now becomes a part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _forget(latest: _Latest) -> None:
    latest.state = latest.value = None


def _unchanged(x: Tensor, state: Any) -> bool:
    # A tensor of inference mode does not count who wrote to it: it is compared with a copy.
    if isinstance(state, Tensor):
        return torch.equal(x, state)
    return bool(state_of(x) == state)

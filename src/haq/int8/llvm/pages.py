"""Weights in memory that the system maps by pages of 2 MiB in the place of 4 KiB.

A step of decoding reads gigabytes in a row, and looks up the address of every page on its way. With
large ones that is hardly ever. It gains a few percent. And new memory is there sooner.
"""

import mmap
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_PAGE = 2**21

# Linux, where it gives large pages to those who ask.
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)

# What lives in large pages, by its address.
_mapped: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def in_large_pages(weight: Tensor) -> Tensor:
    """The same numbers in large pages, as far as they fill them, if the system has any to give.

    Args:
        weight: contiguous, on the CPU. If it fills no page, is in large ones already, or there are
            none, it is what comes back, else a copy.
    """
    if weight.untyped_storage().data_ptr() in _mapped:
        return weight
    room = _room(weight.nbytes)
    if room is None:
        return weight
    return room.view(weight.dtype).view(weight.shape).copy_(weight)


def new_bytes(shape: Sequence[int], dtype: torch.dtype = torch.int8) -> Tensor:
    """Memory on the CPU in large pages, as `in_large_pages`; what is in it is not said.

    Args:
        shape: of what is wanted.
        dtype: int8 or uint8.

    Examples:
        >>> new_bytes((2, 3)).shape
        torch.Size([2, 3])
    """
    room = _room(torch.Size(shape).numel())
    if room is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return room.view(dtype).view(shape)


def _room(size: int) -> Tensor | None:
    """So many bytes; None if they fill no large page, or there are none."""
    if size < _PAGE or _ADVICE is None:
        return None
    try:
        mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        start = -whole.data_ptr() % _PAGE
        mapped.madvise(_ADVICE, start, size // _PAGE * _PAGE)
    except OSError:  # This system has none.
        return None
    _mapped[whole.data_ptr()] = mapped
    return whole[start : start + size]

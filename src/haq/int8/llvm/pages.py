"""Weights in memory that the system maps by pages of 2 MiB in the place of 4 KiB.

A step of decoding reads gigabytes in a row, and looks up the address of every page on its way. With
large ones that is hardly ever. It gains a few percent.
"""

import mmap

import torch
from torch import Tensor

_PAGE = 2**21

# Linux, where it gives large pages to those who ask.
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def in_large_pages(weight: Tensor) -> Tensor:
    """The same numbers in large pages, as far as they fill them, if the system has any to give.

    Args:
        weight: contiguous, on the CPU. If it fills no page, or there are none, it is what comes
            back, else a copy.
    """
    size = weight.nbytes
    if size < _PAGE or _ADVICE is None:
        return weight
    try:
        mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        start = -whole.data_ptr() % _PAGE
        mapped.madvise(_ADVICE, start, size // _PAGE * _PAGE)
    except OSError:  # This system has none.
        return weight
    copy = whole[start : start + size].view(weight.dtype).view(weight.shape)
    return copy.copy_(weight)

"""Memory that the C library holds back: glibc keeps what is freed in the middle of its heap."""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give pages that nothing lives in back to the system; does nothing where that is not needed.

    Quantizing makes and frees matrices of 10 to 30 MB by the hundred. glibc takes those from its
    heap, which small objects that stay keep from shrinking: without this the process holds several
    blocks' worth of memory that nobody uses. It takes milliseconds.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim  # glibc has it; macOS, Windows and musl do not.
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_size_t]
    trim: Callable[[int], int] = function
    return trim

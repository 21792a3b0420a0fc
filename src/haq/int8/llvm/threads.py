"""The threads that kernels run on: torch's own. Others would fight with them for the cores."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from haq.int8.llvm.words import I32, I64, VOID, Code, Value

_BARRIER, _THREAD, _THREADS = "haq_barrier", "haq_thread", "haq_threads"

_LIBRARIES = ("libgomp", "libiomp5", "libomp")


def wait_for_all(code: Code) -> None:
    """No thread goes on until all have come to this place."""
    code.call(_function(code, _BARRIER, VOID), [])


def number_and_count(code: Code) -> tuple[Value, Value]:
    """Which thread this is, and how many there are."""
    number, count = (code.call(_function(code, name, I32), []) for name in (_THREAD, _THREADS))
    return code.sext(number, I64), code.sext(count, I64)


def take(code: Code, counter: Value, size: Value) -> Value:
    """What a counter, by its address, has reached; for all other threads it has gone on."""
    return code.atomic_rmw("add", counter, size, "monotonic")


@contextlib.contextmanager
def pieces(code: Code, counter: Value, size: Value, stop: Value) -> Iterator[tuple[Value, Value]]:
    """What is written inside happens, in whichever thread is free, for all pieces up to ``stop``.

    Args:
        code: what is inside is written to.
        counter: the address of a counter that begins with 0.
        size: of a piece.
        stop: where the last one ends.

    Yields:
        Where a piece begins and ends.
    """
    start = code.variable(I64, take(code, counter, size))
    with code.repeat(lambda: code.icmp_signed("<", code.value(start, I64), stop)):
        here = code.value(start, I64)
        yield here, code.smaller(stop, code.add(here, size))
        code.store(take(code, counter, size), start)


def _function(code: Code, name: str, result: object) -> Value:
    known = code.module.globals.get(name)
    return known or ir.Function(code.module, ir.FunctionType(result, []), name)


@functools.cache
def library() -> ctypes.CDLL:
    """The OpenMP library that torch runs on, whose functions kernels know from now on.

    Raises:
        RuntimeError: there is none of a kind that is known.
    """
    own = Path(torch.__file__).parent.parent
    for path in sorted(_loaded(), key=lambda path: own not in path.parents):
        found = ctypes.CDLL(str(path))
        if hasattr(found, "GOMP_parallel"):
            integers, address = [ctypes.c_uint] * 2, ctypes.c_void_p
            found.GOMP_parallel.argtypes = [address, address, *integers]
            found.GOMP_parallel.restype = None
            _tell(found)
            return found
    raise RuntimeError("torch has no OpenMP library whose threads could be used")


def _loaded() -> list[Path]:
    """OpenMP libraries of this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return [Path(path) for path in sorted(paths) if Path(path).name.startswith(_LIBRARIES)]


def _tell(found: ctypes.CDLL) -> None:
    functions = found.GOMP_barrier, found.omp_get_thread_num, found.omp_get_num_threads
    for name, function in zip((_BARRIER, _THREAD, _THREADS), functions, strict=True):
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        llvm.add_symbol(name, address)

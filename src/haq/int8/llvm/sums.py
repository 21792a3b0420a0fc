"""The sums of a weight's rows, in one call: `haq.int8.grid.sums_of_rows`."""

from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.words import I8, I32, POINTER, Code, number, parts, reduced, vector

_CALL = (
    "weight",  # int8 [N, K]
    "rows",  # N
    "width",  # K
    "out",  # int32 [N]
)


def sums_of_rows(weight: Tensor) -> Tensor:
    """Where tokens are unsigned, of which a one is made here.

    Args:
        weight: int8 ``[N, K]``, contiguous, on the CPU.

    Returns:
        int32 ``[N]``.
    """
    out = weight.new_empty(len(weight), dtype=torch.int32)
    compiler.run(_module, (), [weight.data_ptr(), *weight.shape, out.data_ptr()])
    return out


def _module() -> Any:
    dots, module = compiler.dots_here(), ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    first, step = threads.number_and_count(code)
    kind = vector(I32, dots.sums)
    with code.loop(first, call["rows"], step) as row:
        start = code.address(call["weight"], code.mul(row, call["width"]), I8)
        sums = code.variable(kind, number(0, kind))
        (_, left, right), (_, rest, end) = parts(code, call["width"], dots.lanes)
        with code.loop(left, right, dots.lanes) as index:
            weights = code.read(start, index, I8, dots.lanes)
            ones = number(1, weights.type)
            code.store(dots.add(code, code.value(sums, kind), weights, ones), sums)
        total = code.variable(I32, reduced(code, "add", code.value(sums, kind)))
        with code.loop(rest, end) as index:
            weights = code.sext(code.read(start, index, I8), I32)
            code.store(code.add(code.value(total, I32), weights), total)
        code.write(code.value(total, I32), call["out"], row, I32)
    code.ret_void()
    return module

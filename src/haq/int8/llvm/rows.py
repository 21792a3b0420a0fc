"""Rows of a float weight on the grid, in one call: `haq.int8.grid.quantize_rows`, bit for bit."""

from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8 import grid
from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.rounding import largest_magnitude
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    I8,
    I32,
    POINTER,
    Code,
    Value,
    constant,
    parts,
    rounded,
    spread,
    vector,
)

_CALL = (
    "weight",  # float [N, K]
    "rows",  # N
    "width",  # K
    "factors",  # float32 [K]
    "integers",  # int8 [N, K]
    "scale",  # float32 [N]
)


def quantize_rows(weight: Tensor, factors: Tensor | None, integers: Tensor, scale: Tensor) -> None:
    """Write a weight, its columns multiplied by factors, on the grid.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``.
        factors: float32 ``[K]``; None for ones.
        integers: int8 ``[N, K]``, contiguous, to write to.
        scale: float32 ``[N, 1]``, contiguous, to write to.
    """
    weight = weight.contiguous()
    factors = None if factors is None else factors.contiguous()
    places = [weight.data_ptr(), *weight.shape, 0 if factors is None else factors.data_ptr()]
    places += [integers.data_ptr(), scale.data_ptr()]
    compiler.run(_module, (weight.dtype, factors is not None), places)


def _module(dtype: torch.dtype, multiplied: bool) -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    first, step = threads.number_and_count(code)
    with code.loop(first, call["rows"], step) as row:
        _Row(code, call, row, name_of(dtype), multiplied).write()
    code.ret_void()
    return module


class _Row:
    """One row."""

    def __init__(self, code: Code, call: Told, row: Value, kind: str, multiplied: bool) -> None:
        self.code, self.call, self.row = code, call, row
        self.kind, self.multiplied = kind, multiplied
        start = code.mul(row, call["width"])
        self.values = code.address(call["weight"], start, floats.STORED[kind])
        self.integers = code.address(call["integers"], start, I8)
        self.lanes = compiler.dots_here().sums

    def write(self) -> None:
        code, sides = self.code, parts(self.code, self.call["width"], self.lanes)
        largest = largest_magnitude(code, sides, self._read)
        scale = code.fdiv(largest, constant(FLOAT, float(grid.QMAX)))
        small = code.fcmp_ordered("<", scale, constant(FLOAT, grid.SMALLEST_SCALE))
        scale = code.select(small, constant(FLOAT, 1.0), scale)
        code.write(scale, self.call["scale"], self.row, FLOAT)
        for lanes, start, stop in sides:
            with code.loop(start, stop, lanes) as index:
                value = code.fdiv(self._read(index, lanes), spread(code, scale, lanes))
                integers = code.fptosi(rounded(code, value), vector(I32, lanes))
                code.write(code.trunc(integers, vector(I8, lanes)), self.integers, index, I8)

    def _read(self, index: Value, lanes: int) -> Value:
        value = floats.read(self.code, self.kind, self.values, index, lanes)
        if not self.multiplied:
            return value
        return self.code.fmul(value, self.code.read(self.call["factors"], index, FLOAT, lanes))

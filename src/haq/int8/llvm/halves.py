"""A linear layer that stays in 16 bits: its weight times one token, in one call."""

from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.dots import Dots, ahead
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    POINTER,
    Code,
    Value,
    bytes_of,
    constant,
    multiply_add,
    number,
    prefetch,
    total,
    vector,
)

# Bytes of the weight that a thread takes at a time.
_CHUNK_BYTES = 2**18

_CALL = (
    "tokens",  # float32 [K], one
    "width",  # K
    "weight",  # float [N, K]
    "rows",  # N
    "bias",  # float [N], or 0
    "out",  # float [N]
    "chunk",  # rows that a thread takes at a time
    "counter",  # the first row that no thread has taken: 0
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` with sums in float32, rounded once.

    Args:
        x: bfloat16 or float16 ``[..., K]``, one token.
        weight: ``[N, K]``, dtype of ``x``.
        bias: ``[N]``, dtype of ``x``.

    Returns:
        ``[..., N]``, dtype of ``x``.
    """
    weight, token = weight.contiguous(), x.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, width = weight.shape
    out = x.new_empty((*x.shape[:-1], rows))
    chunk = max(1, _CHUNK_BYTES // (width * weight.itemsize))
    places = [token.data_ptr(), width, weight.data_ptr(), rows]
    places += [0 if bias is None else bias.data_ptr(), out.data_ptr(), chunk, 0]
    compiler.run(_module, (x.dtype, bias is not None), places)
    return out


def _module(dtype: torch.dtype, biased: bool) -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    pieces = threads.pieces(code, call.place("counter"), call["chunk"], call["rows"])
    with pieces as (first, last), code.loop(first, last) as row:
        _Row(code, call, row, name_of(dtype)).write(compiler.dots_here(), biased)
    code.ret_void()
    return module


class _Row:
    """One row of the weight."""

    def __init__(self, code: Code, call: Told, row: Value, kind: str) -> None:
        self.code, self.call, self.row, self.kind = code, call, row, kind
        self.width, self.stored = call["width"], floats.STORED[kind]
        self.weight = code.address(call["weight"], code.mul(row, self.width), self.stored)

    def write(self, dots: Dots, biased: bool) -> None:
        code = self.code
        result = self._product(dots)
        if biased:
            bias = floats.read(code, self.kind, self.call["bias"], self.row, 1)
            result = code.fadd(result, bias)
        floats.write(code, self.kind, result, self.call["out"], self.row)

    def _product(self, dots: Dots) -> Value:
        """In registers, several of them, as each step of a sum waits for the last; then the rest.

        Args:
            dots: the processor's registers.
        """
        code, lanes, steps = self.code, dots.sums, dots.registers // 4
        zero = constant(vector(FLOAT, lanes), 0.0)
        sums = [code.variable(zero.type, zero) for _ in range(steps)]
        in_steps, whole = (code.and_(self.width, number(-size)) for size in (lanes * steps, lanes))
        with code.loop(number(0), in_steps, lanes * steps) as start:
            here = code.address(self.weight, start, self.stored)
            prefetch(code, here, lanes * steps * bytes_of(self.stored), ahead(dots))
            for step, place in enumerate(sums):
                self._add(place, code.add(start, number(lanes * step)), lanes)
        with code.loop(in_steps, whole, lanes) as index:
            self._add(sums[0], index, lanes)
        result = code.value(sums[0], zero.type)
        for place in sums[1:]:
            result = code.fadd(result, code.value(place, zero.type))
        last = code.variable(FLOAT, total(code, result))
        with code.loop(whole, self.width) as index:
            self._add(last, index, 1)
        return code.value(last, FLOAT)

    def _add(self, place: Value, index: Value, lanes: int) -> None:
        """The products of so many weights, to a variable."""
        code = self.code
        weight = floats.read(code, self.kind, self.weight, index, lanes)
        token = code.read(self.call["tokens"], index, FLOAT, lanes)
        code.store(multiply_add(code, weight, token, code.value(place, token.type)), place)

"""A linear layer that stays in 16 bits: its weight times one token, in one call.

Numbers become float32 as they are read. Some processors multiply pairs of bfloat16 as they are,
with sums in float32, too.
"""

import functools
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.dots import Dots, ahead
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    I32,
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

# In a register.
_PAIRS = 16

# Bytes of the weight that a thread takes at a time.
_CHUNK_BYTES = 2**18

_CALL = (
    "tokens",  # float32 [K], one; bfloat16 where pairs of it are multiplied
    "width",  # K
    "weight",  # float [N, K]
    "rows",  # N
    "bias",  # float [N], or 0
    "out",  # float [N]
    "chunk",  # rows that a thread takes at a time
    "counter",  # the first row that no thread has taken: 0
)


@dataclass(frozen=True)
class Pairs:
    """Sums of two products of bfloat16, in float32, in registers of 512 bits: AVX512-BF16.

    Attributes:
        instruction: whether the processor has it; else what it does is written out, for tests.
    """

    instruction: bool = True

    def add(self, code: Code, sums: Value, weight: Value, token: Value) -> Value:
        if not self.instruction:
            return floats.add_pairs(code, sums, weight, token)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return code.intrinsic(name, sums.type, sums, weight, token)


def pairs_here() -> Pairs | None:
    """How this processor multiplies pairs; None if it does not."""
    return Pairs() if compiler.dots_here().sums == _PAIRS and _has_instruction() else None


@functools.cache
def _has_instruction() -> bool:
    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` with sums in float32, rounded once.

    Args:
        x: bfloat16 or float16 ``[..., K]``, one token.
        weight: ``[N, K]``, dtype of ``x``.
        bias: ``[N]``, dtype of ``x``.

    Returns:
        ``[..., N]``, dtype of ``x``.
    """
    pairs = pairs_here() if x.dtype == torch.bfloat16 else None
    weight, token = weight.contiguous(), (x.float() if pairs is None else x).contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, width = weight.shape
    out = x.new_empty((*x.shape[:-1], rows))
    chunk = max(1, _CHUNK_BYTES // (width * weight.itemsize))
    places = [token.data_ptr(), width, weight.data_ptr(), rows]
    places += [0 if bias is None else bias.data_ptr(), out.data_ptr(), chunk, 0]
    compiler.run(_module, (x.dtype, bias is not None, pairs), places)
    return out


def _module(dtype: torch.dtype, biased: bool, pairs: Pairs | None) -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    pieces = threads.pieces(code, call.place("counter"), call["chunk"], call["rows"])
    with pieces as (first, last), code.loop(first, last) as row:
        _Row(code, call, row, name_of(dtype), pairs).write(compiler.dots_here(), biased)
    code.ret_void()
    return module


class _Row:
    """One row of the weight."""

    def __init__(self, code: Code, call: Told, row: Value, kind: str, pairs: Pairs | None) -> None:
        self.code, self.call, self.row, self.kind, self.pairs = code, call, row, kind, pairs
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
        code, steps = self.code, dots.registers // 4
        lanes = dots.sums if self.pairs is None else 2 * _PAIRS
        zero = constant(vector(FLOAT, dots.sums), 0.0)
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
        code, token = self.code, self.call["tokens"]
        if self.pairs is not None and lanes > 1:
            sums = code.value(place, vector(FLOAT, _PAIRS))
            sides = (self._pairs(side, index) for side in (self.weight, token))
            code.store(self.pairs.add(code, sums, *sides), place)
            return
        kind = "float32" if self.pairs is None else self.kind
        a = floats.read(code, self.kind, self.weight, index, lanes)
        b = floats.read(code, kind, token, index, lanes)
        code.store(multiply_add(code, a, b, code.value(place, a.type)), place)

    def _pairs(self, base: Value, index: Value) -> Value:
        place = self.code.address(base, index, self.stored)
        return self.code.load(place, typ=vector(I32, _PAIRS), align=bytes_of(self.stored))

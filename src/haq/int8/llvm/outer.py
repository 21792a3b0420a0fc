"""Sums of outer products of rows, ``sum_t a_t b_t^T``, where the processor multiplies matrices.

That is what second moments are, what is owed to columns that are rounded already, and what a layer
computes. Rows are float32; they are rounded to bfloat16, in `haq.int8.llvm.packing`, and added up
in float32.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import amx, compiler, floats, threads
from haq.int8.llvm.amx import SIDE
from haq.int8.llvm.calls import Told
from haq.int8.llvm.packing import BLOCK, STEP, Blocks
from haq.int8.llvm.words import (
    FLOAT,
    I8,
    I32,
    I64,
    POINTER,
    Code,
    Value,
    number,
    quotient_up,
    vector,
)

# Registers of left columns that are multiplied with as many of right ones.
_AT_ONCE = 2

# What a thread multiplies before it asks for more: so many left columns with so many right ones, of
# so many blocks of rows at a time. Those of the left columns stay in the cache of its core, and
# those of two blocks of right columns, one pair after the other, in the nearest one.
_LEFT, _RIGHT, _STEPS = 256, 512, 16
_PIECES_PER_THREAD = 4

_MULTIPLY = (
    "steps",  # blocks of rows
    "rows",  # left columns
    "columns",  # right ones
    "wide",  # of these in a piece
    "out",  # float32 [rows, columns], `stride` bytes apart
    "stride",
    "counter",  # how many pieces have been taken: 0
    "terms",  # how many there are; `_TERM` of each follows
)

_TERM = (
    "left",  # its blocks
    "left_apart",
    "right",
    "right_apart",
)


@dataclass(frozen=True)
class Halves:
    """Sums of two products of bfloat16, in float32.

    Attributes:
        instruction: whether the processor has it; else what it does is written out, for tests.
    """

    instruction: bool = True
    of_matrices = "tdpbf16ps"

    def add(self, code: Code, sums: Value, weight: Value, token: Value) -> Value:
        pairs = (code.bitcast(side, vector(I32, SIDE)) for side in (weight, token))
        totals = floats.add_pairs(code, code.bitcast(sums, vector(FLOAT, SIDE)), *pairs)
        return code.bitcast(totals, vector(I32, SIDE))


def add_outer(
    total: Tensor, terms: Sequence[tuple[Blocks, Blocks]], count: int, first: int = 0
) -> None:
    """Add ``sum_t a_t b_t^T`` of each term.

    Args:
        total: float32 ``[M, N]``, of which each row lies in one piece; both are multiples of
            `STEP`. N of the right columns, from the first one on, are multiplied.
        terms: a, on the left, and b.
        count: rows, from the first one on.
        first: of M left columns, a multiple of `STEP`.
    """
    rows, columns = total.shape
    fair = -(-columns // (_PIECES_PER_THREAD * torch.get_num_threads() * STEP)) * STEP
    places = [-(-count // STEP), rows, columns, min(_RIGHT, fair)]
    places += [total.data_ptr(), 4 * total.stride(0), 0, len(terms)]
    for a, b in terms:
        places += [a.address + first // SIDE * a.apart, a.apart, b.address, b.apart]
    compiler.run(_multiplying, (products_here(),), places)


def products_here() -> Halves | None:
    """How this processor multiplies such matrices; None if it does not."""
    return Halves() if _has_instruction() else None


@functools.cache
def _has_instruction() -> bool:
    return bool(llvm.get_host_cpu_features().get("amx-bf16")) and amx.permitted()


def _multiplying(products: Halves) -> ir.Module:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    (base,) = code.parameters
    call = Told(code, base, _MULTIPLY)
    amx.configure(code, products)
    square, wide = _Square(code, base, call, products), call["wide"]
    pieces = quotient_up(code, call["rows"], number(_LEFT))
    all_pieces = code.mul(pieces, quotient_up(code, call["columns"], wide))
    with threads.pieces(code, call.place("counter"), number(1), all_pieces) as (piece, _):
        top = code.mul(code.srem(piece, pieces), number(_LEFT))
        bottom = code.smaller(call["rows"], code.add(top, number(_LEFT)))
        start = code.mul(code.sdiv(piece, pieces), wide)
        stop = code.smaller(call["columns"], code.add(start, wide))
        with code.loop(number(0), call["steps"], _STEPS) as step:
            last = code.smaller(call["steps"], code.add(step, number(_STEPS)))
            with code.loop(start, stop, STEP) as column, code.loop(top, bottom, STEP) as row:
                square.add(row, column, step, last)
    amx.release(code, products)
    code.ret_void()
    return module


class _Square:
    """Sums of some left columns and of as many right ones, in registers for matrices."""

    def __init__(self, code: Code, base: Value, call: Told, products: Halves) -> None:
        self._code, self._base, self._call = code, base, call
        self._matrices = amx.registers(code, products)

    def add(self, row: Value, column: Value, step: Value, last: Value) -> None:
        """What blocks of rows from ``step`` to before the last one give."""
        code, both = self._code, range(_AT_ONCE)
        sums = {(r, c): r * _AT_ONCE + c for r in both for c in both}
        left, right = ([len(sums) + side * _AT_ONCE + i for i in both] for side in (0, 1))
        for (r, c), register in sums.items():
            self._matrices.load(register, self._out(row, column, r, c), self._call["stride"])
        with code.loop(number(0), self._call["terms"]) as index:
            place = code.add(number(len(_MULTIPLY)), code.mul(index, number(len(_TERM))))
            term = Told(code, code.address(self._base, place, I64), _TERM)
            with code.loop(step, last) as here:
                for side, registers, first in (("left", left, row), ("right", right, column)):
                    for nth, register in enumerate(registers):
                        self._matrices.load(register, self._block(term, side, first, nth, here))
                for (r, c), register in sums.items():
                    self._matrices.add(register, left[r], right[c])
        for (r, c), register in sums.items():
            self._matrices.store(register, self._out(row, column, r, c), self._call["stride"])

    def _out(self, row: Value, column: Value, r: int, c: int) -> Value:
        code = self._code
        line = code.mul(code.add(row, number(r * SIDE)), self._call["stride"])
        there = code.address(self._call["out"], line, I8)
        return code.address(there, code.add(column, number(c * SIDE)), FLOAT)

    def _block(self, term: Told, side: str, first: Value, index: int, step: Value) -> Value:
        code = self._code
        nth = code.add(code.sdiv(first, number(SIDE)), number(index))
        place = code.mul(nth, term[f"{side}_apart"])
        place = code.add(place, code.mul(step, number(BLOCK)))
        return code.address(term[side], place, I8)

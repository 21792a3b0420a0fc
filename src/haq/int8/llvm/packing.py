"""Rows of float32 in bfloat16, in blocks as large as a register for matrices.

Two numbers of a column, one below the other, become a pair of 4 bytes, and 16 columns of 32 rows a
block. The processor wants pairs of a column side by side on the left, and those of two rows on the
right.
"""

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, layout, threads
from haq.int8.llvm.amx import DEPTH, SIDE
from haq.int8.llvm.calls import Told
from haq.int8.llvm.pages import new_bytes
from haq.int8.llvm.words import (
    FLOAT,
    I8,
    I16,
    I32,
    POINTER,
    Code,
    Value,
    lanes_of,
    number,
    reduced,
    vector,
)

STEP = 2 * SIDE
"""Columns are a multiple of it. A block has as many rows."""

BLOCK = SIDE * DEPTH
"""Bytes of a block."""

_LINE = vector(I32, SIDE)

_PACK = (
    "floats",  # [T, N], rows `stride` apart; or columns, if these lie in one piece each
    "count",  # T
    "columns",  # N
    "stride",
    "blocks",  # room for the first block that is written
    "apart",  # bytes from the blocks of 16 columns to those of the next 16
    "beyond",  # a byte: 0, and 1 afterwards if bfloat16 does not hold all numbers
)


class Blocks:
    """Rows in bfloat16, as they are multiplied.

    Args:
        count: rows that there is room for.
        columns: a multiple of `STEP`.
        left: on which side they will be.
        rest: not the rows, but what their numbers are more than those in bfloat16. With it a
            number has 16 bits.

    Examples:
        >>> from haq.int8.llvm.packing import Blocks
        >>> Blocks(100, 64, left=True).steps
        4
    """

    def __init__(self, count: int, columns: int, *, left: bool, rest: bool = False) -> None:
        self._left, self._rest, self.steps = left, rest, -(-count // STEP)
        size = columns // SIDE * self.steps * BLOCK
        self._memory = new_bytes((size + DEPTH,), torch.uint8)
        self.address = -(-self._memory.data_ptr() // DEPTH) * DEPTH
        self._beyond = torch.zeros(1, dtype=torch.bool)

    @property
    def apart(self) -> int:
        """Bytes from the blocks of 16 columns to those of the next 16."""
        return self.steps * BLOCK

    @property
    def exact(self) -> bool:
        """Whether bfloat16 holds all that was written: there is no rest."""
        return not self._beyond

    def put(self, rows: Tensor, first: int = 0) -> None:
        """Write rows; up to a multiple of `STEP`, zeros behind them.

        Args:
            rows: float32 ``[T, N]`` on the CPU.
            first: where, a multiple of `STEP`.
        """
        at = self.address + first // STEP * BLOCK
        turned = rows.stride(0) == 1 and len(rows) % STEP == 0
        if not turned and rows.stride(1) != 1:
            rows = rows.contiguous()
        places = [rows.data_ptr(), *rows.shape, rows.stride(int(turned)), at, self.apart]
        places.append(self._beyond.data_ptr())
        compiler.run(_packing, (self._left, self._rest, turned), places)


def _packing(left: bool, rest: bool, turned: bool) -> ir.Module:
    """Threads take 16 columns in turn."""
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _PACK)
    lines = _Lines(code, call, rest)
    thread, count = threads.number_and_count(code)
    first, step = (code.mul(value, number(SIDE)) for value in (thread, count))
    with code.loop(first, call["columns"], step) as column:
        nth = code.sdiv(column, number(SIDE))
        blocks = code.address(call["blocks"], code.mul(nth, call["apart"]), I8)
        with code.loop(number(0), call["count"], STEP) as row:
            block = code.address(blocks, code.mul(row, number(BLOCK // STEP)), I8)
            read = lines.of_column if turned else lines.of_rows
            square = [read(row, index, column) for index in range(SIDE)]
            if left != turned:
                square = layout.transposed(code, square)
            for index, line in enumerate(square):
                code.store(line, code.address(block, number(index), _LINE))
    lines.tell()
    code.ret_void()
    return module


class _Lines:
    """Pairs, 16 of them side by side, as bfloat16 holds them; notes whether it holds them all."""

    def __init__(self, code: Code, call: Told, rest: bool) -> None:
        self._code, self._call, self._rest = code, call, rest
        self._beyond = code.variable(_LINE, number(0, _LINE))

    def of_rows(self, row: Value, index: int, column: Value) -> Value:
        """Of 16 columns what two rows have, the second one above; 0 behind the last."""
        code, call, halves = self._code, self._call, []
        for each in (2 * index, 2 * index + 1):
            here = code.add(row, number(each))
            exists = code.icmp_signed("<", here, call["count"])
            place = code.mul(code.select(exists, here, row), call["stride"])
            value = code.read(call["floats"], code.add(place, column), FLOAT, SIDE)
            halves.append(code.select(exists, self._half(value), number(0, _LINE)))
        return code.or_(code.lshr(halves[0], number(16, _LINE)), halves[1])

    def of_column(self, row: Value, index: int, column: Value) -> Value:
        """Of a column as many rows as a block has."""
        code, call = self._code, self._call
        start = code.add(code.mul(code.add(column, number(index)), call["stride"]), row)
        bits = self._half(code.read(call["floats"], start, FLOAT, STEP))
        halves = code.trunc(code.lshr(bits, number(16, bits.type)), vector(I16, STEP))
        return code.bitcast(halves, _LINE)

    def _half(self, values: Value) -> Value:
        """The bits of numbers in bfloat16, as float32; or of what these leave."""
        code, rounded = self._code, floats.rounded(self._code, "bfloat16", values)
        if self._rest:
            rounded = floats.rounded(code, "bfloat16", code.fsub(values, rounded))
        else:
            self._note(values)
        return code.bitcast(rounded, vector(I32, lanes_of(values.type)))

    def _note(self, values: Value) -> None:
        """Bits that are beyond a bfloat16."""
        code, lanes = self._code, lanes_of(values.type)
        low = code.trunc(code.bitcast(values, vector(I32, lanes)), vector(I16, lanes))
        low = code.bitcast(low, _LINE) if lanes == STEP else code.zext(low, _LINE)
        code.store(code.or_(code.value(self._beyond, _LINE), low), self._beyond)

    def tell(self) -> None:
        """Leave word if there were any."""
        code = self._code
        beyond = reduced(code, "or", code.value(self._beyond, _LINE))
        with code.if_then(code.icmp_signed("!=", beyond, number(0, I32))):
            code.store(number(1, I8), self._call["beyond"])

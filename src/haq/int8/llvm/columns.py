"""Some columns of a weight rounded one by one, each making good what those before it did wrong.

This is the part of `haq.quantization.rounding` that is no product of matrices. Rows of the weight
do not know of each other, so 64 of them are rounded at a time: their columns, moved into the cache
one after the other, are what registers hold.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8 import grid
from haq.int8.llvm import compiler, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.words import (
    FLOAT,
    I8,
    I32,
    POINTER,
    Code,
    Value,
    constant,
    multiply_add,
    number,
    parts,
    rounded,
    spread,
    vector,
)

_ROWS = 64

_CALL = (
    "weight",  # float32 [N, B], rows `stride` apart
    "rows",  # N
    "width",  # B
    "stride",
    "shares",  # float32 [B, B], transposed: row k is column k's
    "owed",  # float32 [B, N]
    "scale",  # float32 [N]
    "integers",  # int8 [N, B], rows `apart` apart
    "apart",
    "differences",  # float32 [B, N]
    "room",  # for each thread 5 * 64 * B bytes
)


def round_columns(
    weight: Tensor,
    scale: Tensor,
    shares: Tensor,
    owed: Tensor,
    integers: Tensor,
    differences: Tensor,
) -> None:
    """Round columns one by one, and write what becomes of them.

    Args:
        weight: float32 ``[N, B]``, a part of the columns of a contiguous matrix; unchanged.
        scale: float32 ``[N, 1]``, positive.
        shares: float32 ``[B, B]``, upper triangular: how much of a column's difference later ones
            make good.
        owed: float32 ``[B, N]``, contiguous: what columns before these left to make good.
        integers: int8 ``[N, B]``, a part of a contiguous matrix, to write to.
        differences: float32 ``[B, N]``, contiguous, to write to: weights less what they became.
    """
    rows, width = weight.shape
    shares, scale = shares.T.contiguous(), scale.contiguous()
    size = torch.get_num_threads() * 5 * _ROWS * width
    room = weight.new_empty(size, dtype=torch.uint8)
    places = [weight.data_ptr(), rows, width, weight.stride(0), shares.data_ptr()]
    places += [owed.data_ptr(), scale.data_ptr(), integers.data_ptr(), integers.stride(0)]
    places += [differences.data_ptr(), room.data_ptr()]
    compiler.run(_module, (), places)


def _module() -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    first, step = threads.number_and_count(code)
    room = code.mul(first, code.mul(call["width"], number(5 * _ROWS)))
    for lanes, start, stop in parts(code, call["rows"], _ROWS):
        here = code.add(start, code.mul(first, number(lanes)))
        with code.loop(here, stop, code.mul(step, number(lanes))) as row:
            _Strip(code, call, row, lanes, code.address(call["room"], room, I8)).write()
    code.ret_void()
    return module


class _Strip:
    """Some rows next to each other."""

    def __init__(self, code: Code, call: Told, row: Value, lanes: int, room: Value) -> None:
        self.code, self.call, self.row, self.lanes = code, call, row, lanes
        self.width = call["width"]
        # Column by column: weights, which become differences, and behind them the integers.
        self.values = room
        self.integers = code.address(room, code.mul(self.width, number(4 * _ROWS)), I8)

    def write(self) -> None:
        code = self.code
        weight = code.address(self.call["weight"], code.mul(self.row, self.call["stride"]), FLOAT)
        out = code.address(self.call["integers"], code.mul(self.row, self.call["apart"]), I8)
        with self._each_element() as (lane, column, place):
            source = code.add(code.mul(lane, self.call["stride"]), column)
            code.write(code.read(weight, source, FLOAT), self.values, place, FLOAT)
        scale = code.read(self.call["scale"], self.row, FLOAT, self.lanes)
        with code.loop(number(0), self.width) as column:
            self._round(column, scale)
        with self._each_element() as (lane, column, place):
            target = code.add(code.mul(lane, self.call["apart"]), column)
            code.write(code.read(self.integers, place, I8), out, target, I8)

    @contextlib.contextmanager
    def _each_element(self) -> Iterator[tuple[Value, Value, Value]]:
        """Row, column, and place in the room."""
        code, lanes = self.code, number(self.lanes)
        with code.loop(number(0), lanes) as lane, code.loop(number(0), self.width) as column:
            yield lane, column, code.add(code.mul(column, lanes), lane)

    def _round(self, column: Value, scale: Value) -> None:
        code, kind = self.code, vector(FLOAT, self.lanes)
        place = code.mul(column, number(self.lanes))
        weight = code.read(self.values, place, FLOAT, self.lanes)
        in_all = code.add(code.mul(column, self.call["rows"]), self.row)
        owed = code.variable(kind, code.read(self.call["owed"], in_all, FLOAT, self.lanes))
        shares = code.address(self.call["shares"], code.mul(column, self.width), FLOAT)
        with code.loop(number(0), column) as before:
            share = spread(code, code.read(shares, before, FLOAT), self.lanes)
            at = code.mul(before, number(self.lanes))
            difference = code.read(self.values, at, FLOAT, self.lanes)
            code.store(multiply_add(code, share, difference, code.value(owed, kind)), owed)
        target = code.fadd(weight, code.value(owed, kind))
        nearest = self._within(rounded(code, code.fdiv(target, scale)))
        integers = code.trunc(code.fptosi(nearest, vector(I32, self.lanes)), vector(I8, self.lanes))
        code.write(integers, self.integers, place, I8)
        difference = code.fsub(weight, code.fmul(nearest, scale))
        code.write(difference, self.values, place, FLOAT)
        code.write(difference, self.call["differences"], in_all, FLOAT)

    def _within(self, value: Value) -> Value:
        """Values beyond the grid's ends clamped to them."""
        code, most = self.code, constant(value.type, float(grid.QMAX))
        least = constant(value.type, -float(grid.QMAX))
        value = code.select(code.fcmp_ordered(">", value, most), most, value)
        return code.select(code.fcmp_ordered("<", value, least), least, value)

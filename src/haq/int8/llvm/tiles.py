"""Some rows of a weight times some tokens, each pair of them with registers of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots, ahead
from haq.int8.llvm.endings import Ending, Finish
from haq.int8.llvm.words import (
    I8,
    I32,
    I64,
    POINTER,
    Code,
    Value,
    number,
    prefetch,
    side_by_side,
    spread,
    suffix,
    sums_of_four,
    vector,
)

ROWS_AT_ONCE = 4
"""Rows of a tile whose sums are brought side by side in a few instructions."""

TOKENS_AT_ONCE = 4
"""Tokens that are multiplied with rows that are read one by one."""


@dataclass(frozen=True)
class Tile:
    """The size of a piece of a product.

    Attributes:
        rows: of the weight, one or `ROWS_AT_ONCE`.
        tokens: that they are multiplied with.
        steps: registers of each row that are multiplied before the loop comes back, each with sums
            of its own.
    """

    rows: int
    tokens: int
    steps: int = 1

    @property
    def name(self) -> str:
        return f"tile_{self.rows}_{self.tokens}"


def narrow(dots: Dots) -> list[Tile]:
    """For rows one by one: the fewer tokens, the more of a row at once."""
    sums, tokens = dots.registers // 4, range(1, TOKENS_AT_ONCE + 1)
    return [Tile(1, number, max(1, sums // number)) for number in tokens]


def wide(dots: Dots) -> list[Tile]:
    """For many tokens: the sums of the last one fill the registers."""
    most = 6 if dots.registers == 32 else 2
    return [Tile(ROWS_AT_ONCE, tokens) for tokens in range(1, most + 1)]


def define(module: object, name: str, tiles: Sequence[Tile], ending: Ending, dots: Dots) -> Value:
    """The function ``name(call, group, row, last row, token, last token)``: a rectangle.

    Args:
        module: to write it to.
        name: of the function.
        tiles: of one height, which the rows are a multiple of; of one token, two, and so on.
        ending: what becomes of the sums.
        dots: what they are sums of.
    """
    pieces = {tile.tokens: _define_tile(module, tile, ending, dots) for tile in tiles}
    code, most = Code(module, name, [POINTER, POINTER, *[I64] * 4]), max(pieces)
    *rows, token, last = code.parameters
    left = code.srem(code.sub(last, token), number(most))
    end = code.sub(last, left)
    code.call(pieces[most], [*rows, token, end])
    done = code.function.append_basic_block()
    switch = code.switch(left, done)
    for tokens, piece in pieces.items():
        block = code.function.append_basic_block()
        switch.add_case(number(tokens), block)
        code.position_at_end(block)
        code.call(piece, [*rows, end, last])
        code.branch(done)
    code.position_at_end(done)
    code.ret_void()
    return code.function


def _define_tile(module: object, tile: Tile, ending: Ending, dots: Dots) -> Value:
    """The function ``tile(call, group, row, last row, token, last token)``: whole tiles."""
    code = Code(module, tile.name, [POINTER, POINTER, *[I64] * 4])
    _Product(code, tile, ending, dots).write()
    code.ret_void()
    return code.function


class _Product:
    def __init__(self, code: Code, tile: Tile, ending: Ending, dots: Dots) -> None:
        self.code, self.tile, self.ending, self.dots = code, tile, ending, dots
        call, group, *self.edges = code.parameters
        self.call, self.group = Told(code, call, CALL), Told(code, group, GROUP)
        self.width, self.stride = self.call["width"], self.call["stride"]
        self.pairs = tile.rows * tile.tokens

    def write(self) -> None:
        row, last_row, token, last_token = self.edges
        with self.code.loop(row, last_row, self.tile.rows) as here:
            with self.code.loop(token, last_token, self.tile.tokens) as there:
                self._write_one(here, there)

    def _write_one(self, row: Value, token: Value) -> None:
        code = self.code
        rows = [code.add(row, number(r)) for r in range(self.tile.rows)]
        tokens = [code.add(token, number(t)) for t in range(self.tile.tokens)]
        weight, integers = self.group["weight"], self.call["integers"]
        weights = [code.address(weight, code.mul(r, self.width), I8) for r in rows]
        inputs = [code.address(integers, code.mul(t, self.stride), self.dots.token) for t in tokens]
        finish = Finish(code, self.ending, self.dots, self.call, self.group)
        sums = self._sums(weights, inputs, self.width)
        for total, there in zip(sums, tokens, strict=True):
            finish.write(total, row, there)

    def _sums(self, weights: Sequence[Value], inputs: Sequence[Value], width: Value) -> list[Value]:
        """The sums of integers of each token, int32, with all rows side by side."""
        code, kind = self.code, vector(I32, self.dots.sums)
        steps, lanes = self.tile.steps, self.dots.lanes
        zero = number(0, kind)
        sums = [[code.variable(kind, zero) for _ in range(steps)] for _ in range(self.pairs)]
        in_steps = code.and_(width, number(-lanes * steps))
        whole = code.and_(width, number(-lanes))
        with code.loop(number(0), in_steps, lanes * steps) as start:
            if self.tile.rows == 1:  # Beyond the end of a row there is the next one.
                here = code.address(weights[0], start, I8)
                prefetch(code, here, lanes * steps, ahead(self.dots))
            for step in range(steps):
                index = code.add(start, number(lanes * step))
                self._add(weights, inputs, index, [each[step] for each in sums])
        if steps > 1:
            with code.loop(in_steps, whole, lanes) as index:
                self._add(weights, inputs, index, [each[0] for each in sums])
        tokens, rows = self.tile.tokens, vector(I32, self.tile.rows)
        totals = [code.variable(rows, self._totals(sums[t::tokens])) for t in range(tokens)]
        with code.loop(whole, width) as index:
            self._add_single(weights, inputs, index, totals)
        return [code.value(total, rows) for total in totals]

    def _add(
        self, weights: Sequence[Value], inputs: Sequence[Value], index: Value, sums: Sequence[Value]
    ) -> None:
        code, dots = self.code, self.dots
        kind = vector(I32, dots.sums)
        rows = [dots.widened(code, code.read(each, index, I8, dots.lanes)) for each in weights]
        for t, each in enumerate(inputs):
            token = code.read(each, index, dots.token, dots.lanes)
            for r, row in enumerate(rows):
                place = sums[r * self.tile.tokens + t]
                code.store(dots.add(code, code.value(place, kind), row, token), place)

    def _add_single(
        self, weights: Sequence[Value], inputs: Sequence[Value], index: Value, sums: Sequence[Value]
    ) -> None:
        code, dots = self.code, self.dots
        rows = side_by_side(code, [code.read(each, index, I8) for each in weights])
        for each, place in zip(inputs, sums, strict=True):
            token = spread(code, code.read(each, index, dots.token), self.tile.rows)
            products = dots.product(code, rows, token)
            code.store(code.add(code.value(place, products.type), products), place)

    def _totals(self, sums: Sequence[Sequence[Value]]) -> Value:
        """Registers of sums, of each row, to one sum of each row."""
        code, kind = self.code, vector(I32, self.dots.sums)
        registers = []
        for first, *others in sums:
            register = code.value(first, kind)
            for other in others:
                register = code.add(register, code.value(other, kind))
            registers.append(register)
        if len(registers) == ROWS_AT_ONCE:
            return sums_of_four(code, *registers)
        return code.intrinsic(f"llvm.vector.reduce.add.{suffix(kind)}", I32, *registers)

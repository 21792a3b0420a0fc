"""Some rows of a weight times some tokens: the innermost loop of every product."""

from collections.abc import Sequence
from dataclasses import dataclass

from haq.int8.llvm import floats
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import ZERO_POINT, Dots, ahead
from haq.int8.llvm.words import (
    FLOAT,
    I8,
    I32,
    I64,
    POINTER,
    Code,
    Value,
    number,
    prefetch,
    suffix,
    vector,
)


@dataclass(frozen=True)
class Ending:
    """What becomes of the sums.

    Attributes:
        target: the type of the outputs, a name of torch's.
        scaled: whether they are multiplied by the tokens' scales.
        shifted: whether the tokens have zero points.
        biased: whether there is a bias.
    """

    target: str
    scaled: bool
    shifted: bool
    biased: bool


@dataclass(frozen=True)
class Tile:
    """The size of a piece of a product.

    Attributes:
        rows: of the weight.
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


def define(module: object, tile: Tile, ending: Ending, dots: Dots) -> Value:
    """The function ``tile(call, group, row, last row, token, last token)``.

    It multiplies the weight's rows from ``row`` to before the last with the tokens from ``token``
    to before the last: whole tiles.
    """
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
        self.pairs = [(r, t) for r in range(tile.rows) for t in range(tile.tokens)]

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
        sums = self._sums(weights, inputs, self.width)
        for (r, t), total in zip(self.pairs, sums, strict=True):
            self._finish(total, rows[r], tokens[t])

    def _sums(self, weights: Sequence[Value], inputs: Sequence[Value], width: Value) -> list[Value]:
        """The sums of integers of all `pairs`: int32."""
        code, kind = self.code, vector(I32, self.dots.sums)
        steps, lanes = self.tile.steps, self.dots.lanes
        sums = [[code.variable(kind, number(0, kind)) for _ in range(steps)] for _ in self.pairs]
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
        totals = [code.variable(I32, self._total(each)) for each in sums]
        with code.loop(whole, width) as index:
            self._add_single(weights, inputs, index, totals)
        return [code.value(total, I32) for total in totals]

    def _add(
        self, weights: Sequence[Value], inputs: Sequence[Value], index: Value, sums: Sequence[Value]
    ) -> None:
        code, dots = self.code, self.dots
        kind = vector(I32, dots.sums)
        rows = [code.read(each, index, I8, dots.lanes) for each in weights]
        for t, each in enumerate(inputs):
            token = code.read(each, index, dots.token, dots.lanes)
            for r, row in enumerate(rows):
                place = sums[r * self.tile.tokens + t]
                code.store(dots.add(code, code.value(place, kind), row, token), place)

    def _add_single(
        self, weights: Sequence[Value], inputs: Sequence[Value], index: Value, sums: Sequence[Value]
    ) -> None:
        code = self.code
        for (r, t), address in zip(self.pairs, sums, strict=True):
            weight = code.read(weights[r], index, I8)
            token = code.read(inputs[t], index, self.dots.token)
            product = self.dots.product(code, weight, token)
            code.store(code.add(code.value(address, I32), product), address)

    def _total(self, addresses: Sequence[Value]) -> Value:
        """Registers of sums to one sum."""
        code, kind = self.code, vector(I32, self.dots.sums)
        total = code.value(addresses[0], kind)
        for address in addresses[1:]:
            total = code.add(total, code.value(address, kind))
        return code.intrinsic(f"llvm.vector.reduce.add.{suffix(kind)}", I32, total)

    def _finish(self, total: Value, row: Value, token: Value) -> None:
        """The formula of `haq.int8.matmul`, in its order, and the output where it belongs."""
        code, ending = self.code, self.ending
        if self.dots.unsigned:
            surplus = code.read(self.group["sums"], row, I32)
            total = code.sub(total, code.mul(surplus, number(ZERO_POINT, I32)))
        result = code.sitofp(total, FLOAT)
        result = code.fmul(result, code.read(self.group["scale"], row, FLOAT))
        if ending.shifted:
            shift = code.read(self.call["shifts"], token, FLOAT)
            step = code.read(self.group["row_sums"], row, FLOAT)
            # Fused, as torch's `addcmul` is.
            result = code.intrinsic("llvm.fma.f32", FLOAT, shift, step, result)
        if ending.scaled:
            result = code.fmul(result, code.read(self.call["scales"], token, FLOAT))
        if ending.biased:
            result = code.fadd(result, code.read(self.group["bias"], row, FLOAT))
        place = code.add(code.mul(token, self.call["rows"]), row)
        floats.write(code, ending.target, result, self.call["out"], place)

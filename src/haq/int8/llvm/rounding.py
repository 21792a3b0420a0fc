"""A token on the grid: the arithmetic of `haq.int8.tokens.round_tokens`, bit for bit."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from haq.int8 import grid
from haq.int8.llvm import floats
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.exponential import silu
from haq.int8.llvm.words import (
    FLOAT,
    I32,
    I64,
    POINTER,
    Code,
    Value,
    constant,
    larger,
    number,
    parts,
    reduced,
    rounded,
    spread,
    vector,
)

_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class Rounding:
    """How tokens become integers.

    Attributes:
        source: the type of the tokens, a name of torch's.
        scaled: whether each token gets a scale; else they are integers already.
        asymmetric: whether each token gets a zero point.
        gated: whether a token is twice as long, and it is ``silu(a) * b`` of its halves that is
            rounded. That is written to the first one.
    """

    source: str
    scaled: bool
    asymmetric: bool
    gated: bool = False


def define(module: object, rounding: Rounding, dots: Dots, lanes: int) -> Value:
    """The function ``round_token(values, length, integers, scale, shift)``.

    Args:
        module: of LLVM, to write it to.
        rounding: how.
        dots: for whom the integers are.
        lanes: of float32 in a register.
    """
    code = Code(module, "round_token", [POINTER, I64, POINTER, POINTER, POINTER])
    values, length, integers, scale, shift = code.parameters
    if rounding.gated:
        _gate(code, rounding.source, values, length, lanes)
    writer = _Writer(code, rounding, dots, lanes, values, length, integers)
    if not rounding.scaled:
        writer.write(None, None)
    elif rounding.asymmetric:
        writer.write(*_with_zero_point(code, writer, scale, shift))
    else:
        largest = writer.largest()
        smallest = constant(FLOAT, grid.SMALLEST_SCALE * grid.QMAX)
        size = code.fdiv(_at_least(code, largest, smallest), constant(FLOAT, grid.QMAX))
        code.store(size, scale)
        writer.write(size, None)
    code.ret_void()
    return code.function


def _gate(code: Code, source: str, values: Value, length: Value, lanes: int) -> None:
    for size, start, stop in parts(code, length, lanes):
        with code.loop(start, stop, size) as index:
            a = floats.read(code, source, values, index, size)
            b = floats.read(code, source, values, code.add(index, length), size)
            floats.write(code, source, gate(code, source, a, b), values, index)


def gate(code: Code, kind: str, a: Value, b: Value) -> Value:
    """``silu(a) * b`` of float32, the first factor rounded to a type of torch's, as torch does."""
    return code.fmul(floats.rounded(code, kind, silu(code, a)), b)


def _with_zero_point(
    code: Code, writer: "_Writer", scale: Value, shift: Value
) -> tuple[Value, Value]:
    low, high = writer.range()
    steps = constant(FLOAT, _HIGHEST - _LOWEST)
    size = code.fdiv(code.fsub(high, low), steps)
    size = _at_least(code, size, constant(FLOAT, grid.SMALLEST_SCALE))
    # Comparisons let NaN pass by; what all tokens' bits say does not.
    largest = writer.largest()
    size = code.select(code.fcmp_unordered("uno", largest, largest), largest, size)
    zero = code.fsub(rounded(code, code.fdiv(low, size)), constant(FLOAT, _LOWEST))
    code.store(size, scale)
    code.store(zero, shift)
    return size, zero


class _Writer:
    """Passes over the values of one token."""

    def __init__(
        self,
        code: Code,
        rounding: Rounding,
        dots: Dots,
        lanes: int,
        values: Value,
        length: Value,
        integers: Value,
    ) -> None:
        self.code, self.rounding, self.dots, self.lanes = code, rounding, dots, lanes
        self.values, self.length, self.integers = values, length, integers

    @contextlib.contextmanager
    def _each(self, lanes: int, start: Value, stop: Value) -> Iterator[tuple[Value, Value]]:
        with self.code.loop(start, stop, lanes) as index:
            source = self.rounding.source
            yield index, floats.read(self.code, source, self.values, index, lanes)

    def _parts(self) -> list[tuple[int, Value, Value]]:
        return parts(self.code, self.length, self.lanes)

    def largest(self) -> Value:
        """The largest magnitude; NaN if there is one."""
        source, values = self.rounding.source, self.values
        return largest_magnitude(
            self.code,
            self._parts(),
            lambda index, lanes: floats.read(self.code, source, values, index, lanes),
        )

    def range(self) -> tuple[Value, Value]:
        """The smallest value and the largest one, zero included; NaN is passed by."""
        code, ends = self.code, []
        for order, reduction in (("<", "fmin"), (">", "fmax")):
            best = code.variable(FLOAT, constant(FLOAT, 0.0))
            for lanes, start, stop in self._parts():
                kind = vector(FLOAT, lanes)
                here = code.variable(kind, constant(kind, 0.0))
                with self._each(lanes, start, stop) as (_, value):
                    old = code.value(here, kind)
                    new = code.select(code.fcmp_ordered(order, value, old), value, old)
                    code.store(new, here)
                found = reduced(code, reduction, code.value(here, kind))
                old = code.value(best, FLOAT)
                code.store(code.select(code.fcmp_ordered(order, found, old), found, old), best)
            ends.append(code.value(best, FLOAT))
        return ends[0], ends[1]

    def write(self, scale: Value | None, shift: Value | None) -> None:
        """The integers of all values."""
        code = self.code
        for lanes, start, stop in self._parts():
            kind = vector(FLOAT, lanes)
            with self._each(lanes, start, stop) as (index, value):
                if scale is not None:
                    value = rounded(code, code.fdiv(value, spread(code, scale, lanes)))
                if shift is not None:
                    value = code.fsub(value, spread(code, shift, lanes))
                    most = constant(kind, _HIGHEST)
                    value = code.select(code.fcmp_ordered("<", most, value), most, value)
                integers = code.fptosi(value, vector(I32, lanes))
                stored = self.dots.of_token(code, integers)
                code.write(stored, self.integers, index, self.dots.token)


def _at_least(code: Code, value: Value, least: Value) -> Value:
    """NaN stays NaN."""
    return code.select(code.fcmp_ordered("<", value, least), least, value)


def largest_magnitude(
    code: Code,
    parts: Sequence[tuple[int, Value, Value]],
    read: Callable[[Value, int], Value],
) -> Value:
    """Of a row; NaN if there is one.

    Args:
        code: to write to.
        parts: of the row, as `haq.int8.llvm.words.parts` gives them.
        read: float32 of so many elements from an index on.
    """
    # As integers, the bits of magnitudes grow with them, and NaN's are above all.
    best = code.variable(I32, number(0, I32))
    for lanes, start, stop in parts:
        kind = vector(I32, lanes)
        here = code.variable(kind, number(0, kind))
        with code.loop(start, stop, lanes) as index:
            bits = code.and_(code.bitcast(read(index, lanes), kind), number(0x7FFFFFFF, kind))
            code.store(larger(code, code.value(here, kind), bits), here)
        all_lanes = reduced(code, "umax", code.value(here, kind))
        code.store(larger(code, code.value(best, I32), all_lanes), best)
    return code.bitcast(code.value(best, I32), FLOAT)

"""Rows of a weight times many tokens where the processor multiplies bytes four at a time.

A register has four bytes of as many tokens as it has sums (`haq.int8.llvm.layout`), and four bytes
of a row are multiplied with all of them. So the weight is read as it is, nothing is summed across a
register, and little is read for a product: in a tile three registers of tokens and four bytes of
each of its rows for three products with each row, whose sums stay in registers to the end.
"""

from llvmlite import ir

from haq.int8.llvm import layout
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Ending, Finish
from haq.int8.llvm.words import (
    I8,
    I32,
    I64,
    POINTER,
    Code,
    Value,
    constants,
    number,
    spread,
    vector,
)

AT_ONCE = 3
"""Registers of tokens in a tile."""

DEPTH = 64
"""Bytes that the length of a row is a multiple of."""

CHUNK, BLOCK = 96, 192
"""Rows of a weight, and tokens, that a thread multiplies before it asks for more: measured."""

# Bytes of a row that are multiplied before a loop comes back, by registers of tokens: one of them
# waits for the weight, and three fill the loop without that. Measured.
_STEPS = {1: DEPTH, 2: 32, 3: 4}


def rows_of(dots: Dots) -> int:
    """Rows of a tile, whose sums fit into the registers with all that they are made from."""
    return 8 if dots.registers == 32 else 4


def define(module: ir.Module, ending: Ending, dots: Dots) -> Value:
    """The function ``fours(call, group, row, last row, token, last token)``: a rectangle.

    There are a multiple of `rows_of` rows; the width of the weight is a multiple of `DEPTH`.
    """
    pieces = {wide: _define_piece(module, wide, ending, dots) for wide in _STEPS}
    code = Code(module, "fours", [POINTER, POINTER, *[I64] * 4])
    call, group, row, last_row, token, last = code.parameters
    start = code.and_(token, number(-dots.sums))  # The block that the first token is in.
    for wide, first, end in _in_sizes(code, dots, start, last):
        # The tokens of a tile stay in the cache while all rows come by.
        with code.loop(first, end, dots.sums * wide) as block:
            with code.loop(row, last_row, rows_of(dots)) as here:
                code.call(pieces[wide], [call, group, here, block, token, last])
    code.ret_void()
    return code.function


def _in_sizes(code: Code, dots: Dots, start: Value, stop: Value) -> list[tuple[int, Value, Value]]:
    """Registers of tokens, in threes, twos and ones: how many at once, from where, to where.

    Two and two are better than three and one, which has too few sums to be busy.
    """
    count = code.sdiv(code.add(code.sub(stop, start), number(dots.sums - 1)), number(dots.sums))
    rest = code.srem(count, number(AT_ONCE))
    twice_two = code.and_(
        code.icmp_signed("==", rest, number(1)), code.icmp_signed(">", count, number(AT_ONCE))
    )
    rest = code.select(twice_two, number(AT_ONCE + 1), rest)
    one = code.and_(rest, number(1))
    ends = [
        code.add(start, code.mul(code.sub(count, left), number(dots.sums)))
        for left in (rest, one, number(0))
    ]
    return list(zip((AT_ONCE, 2, 1), (start, *ends), ends, strict=False))


def _define_piece(module: ir.Module, wide: int, ending: Ending, dots: Dots) -> Value:
    """The function ``fours_N(call, group, row, block, token, last token)``: a tile.

    Args:
        module: to write it to.
        wide: N, registers of tokens, from ``block`` on, of which those before ``token`` and from
            the last one on are not wanted.
        ending: what becomes of the sums.
        dots: what they are sums of.
    """
    code = Code(module, f"fours_{wide}", [POINTER, POINTER, *[I64] * 4])
    base, of_group, row, block, token, last = code.parameters
    call, group = Told(code, base, CALL), Told(code, of_group, GROUP)
    tile = _Tile(code, wide, dots, call["stride"])
    tile.multiply(call["blocks"], block, group["weight"], row, call["width"])
    tile.finish(Finish(code, ending, dots, call, group), row, block, token, last)
    code.ret_void()
    return code.function


class _Tile:
    """Registers of tokens, rows, and their sums.

    Args:
        code: of the function that they are used in.
        wide: registers of tokens.
        dots: how they are multiplied.
        stride: columns that tokens have altogether.
    """

    def __init__(self, code: Code, wide: int, dots: Dots, stride: Value) -> None:
        self._code, self._wide, self._dots, self._stride = code, wide, dots, stride
        self._rows, self._kind = rows_of(dots), vector(I32, dots.sums)
        zero = number(0, self._kind)
        rows, registers = range(self._rows), range(wide)
        self._sums = {(r, t): code.variable(self._kind, zero) for r in rows for t in registers}

    def multiply(
        self, blocks: Value, block: Value, weight: Value, row: Value, width: Value
    ) -> None:
        """Add all products.

        Args:
            blocks: of tokens, their address.
            block: the first token.
            weight: its address.
            row: the first one.
            width: of it.
        """
        code = self._code
        columns = [self._after(block, self._dots.sums * t) for t in range(self._wide)]
        tokens = [code.address(blocks, code.mul(each, self._stride), I8) for each in columns]
        lines = [code.mul(self._after(row, r), width) for r in range(self._rows)]
        rows = [code.address(weight, each, I8) for each in lines]
        with code.loop(number(0), width, _STEPS[self._wide]) as start:
            for step in range(0, _STEPS[self._wide], layout.BYTES):
                self._add(tokens, rows, code.add(start, number(step)))

    def _add(self, tokens: list[Value], rows: list[Value], column: Value) -> None:
        """The products of four columns."""
        code, dots = self._code, self._dots
        place = code.mul(column, number(dots.sums))
        of_tokens = [code.read(each, place, I8, dots.lanes) for each in tokens]
        for r, row in enumerate(rows):
            four = code.load(code.address(row, column, I8), typ=I32, align=1)
            of_row = code.bitcast(spread(code, four, dots.sums), vector(I8, dots.lanes))
            for t, of_token in enumerate(of_tokens):
                sums = self._sums[r, t]
                total = dots.add(code, code.value(sums, self._kind), of_row, of_token)
                code.store(total, sums)

    def finish(self, finish: Finish, row: Value, block: Value, token: Value, last: Value) -> None:
        """Write the outputs of the tokens from ``token`` to before the last one."""
        code, sums, side = self._code, self._dots.sums, vector(I32, self._rows)
        place = code.room(self._rows * layout.BYTES * sums)
        for t in range(self._wide):
            self._lay_down(t, place)
            first = self._after(block, sums * t)
            start = code.select(code.icmp_signed("<", first, token), token, first)
            stop = code.smaller(last, self._after(first, sums))
            with code.loop(start, stop) as there:
                of_token = code.address(place, code.sub(there, first), side)
                finish.write(code.value(of_token, side), row, there)

    def _lay_down(self, t: int, place: Value) -> None:
        """The sums of a register of tokens: those of one token, of all rows, side by side."""
        code, rows = self._code, range(self._rows)
        registers = [code.value(self._sums[r, t], self._kind) for r in rows]
        for start in range(0, self._dots.sums, self._rows):
            some = constants(I32, range(start, start + self._rows))
            square = [code.shuffle_vector(each, each, some) for each in registers]
            for index, of_token in enumerate(layout.transposed(code, square)):
                there = code.address(place, number(start + index), vector(I32, self._rows))
                code.store(of_token, there)

    def _after(self, first: Value, distance: int) -> Value:
        return self._code.add(first, number(distance))

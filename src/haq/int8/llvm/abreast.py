"""Tokens side by side in registers, times rows of a weight: the innermost loop for many tokens.

A register has four bytes of as many tokens as it has sums (`haq.int8.llvm.layout`), and as many
bytes of a row are multiplied with all of them. So nothing is summed across a register, and little
is read for a product: three registers of tokens and four bytes of each of some rows, for three
products with each row. Sums stay in registers from beginning to end.
"""

from collections.abc import Sequence

from haq.int8.llvm import layout
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Finish
from haq.int8.llvm.words import (
    I8,
    I32,
    Code,
    Value,
    bytes_of,
    constants,
    number,
    spread,
    vector,
)

AT_ONCE = 3
"""Most registers of tokens in a tile."""

DEPTH = 64
"""Columns that the width of a weight is a multiple of."""

# Bytes of a row that are multiplied before a loop comes back: by those of an integer, for one, two
# and three registers of tokens. With more of them LLVM would have more in registers than there are.
_STEPS = {1: (64, 32, 4), 2: (64, 8, 4)}


def rows_of(dots: Dots) -> int:
    """Rows of a tile, whose sums fit into the registers with all that they are made from."""
    return 8 if dots.registers == 32 else 4


def in_sizes(code: Code, dots: Dots, start: Value, stop: Value) -> list[tuple[int, Value, Value]]:
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
    return list(zip((AT_ONCE, 2, 1), (start, *ends[:-1]), ends, strict=True))


class Tile:
    """Registers of tokens, rows, and their sums.

    Args:
        code: of the function that they are used in.
        wide: registers of tokens.
        dots: how they are multiplied.
    """

    def __init__(self, code: Code, wide: int, dots: Dots) -> None:
        self._code, self._wide, self._dots = code, wide, dots
        self._rows, self._kind = rows_of(dots), vector(I32, dots.sums)
        zero = number(0, self._kind)
        rows, registers = range(self._rows), range(wide)
        self.sums = {(r, t): code.variable(self._kind, zero) for r in rows for t in registers}

    def multiply(self, tokens: Sequence[Value], rows: Value, line: Value, width: Value) -> None:
        """Add all products.

        Args:
            tokens: the address of each register of them.
            rows: the address of the first row.
            line: bytes from one row to the next.
            width: bytes of a row.
        """
        code, steps = self._code, _STEPS[bytes_of(self._dots.token)][self._wide - 1]
        lines = [code.address(rows, code.mul(line, number(r)), I8) for r in range(self._rows)]
        with code.loop(number(0), width, steps) as start:
            for step in range(0, steps, layout.BYTES):
                self._add(tokens, lines, code.add(start, number(step)))

    def _add(self, tokens: Sequence[Value], rows: Sequence[Value], place: Value) -> None:
        """The products of four bytes."""
        code, register = self._code, vector(self._dots.token, self._dots.lanes)
        column = code.mul(place, number(self._dots.sums))
        of_tokens = [
            code.load(code.address(each, column, I8), typ=register, align=1) for each in tokens
        ]
        for r, row in enumerate(rows):
            four = code.load(code.address(row, place, I8), typ=I32, align=1)
            of_row = code.bitcast(spread(code, four, self._dots.sums), register)
            for t, of_token in enumerate(of_tokens):
                sums = self.sums[r, t]
                total = self._dots.add(code, code.value(sums, self._kind), of_row, of_token)
                code.store(total, sums)

    def finish(self, finish: Finish, row: Value, block: Value, token: Value, last: Value) -> None:
        """Write the outputs of the tokens from ``token`` to before the last one.

        Args:
            finish: what writes them.
            row: the first row.
            block: the first token of the tile.
            token: the first one that is wanted.
            last: the one after the last that is.
        """
        code, sums, side = self._code, self._dots.sums, vector(I32, self._rows)
        place = code.room(self._rows * layout.BYTES * sums)
        for t in range(self._wide):
            self._lay_down(t, place)
            first = code.add(block, number(sums * t))
            finish.write_wanted(place, side, row, first, sums, (token, last))

    def _lay_down(self, t: int, place: Value) -> None:
        """The sums of a register of tokens: those of one token, of all rows, side by side."""
        code, rows = self._code, range(self._rows)
        registers = [code.value(self.sums[r, t], self._kind) for r in rows]
        for start in range(0, self._dots.sums, self._rows):
            some = constants(I32, range(start, start + self._rows))
            square = [code.shuffle_vector(each, each, some) for each in registers]
            for index, of_token in enumerate(layout.transposed(code, square)):
                there = code.address(place, number(start + index), vector(I32, self._rows))
                code.store(of_token, there)

"""Rows of a weight times tokens where the processor multiplies small matrices.

They are read in blocks, each as large as a register for matrices. Of the tokens, four bytes of each
must lie side by side: they are laid out so when they have been rounded. Of a weight, which lies row
by row, each thread copies a strip of rows to blocks, as much as stays in a cache of its own, and
multiplies it with all tokens, while it asks for the next strip. Read where they lie, rows whose
distance is a power of 2 push each other out of the cache.
"""

from collections.abc import Mapping

from llvmlite import ir

from haq.int8.llvm import layout, threads
from haq.int8.llvm.amx import DEPTH, SIDE, registers
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
    ask_for,
    number,
    quotient_up,
    vector,
)

AT_ONCE = 2
"""Registers of rows that are multiplied with as many of tokens; their sums fill half of all."""

STEP = SIDE * AT_ONCE
"""Rows, and tokens, that they have together."""

MOST_TOKENS = 512
"""Tokens that a strip is multiplied with."""

# Columns of a strip. Where a weight has more, sums wait in memory for the next part.
_PART = 4096

# The size of a block, and how many there may be of tokens: those that begin within one end so, too.
_BLOCK, _MOST_BLOCKS = SIDE * DEPTH, MOST_TOKENS // SIDE + AT_ONCE

# Rows that are copied at the same time.
_STREAMS = 4


def room(rows: int, width: int) -> int:
    """Bytes that a thread needs for a strip of so many rows, and for its sums."""
    if width <= _PART:
        return rows * width
    return rows * _PART + rows // SIDE * _MOST_BLOCKS * _BLOCK


def define(module: ir.Module, ending: Ending, dots: Dots) -> Value:
    """The function ``matrices(call, group, row, last row, token, last token)``: a rectangle.

    There are a multiple of `SIDE` rows, at most as many as a thread takes at a time, and at most
    `MOST_TOKENS`; the width of the weight is a multiple of `DEPTH`.
    """
    sizes = (AT_ONCE, 1)
    pieces = {(r, t): _define_piece(module, r, t, ending, dots) for r in sizes for t in sizes}
    code = Code(module, "matrices", [POINTER, POINTER, *[I64] * 4])
    base, group, row, last_row, token, last = code.parameters
    call, weight = Told(code, base, CALL), Told(code, group, GROUP)["weight"]
    width = call["width"]
    thread, _ = threads.number_and_count(code)
    strip = code.address(call["strips"], code.mul(thread, call["of_thread"]), I8)
    all_sums = code.address(strip, code.mul(call["chunk"], number(_PART)), I8)
    start = code.and_(token, number(-SIDE))  # The block that the first token is in.
    rows = code.address(weight, code.mul(row, width), I8)
    ahead = _Ahead(code, call, rows, row, code.sub(last, start))
    with code.loop(number(0), width, _PART) as left:
        depth = code.smaller(number(_PART), code.sub(width, left))
        _copy(code, code.address(rows, left, I8), code.sub(last_row, row), width, depth, strip)
        for wide, block, last_block in _in_sizes(code, start, last):
            with code.loop(block, last_block, SIDE * wide) as there:
                column = code.sub(there, start)
                for tall, top, bottom in _in_sizes(code, row, last_row):
                    with code.loop(top, bottom, SIDE * tall) as here:
                        line = code.sub(here, row)
                        block_of_sums = code.add(code.mul(line, number(_MOST_BLOCKS)), column)
                        sums = code.mul(block_of_sums, number(DEPTH))
                        places = [
                            code.address(strip, code.mul(line, depth), I8),
                            code.address(all_sums, sums, I8),
                        ]
                        arguments = [*places, left, depth, here, there, token, last]
                        arguments += ahead.part(line, column, tall, left)
                        code.call(pieces[tall, wide], [base, group, *arguments])
    code.ret_void()
    return code.function


def _in_sizes(code: Code, start: Value, stop: Value) -> list[tuple[int, Value, Value]]:
    """Most in twos, what is left in ones: size, from where, to where."""
    twos = code.and_(code.sub(stop, start), number(-STEP))
    end = code.add(start, twos)
    return [(AT_ONCE, start, end), (1, end, stop)]


def _copy(code: Code, rows: Value, count: Value, width: Value, depth: Value, strip: Value) -> None:
    """The first ``depth`` bytes of rows of a weight to blocks, a few rows at a time."""
    line = vector(I8, DEPTH)
    with code.loop(number(0), count, _STREAMS) as row:
        block = code.mul(code.and_(row, number(-SIDE)), depth)
        within = code.mul(code.and_(row, number(SIDE - 1)), number(DEPTH))
        there = code.address(strip, code.add(block, within), I8)
        here = code.address(rows, code.mul(row, width), I8)
        with code.loop(number(0), depth, DEPTH) as start:
            place = code.address(there, code.mul(start, number(SIDE)), I8)
            for stream in range(_STREAMS):
                source = code.add(start, code.mul(width, number(stream)))
                code.store(
                    code.load(code.address(here, source, I8), typ=line, align=1),
                    code.address(place, number(stream), line),
                )


class _Ahead:
    """The strip that this thread takes next, if all threads are as fast as each other.

    With few tokens the memory is busy all the time, and nothing is asked for.

    Args:
        code: to write to.
        call: what the kernel is told.
        rows: the address of this strip's rows.
        row: the first of them.
        tokens: that they are multiplied with, from the first one of a block on.
    """

    def __init__(self, code: Code, call: Told, rows: Value, row: Value, tokens: Value) -> None:
        self._code, self._width = code, call["width"]
        _, count = threads.number_and_count(code)
        distance = code.mul(call["chunk"], count)
        end = code.add(row, code.add(distance, call["chunk"]))
        exists = code.icmp_signed("<=", end, call["rows"])
        self._rows = code.address(rows, code.mul(distance, self._width), I8)
        blocks = quotient_up(code, tokens, number(STEP))
        several = code.icmp_signed(">", blocks, number(1))
        share = quotient_up(code, number(STEP), blocks)  # There is one token at least.
        self._share = code.select(code.and_(exists, several), share, number(0))

    def part(self, row: Value, token: Value, tall: int, left: Value) -> list[Value]:
        """The address of rows to ask for, and how many, while a piece is multiplied.

        Args:
            row: the first one of the piece, in its strip.
            token: likewise, of the tokens.
            tall: registers of its rows: all blocks of tokens share these rows of the next strip.
            left: the first column.
        """
        code = self._code
        before = code.mul(code.sdiv(token, number(STEP)), self._share)
        place = code.add(code.mul(code.add(row, before), self._width), left)
        count = code.smaller(self._share, code.sub(number(SIDE * tall), before))
        return [code.address(self._rows, place, I8), count]


def _define_piece(module: ir.Module, tall: int, wide: int, ending: Ending, dots: Dots) -> Value:
    """The function ``piece(call, group, strip, sums, left, depth, row, block, token, last token,
    ahead, lines)``.

    Args:
        module: to write it to.
        tall: registers of rows, from ``row`` on; ``depth`` columns of them, from ``left`` on, are
            in the strip.
        wide: registers of tokens, from ``block`` on, of which those before ``token`` and from the
            last one on are not wanted.
        ending: what becomes of the sums, of all columns.
        dots: what they are sums of.

    ``lines`` rows from ``ahead`` on are asked for.
    """
    code = Code(module, f"piece_{tall}_{wide}", [*[POINTER] * 4, *[I64] * 6, POINTER, I64])
    base, of_group, strip, sums, left, depth, row, block, token, last, *ahead = code.parameters
    call, group = Told(code, base, CALL), Told(code, of_group, GROUP)
    square = _Square(code, tall, wide, dots)
    places = {
        (r, t): code.address(sums, number((r * _MOST_BLOCKS + t) * _BLOCK), I8)
        for r, t in square.sums
    }
    column = code.add(code.mul(block, call["stride"]), code.mul(left, number(SIDE)))
    blocks = code.address(call["blocks"], column, I8)
    square.begin(code.icmp_signed("==", left, number(0)), places)
    square.multiply((strip, depth), (blocks, call["stride"]), (*ahead, call["width"]))
    is_last = code.icmp_signed("==", code.add(left, depth), call["width"])
    with code.if_else(is_last) as (then, otherwise):
        with then:
            finish = Finish(code, ending, dots, call, group)
            square.finish(finish, row, block, token, last)
        with otherwise:
            square.keep(places)
    code.ret_void()
    return code.function


class _Square:
    """Registers of rows, of tokens, and of their sums.

    Args:
        code: of the function that they are used in.
        tall: registers of rows.
        wide: registers of tokens.
        dots: how they are multiplied.
    """

    def __init__(self, code: Code, tall: int, wide: int, dots: Dots) -> None:
        self._code, self._matrices = code, registers(code, dots)
        self.sums = {(r, t): r * wide + t for r in range(tall) for t in range(wide)}
        self._rows = [AT_ONCE**2 + r for r in range(tall)]
        self._tokens = [AT_ONCE**2 + AT_ONCE + t for t in range(wide)]

    def begin(self, new: Value, places: Mapping[tuple[int, int], Value]) -> None:
        """With 0 if this is new, with the sums that were kept if it is not."""
        with self._code.if_else(new) as (then, otherwise):
            with then:
                for register in self.sums.values():
                    self._matrices.clear(register)
            with otherwise:
                for index, register in self.sums.items():
                    self._matrices.load(register, places[index])

    def multiply(
        self,
        strip: tuple[Value, Value],
        tokens: tuple[Value, Value],
        ahead: tuple[Value, Value, Value],
    ) -> None:
        """Add all products.

        Args:
            strip: where the blocks of the rows begin, and how many columns there are.
            tokens: where those of the tokens do, and how many columns they have altogether.
            ahead: where rows begin that are asked for meanwhile, how many, and of what width.
        """
        code, (rows, count, width) = self._code, ahead
        sides = (self._rows, *strip), (self._tokens, *tokens)
        with code.loop(number(0), strip[1], DEPTH) as start:
            with code.loop(number(0), count) as row:
                ask_for(code, code.address(rows, code.add(start, code.mul(row, width)), I8))
            for registers_of_side, base, length in sides:
                for i, register in enumerate(registers_of_side):
                    place = code.mul(code.add(start, code.mul(length, number(i))), number(SIDE))
                    self._matrices.load(register, code.address(base, place, I8))
            for (r, t), register in self.sums.items():
                self._matrices.add(register, self._rows[r], self._tokens[t])

    def keep(self, places: Mapping[tuple[int, int], Value]) -> None:
        """The sums, for the next columns."""
        for index, register in self.sums.items():
            self._matrices.store(register, places[index])

    def finish(self, finish: Finish, row: Value, block: Value, token: Value, last: Value) -> None:
        """Write the outputs of the tokens from ``token`` to before the last one."""
        code, totals = self._code, vector(I32, SIDE)
        place = code.room(_BLOCK)
        for (r, t), register in self.sums.items():
            self._matrices.store(register, place)
            rows = [code.value(code.address(place, number(i), totals), totals) for i in range(SIDE)]
            for index, of_token in enumerate(layout.transposed(code, rows)):
                code.store(of_token, code.address(place, number(index), totals))
            first_row, first = (code.add(a, number(SIDE * i)) for a, i in ((row, r), (block, t)))
            finish.write_wanted(place, totals, first_row, first, SIDE, (token, last))

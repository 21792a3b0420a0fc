"""Rows of a weight times many tokens where the processor multiplies int16 in pairs.

Tokens lie side by side in registers (`haq.int8.llvm.abreast`). Of a weight, each thread widens some
columns of some rows to int16, as much as stays in a cache of its own, and multiplies that with all
tokens; the sums wait in memory for the next columns. A few dozen tokens are not worth it: they are
multiplied with the weight as it comes.
"""

from collections.abc import Mapping

from llvmlite import ir

from haq.int8.llvm import layout, threads, tiles
from haq.int8.llvm.abreast import AT_ONCE, DEPTH, Tile, in_sizes, rows_of
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Ending, Finish
from haq.int8.llvm.words import I8, I32, I64, POINTER, Code, Value, bytes_of, number, vector

CHUNK, BLOCK = 48, 192
"""Rows of a weight, and tokens, that a thread multiplies before it asks for more: measured."""

# As many tokens are worth it: measured.
_FEWEST = 48

# Columns, and bytes from one widened row to the next: an odd number of lines of the cache, because
# those whose distance is a power of 2 push each other out of it.
_PART, _LINE = 2048, 2 * 2048 + 64


def room(dots: Dots, rows: int) -> int:
    """Bytes that a thread needs for so many rows and their sums."""
    return rows * (_LINE + _line_of_sums(dots))


def _line_of_sums(dots: Dots) -> int:
    """Bytes of a row's sums: tokens that begin and end within a register have one more."""
    return (BLOCK + dots.sums) * layout.BYTES


def define(module: ir.Module, ending: Ending, dots: Dots) -> Value:
    """The function ``pairs(call, group, row, last row, token, last token)``: a rectangle.

    There are a multiple of `haq.int8.llvm.tiles.ROWS_AT_ONCE` rows.
    """
    few = tiles.define(module, "wide", tiles.wide(dots), ending, dots)
    many = _define_many(module, ending, dots)
    code = Code(module, "pairs", [POINTER, POINTER, *[I64] * 4])
    base, group, row, last_row, token, last = code.parameters
    enough = code.icmp_signed(">=", code.sub(last, token), number(_FEWEST))
    beyond = code.and_(Told(code, base, CALL)["width"], number(DEPTH - 1))
    fits = code.and_(enough, code.icmp_signed("==", beyond, number(0)))
    rest = code.srem(code.sub(last_row, row), number(rows_of(dots)))
    end = code.select(fits, code.sub(last_row, rest), row)
    code.call(many, [base, group, row, end, token, last])
    code.call(few, [base, group, end, last_row, token, last])
    code.ret_void()
    return code.function


def _define_many(module: ir.Module, ending: Ending, dots: Dots) -> Value:
    """The function ``many(call, group, row, last row, token, last token)``.

    There are a multiple of `rows_of` rows, at most `CHUNK`, and at most `BLOCK` tokens; the width
    of the weight is a multiple of `DEPTH`.
    """
    sizes = range(1, AT_ONCE + 1)
    pieces = {wide: _define_piece(module, wide, ending, dots) for wide in sizes}
    code = Code(module, "many", [POINTER, POINTER, *[I64] * 4])
    base, group, row, last_row, token, last = code.parameters
    call, weight = Told(code, base, CALL), Told(code, group, GROUP)["weight"]
    width, part = call["width"], number(_PART)
    thread, _ = threads.number_and_count(code)
    strip = code.address(call["strips"], code.mul(thread, call["of_thread"]), I8)
    all_sums = code.address(strip, code.mul(call["chunk"], number(_LINE)), I8)
    start = code.and_(token, number(-dots.sums))  # The register that the first token is in.
    rows = code.address(weight, code.mul(row, width), I8)
    with code.loop(number(0), width, part) as left:
        depth = code.smaller(part, code.sub(width, left))
        here = code.address(rows, left, I8)
        _widen(code, dots, here, width, code.sub(last_row, row), depth, strip)
        for wide, first, end in in_sizes(code, dots, start, last):
            with code.loop(first, end, dots.sums * wide) as block:
                with code.loop(row, last_row, rows_of(dots)) as here:
                    before, column = code.sub(here, row), code.sub(block, start)
                    lines = code.address(strip, code.mul(before, number(_LINE)), I8)
                    line = code.mul(before, number(_line_of_sums(dots)))
                    place = code.add(line, code.mul(column, number(layout.BYTES)))
                    places = [lines, code.address(all_sums, place, I8)]
                    arguments = [*places, left, depth, here, block, token, last]
                    code.call(pieces[wide], [base, group, *arguments])
    code.ret_void()
    return code.function


def _widen(
    code: Code, dots: Dots, rows: Value, width: Value, count: Value, depth: Value, strip: Value
) -> None:
    """The first ``depth`` columns of rows of a weight."""
    with code.loop(number(0), count) as row:
        here = code.address(rows, code.mul(row, width), I8)
        there = code.address(strip, code.mul(row, number(_LINE)), I8)
        with code.loop(number(0), depth, dots.lanes) as start:
            wide = dots.widened(code, code.read(here, start, I8, dots.lanes))
            code.write(wide, there, start, dots.token)


def _define_piece(module: ir.Module, wide: int, ending: Ending, dots: Dots) -> Value:
    """The function ``pairs_N(call, group, rows, sums, left, depth, row, block, token, last)``.

    Args:
        module: to write it to.
        wide: N, registers of tokens, from ``block`` on, of which those before ``token`` and from
            the ``last`` one on are not wanted. They are multiplied with ``depth`` columns of rows,
            which are those of the weight from ``row`` and from column ``left`` on.
        ending: what becomes of the sums, of all columns.
        dots: what they are sums of.
    """
    code = Code(module, f"pairs_{wide}", [*[POINTER] * 4, *[I64] * 6])
    base, of_group, rows, sums, left, depth, row, block, token, last = code.parameters
    call, group = Told(code, base, CALL), Told(code, of_group, GROUP)
    size = bytes_of(dots.token)
    firsts = [code.add(block, number(dots.sums * t)) for t in range(wide)]
    columns = code.mul(left, number(dots.sums))
    tokens = [
        code.address(call["blocks"], code.add(code.mul(each, call["stride"]), columns), dots.token)
        for each in firsts
    ]
    tile = Tile(code, wide, dots)
    kept = _Kept(code, dots, tile.sums, sums)
    with code.if_then(code.icmp_signed(">", left, number(0))):
        kept.load()
    tile.multiply(tokens, rows, number(_LINE), code.mul(depth, number(size)))
    is_last = code.icmp_signed("==", code.add(left, depth), call["width"])
    with code.if_else(is_last) as (then, otherwise):
        with then:
            tile.finish(Finish(code, ending, dots, call, group), row, block, token, last)
        with otherwise:
            kept.store()
    code.ret_void()
    return code.function


class _Kept:
    """The sums of a tile in memory."""

    def __init__(
        self, code: Code, dots: Dots, sums: Mapping[tuple[int, int], Value], base: Value
    ) -> None:
        self._code, self._kind, size = code, vector(I32, dots.sums), dots.sums * layout.BYTES
        self._pairs = [
            (place, code.address(base, number(r * _line_of_sums(dots) + t * size), I8))
            for (r, t), place in sums.items()
        ]

    def load(self) -> None:
        for place, kept in self._pairs:
            self._code.store(self._code.load(kept, typ=self._kind, align=layout.BYTES), place)

    def store(self) -> None:
        for place, kept in self._pairs:
            self._code.store(self._code.value(place, self._kind), kept, align=layout.BYTES)

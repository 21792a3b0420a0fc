"""Rows of a weight times tokens where the processor multiplies small matrices.

They are read in blocks, each as large as a register for matrices. Of the tokens, four bytes of each
must lie side by side: they are laid out so when they have been rounded. Of a weight, which lies row
by row, each thread copies a strip of rows to blocks, and multiplies it with all tokens. Read where
they lie, rows whose distance is a power of 2 push each other out of the cache.
"""

from collections.abc import Mapping

from llvmlite import ir

from haq.int8.llvm import threads
from haq.int8.llvm.amx import DEPTH, SIDE, Matrices, registers
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Ending, Finish
from haq.int8.llvm.words import I8, I32, I64, POINTER, Code, Value, constants, number, vector

AT_ONCE = 2
"""Registers of rows that are multiplied with as many of tokens; their sums fill half of all."""

STRIP = SIDE * AT_ONCE
"""Rows that a thread copies."""

# Rows that are copied at the same time.
_STREAMS = 4


def define_layout(module: ir.Module) -> Value:
    """The function ``lay_out(integers, stride, blocks)``: `SIDE` tokens, from rows to blocks."""
    code = Code(module, "lay_out", [POINTER, I64, POINTER])
    integers, stride, blocks = code.parameters
    fours = vector(I32, SIDE)
    with code.loop(number(0), stride, DEPTH) as start:
        places = [code.add(start, code.mul(stride, number(token))) for token in range(SIDE)]
        rows = [code.load(code.address(integers, p, I8), typ=fours, align=DEPTH) for p in places]
        block = code.address(blocks, code.mul(start, number(SIDE)), I8)
        for index, row in enumerate(_transposed(code, rows)):
            code.store(row, code.address(block, number(index), fours))
    code.ret_void()
    return code.function


def define(module: ir.Module, ending: Ending, dots: Dots) -> Value:
    """The function ``matrices(call, group, row, last row, token, last token)``: a rectangle.

    There are a multiple of `SIDE` rows; the width of the weight is a multiple of `DEPTH`.
    """
    sizes = (AT_ONCE, 1)
    pieces = {(r, t): _define_piece(module, r, t, ending, dots) for r in sizes for t in sizes}
    code = Code(module, "matrices", [POINTER, POINTER, *[I64] * 4])
    base, group, row, last_row, token, last = code.parameters
    call, weight = Told(code, base, CALL), Told(code, group, GROUP)["weight"]
    width = call["width"]
    thread, _ = threads.number_and_count(code)
    strip = code.address(call["strips"], code.mul(thread, code.mul(width, number(STRIP))), I8)
    start = code.and_(token, number(-SIDE))  # The block that the first token is in.
    for tall, top, bottom in _in_sizes(code, row, last_row):
        with code.loop(top, bottom, SIDE * tall) as here:
            rows = code.address(weight, code.mul(here, width), I8)
            _copy(code, rows, width, strip, SIDE * tall)
            for wide, left, right in _in_sizes(code, start, last):
                with code.loop(left, right, SIDE * wide) as there:
                    code.call(pieces[tall, wide], [base, group, strip, here, there, token, last])
    code.ret_void()
    return code.function


def _in_sizes(code: Code, start: Value, stop: Value) -> list[tuple[int, Value, Value]]:
    """Most in twos, what is left in ones: size, from where, to where."""
    twos = code.and_(code.sub(stop, start), number(-SIDE * AT_ONCE))
    end = code.add(start, twos)
    return [(AT_ONCE, start, end), (1, end, stop)]


def _copy(code: Code, rows: Value, width: Value, strip: Value, count: int) -> None:
    """Rows of a weight to blocks, a few at a time."""
    line = vector(I8, DEPTH)
    with code.loop(number(0), number(count), _STREAMS) as row:
        block = code.mul(code.and_(row, number(-SIDE)), width)
        within = code.mul(code.and_(row, number(SIDE - 1)), number(DEPTH))
        there = code.address(strip, code.add(block, within), I8)
        here = code.address(rows, code.mul(row, width), I8)
        with code.loop(number(0), width, DEPTH) as start:
            place = code.address(there, code.mul(start, number(SIDE)), I8)
            for stream in range(_STREAMS):
                source = code.add(start, code.mul(width, number(stream)))
                code.store(
                    code.load(code.address(here, source, I8), typ=line, align=1),
                    code.address(place, number(stream), line),
                )


def _define_piece(module: ir.Module, tall: int, wide: int, ending: Ending, dots: Dots) -> Value:
    """The function ``piece(call, group, strip, row, block, token, last token)``.

    Args:
        module: to write it to.
        tall: registers of rows, from ``row`` on.
        wide: registers of tokens, from ``block`` on, of which those before ``token`` and from the
            last one on are not wanted.
        ending: what becomes of the sums.
        dots: what they are sums of.
    """
    code = Code(module, f"piece_{tall}_{wide}", [POINTER, POINTER, POINTER, *[I64] * 4])
    base, of_group, strip, row, block, token, last = code.parameters
    call, group = Told(code, base, CALL), Told(code, of_group, GROUP)
    matrices = registers(code, dots)
    sums = {(r, t): r * wide + t for r in range(tall) for t in range(wide)}
    blocks = code.address(call["blocks"], code.mul(block, call["stride"]), I8)
    _multiply(code, matrices, sums, (strip, blocks), call["width"])
    finish = Finish(code, ending, dots, call, group)
    room, totals = code.room(SIDE * DEPTH), vector(I32, SIDE)
    for (r, t), register in sums.items():
        matrices.store(register, room)
        rows = [code.value(code.address(room, number(i), totals), totals) for i in range(SIDE)]
        for index, of_token in enumerate(_transposed(code, rows)):
            code.store(of_token, code.address(room, number(index), totals))
        first_row, first = (code.add(a, number(SIDE * i)) for a, i in ((row, r), (block, t)))
        start = code.select(code.icmp_signed("<", first, token), token, first)
        stop = code.smaller(last, code.add(first, number(SIDE)))
        with code.loop(start, stop) as there:
            place = code.address(room, code.sub(there, first), totals)
            finish.write(code.value(place, totals), first_row, there)
    code.ret_void()
    return code.function


def _multiply(
    code: Code,
    matrices: Matrices,
    sums: Mapping[tuple[int, int], int],
    blocks: tuple[Value, Value],
    width: Value,
) -> None:
    """All products of some registers of rows with some of tokens.

    Args:
        code: to write to.
        matrices: the registers.
        sums: which of them has the sums of which rows and tokens.
        blocks: where those of the rows begin, and those of the tokens.
        width: in bytes.
    """
    counts = [1 + max(index) for index in zip(*sums, strict=True)]
    sides = [[AT_ONCE * (2 + side) + i for i in range(n)] for side, n in enumerate(counts)]
    for register in sums.values():
        matrices.clear(register)
    with code.loop(number(0), width, DEPTH) as start:
        for side, base in zip(sides, blocks, strict=True):
            for i, register in enumerate(side):
                place = code.mul(code.add(start, code.mul(width, number(i))), number(SIDE))
                matrices.load(register, code.address(base, place, I8))
        for (r, t), register in sums.items():
            matrices.add(register, sides[0][r], sides[1][t])


def _transposed(code: Code, rows: list[Value]) -> list[Value]:
    """Columns of a square: halves change places, then halves of these, and so on."""
    rows, lanes = list(rows), range(len(rows))
    distance = 1
    while distance < len(rows):
        for a in lanes:
            b = a + distance
            if a & distance:
                continue
            upper = [j - distance + len(rows) if j & distance else j for j in lanes]
            lower = [j + len(rows) if j & distance else j + distance for j in lanes]
            rows[a], rows[b] = (
                code.shuffle_vector(rows[a], rows[b], constants(I32, order))
                for order in (upper, lower)
            )
        distance *= 2
    return rows

"""A whole product as one function: tokens to integers, integers to sums, sums to outputs.

Threads take pieces of the work as they finish others, so that a slower one takes fewer. All wait
for each other twice, after the rounding and at the end: one that does not run at all holds all up.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llvmlite import ir

from haq.int8.llvm import amx, floats, matrices, rounding, threads, tiles
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Ending
from haq.int8.llvm.rounding import Rounding
from haq.int8.llvm.tiles import Tile
from haq.int8.llvm.words import FLOAT, I64, POINTER, Code, Type, Value, number


@dataclass(frozen=True)
class Kind:
    """Which product.

    Attributes:
        source: the type of the tokens, a name of torch's.
        target: that of the outputs.
        scaled: whether tokens get scales; else they are integers, and sums get the weight's only.
        asymmetric: whether tokens get zero points.
        biased: whether there is a bias.
    """

    source: str
    target: str
    scaled: bool = True
    asymmetric: bool = False
    biased: bool = False


def module_of(kind: Kind, dots: Dots) -> ir.Module:
    """LLVM's text of a product: the function ``run(call)``, to be called by every thread."""
    module = ir.Module()
    rounds = Rounding(kind.source, kind.scaled, kind.asymmetric)
    round_token = rounding.define(module, rounds, dots, lanes=dots.sums)
    ending = Ending(kind.target, kind.scaled, kind.asymmetric, kind.biased)
    sizes = [*_narrow(dots), *_wide(dots)]
    pieces = {(tile.rows, tile.tokens): tiles.define(module, tile, ending, dots) for tile in sizes}
    squares = matrices.define(module, ending, dots) if dots.matrices else None
    item = _define_item(module, pieces, squares, few_of(dots))
    layout = matrices.define_layout(module) if dots.matrices else None
    _define_run(module, round_token, layout, item, dots, floats.STORED[kind.source])
    return module


def tile_of(dots: Dots) -> tuple[int, int]:
    """Rows and tokens of the tile for many tokens: its sums fill the registers."""
    return tiles.ROWS_AT_ONCE, 6 if dots.registers == 32 else 2


def few_of(dots: Dots) -> int:
    """As many tokens wait for a weight's rows, which are then read one by one, in order.

    Where matrices are multiplied, 16 tokens take as long as two: only one waits.
    """
    return 1 if dots.matrices else 4


def _narrow(dots: Dots) -> list[Tile]:
    """For rows one by one: the fewer tokens, the more of a row at once."""
    most = max(few_of(dots), tile_of(dots)[1])
    sums = dots.registers // 4
    return [Tile(1, tokens, max(1, sums // tokens)) for tokens in range(1, most + 1)]


def _wide(dots: Dots) -> list[Tile]:
    rows, most = tile_of(dots)
    return [Tile(rows, tokens) for tokens in range(1, most + 1)]


def _define_item(
    module: ir.Module,
    pieces: Mapping[tuple[int, int], Value],
    squares: Value | None,
    few_tokens: int,
) -> Value:
    """The function ``item(call, group, row, last row, token, last token)``: any rectangle."""
    code = Code(module, "item", [POINTER, POINTER, *[I64] * 4])
    call, group, row, last_row, token, last = code.parameters
    height, width = max(pieces)
    told = Told(code, group, GROUP)
    few = code.icmp_signed("<=", code.sub(told["last"], told["first"]), number(few_tokens))
    if squares:
        rest = code.and_(Told(code, call, CALL)["width"], number(amx.DEPTH - 1))
        fits = code.and_(code.not_(few), code.icmp_signed("==", rest, number(0)))
        row = code.select(fits, _whole(code, row, last_row, amx.SIDE), row)
        code.call(squares, [call, group, code.parameters[2], row, token, last])
    rows = code.select(few, row, _whole(code, row, last_row, height))
    tokens = code.select(few, token, _whole(code, token, last, width))
    left = code.sub(last, tokens)
    for tall, *sides in ((height, row, rows), (1, rows, last_row)):
        code.call(pieces[tall, width], [call, group, *sides, token, tokens])
        _call_one(code, pieces, tall, left, [call, group, *sides, tokens, last])
    code.ret_void()
    return code.function


def _whole(code: Code, start: Value, stop: Value, step: int) -> Value:
    """Where whole steps from ``start`` on end."""
    return code.sub(stop, code.srem(code.sub(stop, start), number(step)))


def _call_one(
    code: Code,
    pieces: Mapping[tuple[int, int], Value],
    height: int,
    tokens: Value,
    arguments: list[Value],
) -> None:
    """Call the tile for so many tokens, if there are any."""
    end = code.function.append_basic_block()
    switch = code.switch(tokens, end)
    for (rows, width), tile in pieces.items():
        if rows == height:
            block = code.function.append_basic_block()
            switch.add_case(number(width), block)
            code.position_at_end(block)
            code.call(tile, arguments)
            code.branch(end)
    code.position_at_end(end)


def _define_run(
    module: ir.Module,
    round_token: Value,
    layout: Value | None,
    item: Value,
    dots: Dots,
    source: Type,
) -> None:
    code = Code(module, "run", [POINTER], internal=False)
    (base,) = code.parameters
    call = Told(code, base, CALL)
    _round_all(code, call, round_token, layout, dots, source)
    if dots.matrices:
        amx.configure(code, dots)
    threads.wait_for_all(code)
    taken = code.variable(I64, threads.take(code, call.place("counter"), number(1)))
    before = code.variable(I64, number(0))  # Items of the groups before.
    with code.loop(number(0), call["groups"]) as index:
        place = code.add(number(len(CALL)), code.mul(index, number(len(GROUP))))
        group = code.address(base, place, I64)
        _work_on(code, call, base, group, item, taken, before)
    if dots.matrices:
        amx.release(code, dots)
    code.ret_void()


def _round_all(
    code: Code, call: Told, round_token: Value, layout: Value | None, dots: Dots, source: Type
) -> None:
    """Every thread rounds some tokens, one at a time or all those of a block."""
    width, stride, count = call["width"], call["stride"], call["count"]
    first, step = threads.number_and_count(code)
    tokens, integers, scales, shifts = (
        call[name] for name in ("tokens", "integers", "scales", "shifts")
    )
    many = code.icmp_signed(">", call["block"], number(few_of(dots)))
    size = code.select(many, number(amx.SIDE if layout else 1), number(1))
    with code.loop(code.mul(first, size), count, code.mul(step, size)) as start:
        with code.loop(start, code.smaller(count, code.add(start, size))) as token:
            values = code.address(tokens, code.mul(token, width), source)
            places = code.address(integers, code.mul(token, stride), dots.token)
            of_token = [code.address(part, token, FLOAT) for part in (scales, shifts)]
            code.call(round_token, [values, width, places, *of_token])
        if layout:
            with code.if_then(many):
                place = code.mul(start, stride)
                rows, blocks = (
                    code.address(base, place, dots.token) for base in (integers, call["blocks"])
                )
                code.call(layout, [rows, stride, blocks])


def _work_on(
    code: Code, call: Told, base: Value, group: Value, item: Value, taken: Value, before: Value
) -> None:
    """Every piece of this group that this thread gets."""
    told = Told(code, group, GROUP)
    first, last, rows = told["first"], told["last"], call["rows"]
    chunk, block = call["chunk"], call["block"]
    chunks = _quotient_up(code, rows, chunk)
    start = code.value(before, I64)
    items = code.mul(chunks, _quotient_up(code, code.sub(last, first), block))
    end = code.add(start, items)
    with code.repeat(lambda: code.icmp_signed("<", code.value(taken, I64), end)):
        here = code.sub(code.value(taken, I64), start)
        row = code.mul(code.srem(here, chunks), chunk)
        token = code.add(first, code.mul(code.sdiv(here, chunks), block))
        to_row = code.smaller(rows, code.add(row, chunk))
        to_token = code.smaller(last, code.add(token, block))
        code.call(item, [base, group, row, to_row, token, to_token])
        code.store(threads.take(code, call.place("counter"), number(1)), taken)
    code.store(end, before)


def _quotient_up(code: Code, a: Value, b: Value) -> Value:
    return code.sdiv(code.add(a, code.sub(b, number(1))), b)

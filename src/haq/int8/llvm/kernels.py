"""A whole product as one function: tokens to integers, integers to sums, sums to outputs.

Threads take pieces of the work as they finish others, so that a slower one takes fewer. All wait
for each other after the rounding, after many tokens are laid out, and at the end: one that does not
run at all holds all up.
"""

from dataclasses import dataclass
from typing import NamedTuple

from llvmlite import ir

from haq.int8.llvm import (
    abreast,
    amx,
    floats,
    fours,
    layout,
    matrices,
    pairs,
    rounding,
    threads,
    tiles,
)
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Ending
from haq.int8.llvm.rounding import Rounding
from haq.int8.llvm.words import (
    FLOAT,
    I8,
    I64,
    POINTER,
    Code,
    Value,
    bytes_of,
    number,
    quotient_up,
)

# Of the tokens that wait for rows: they share the cache with these.
_WAITING_BYTES = 2**15


@dataclass(frozen=True)
class Kind:
    """Which product.

    Attributes:
        source: the type of the tokens, a name of torch's.
        target: that of the outputs.
        scaled: whether tokens get scales; else they are integers, and sums get the weight's only.
        asymmetric: whether tokens get zero points.
        biased: whether there is a bias.
        gated: whether what is rounded is a gate of tokens that are twice as long.
    """

    source: str
    target: str
    scaled: bool = True
    asymmetric: bool = False
    biased: bool = False
    gated: bool = False


def module_of(kind: Kind, dots: Dots) -> ir.Module:
    """LLVM's text of a product: the function ``run(call)``, to be called by every thread."""
    module = ir.Module()
    rounds = Rounding(kind.source, kind.scaled, kind.asymmetric, kind.gated)
    round_token = rounding.define(module, rounds, dots, lanes=dots.sums)
    ending = Ending(kind.target, kind.scaled, kind.asymmetric, kind.biased)
    by_row = tiles.define(module, "by_row", tiles.narrow(dots), ending, dots)
    item = _define_item(module, by_row, _define_many(module, ending, dots))
    lay_out = layout.define(module, dots)
    _define_run(module, round_token, lay_out, item, dots, rounds)
    return module


def few_of(dots: Dots, width: int) -> int:
    """As many tokens wait for a weight's rows, which are then read one by one, in order.

    They are so few that they stay in the cache next to the core, if not less than one. Where
    matrices are multiplied it pays, too, though 16 tokens take as long as five.

    Args:
        dots: the processor's.
        width: of the weight.
    """
    return max(1, min(tiles.TOKENS_AT_ONCE, _WAITING_BYTES // (width * bytes_of(dots.token))))


class _Many(NamedTuple):
    """How many tokens are multiplied.

    Attributes:
        function: ``(call, group, row, last row, token, last token)``, for a rectangle.
        rows: of the weight, that it wants a multiple of.
        columns: the same, a power of 2.
    """

    function: Value
    rows: int
    columns: int


def _define_many(module: ir.Module, ending: Ending, dots: Dots) -> _Many:
    if dots.matrices:
        return _Many(matrices.define(module, ending, dots), amx.SIDE, amx.DEPTH)
    if dots.unsigned:
        return _Many(fours.define(module, ending, dots), abreast.rows_of(dots), abreast.DEPTH)
    return _Many(pairs.define(module, ending, dots), tiles.ROWS_AT_ONCE, 1)


def _define_item(module: ir.Module, by_row: Value, many: _Many) -> Value:
    """The function ``item(call, group, row, last row, token, last token)``: any rectangle."""
    code = Code(module, "item", [POINTER, POINTER, *[I64] * 4])
    call, group, row, last_row, token, last = code.parameters
    told, of_group = Told(code, call, CALL), Told(code, group, GROUP)
    count = code.sub(of_group["last"], of_group["first"])
    enough = code.icmp_signed(">", count, told["few"])
    beyond = code.and_(told["width"], number(many.columns - 1))
    fits = code.and_(enough, code.icmp_signed("==", beyond, number(0)))
    beyond = code.srem(code.sub(last_row, row), number(many.rows))
    rest = code.select(fits, code.sub(last_row, beyond), row)
    code.call(many.function, [call, group, row, rest, token, last])
    code.call(by_row, [call, group, rest, last_row, token, last])
    code.ret_void()
    return code.function


def _define_run(
    module: ir.Module,
    round_token: Value,
    lay_out: Value,
    item: Value,
    dots: Dots,
    rounds: Rounding,
) -> None:
    code = Code(module, "run", [POINTER], internal=False)
    (base,) = code.parameters
    call = Told(code, base, CALL)
    _round_all(code, call, round_token, dots, rounds)
    _lay_out_all(code, call, lay_out, dots)
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


def _round_all(code: Code, call: Told, round_token: Value, dots: Dots, rounds: Rounding) -> None:
    """Every thread rounds some tokens."""
    source, long = floats.STORED[rounds.source], number(2 if rounds.gated else 1)
    first, step = threads.number_and_count(code)
    tokens, integers, scales, shifts = (
        call[name] for name in ("tokens", "integers", "scales", "shifts")
    )
    with code.loop(first, call["count"], step) as token:
        place = code.mul(token, code.mul(call["width"], long))
        values = code.address(tokens, place, source)
        places = code.address(integers, code.mul(token, call["stride"]), dots.token)
        of_token = [code.address(part, token, FLOAT) for part in (scales, shifts)]
        code.call(round_token, [values, call["width"], places, *of_token])


def _lay_out_all(code: Code, call: Told, lay_out: Value, dots: Dots) -> None:
    """Every thread lays out some columns of all tokens, if there are many."""
    with code.if_then(code.icmp_signed(">", call["block"], call["few"])):
        threads.wait_for_all(code)
        thread, count = threads.number_and_count(code)
        register, size = layout.BYTES * dots.sums, bytes_of(dots.token)
        stride = code.mul(call["stride"], number(size))
        registers = code.sdiv(stride, number(register))
        start, stop = (
            code.mul(code.sdiv(code.mul(registers, each), count), number(register))
            for each in (thread, code.add(thread, number(1)))
        )
        with code.loop(number(0), call["count"], dots.sums) as token:
            place = code.mul(token, stride)
            rows, blocks = (code.address(call[of], place, I8) for of in ("integers", "blocks"))
            code.call(lay_out, [rows, stride, blocks, start, stop])


def _work_on(
    code: Code, call: Told, base: Value, group: Value, item: Value, taken: Value, before: Value
) -> None:
    """Every piece of this group that this thread gets."""
    told = Told(code, group, GROUP)
    first, last, rows = told["first"], told["last"], call["rows"]
    chunk, block = call["chunk"], call["block"]
    chunks = quotient_up(code, rows, chunk)
    start = code.value(before, I64)
    items = code.mul(chunks, quotient_up(code, code.sub(last, first), block))
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

"""Rows of a weight times many tokens where the processor multiplies bytes four at a time.

Tokens lie side by side in registers (`haq.int8.llvm.abreast`), and the weight is read as it is.
"""

from llvmlite import ir

from haq.int8.llvm.abreast import AT_ONCE, Tile, in_sizes, rows_of
from haq.int8.llvm.calls import CALL, GROUP, Told
from haq.int8.llvm.dots import Dots
from haq.int8.llvm.endings import Ending, Finish
from haq.int8.llvm.words import I8, I64, POINTER, Code, Value, number

CHUNK, BLOCK = 96, 192
"""Rows of a weight, and tokens, that a thread multiplies before it asks for more: measured."""


def define(module: ir.Module, ending: Ending, dots: Dots) -> Value:
    """The function ``fours(call, group, row, last row, token, last token)``: a rectangle.

    There are a multiple of `rows_of` rows; the width of the weight is a multiple of
    `haq.int8.llvm.abreast.DEPTH`.
    """
    sizes = range(1, AT_ONCE + 1)
    pieces = {wide: _define_piece(module, wide, ending, dots) for wide in sizes}
    code = Code(module, "fours", [POINTER, POINTER, *[I64] * 4])
    call, group, row, last_row, token, last = code.parameters
    start = code.and_(token, number(-dots.sums))  # The register that the first token is in.
    for wide, first, end in in_sizes(code, dots, start, last):
        # The tokens of a tile stay in the cache while all rows come by.
        with code.loop(first, end, dots.sums * wide) as block:
            with code.loop(row, last_row, rows_of(dots)) as here:
                code.call(pieces[wide], [call, group, here, block, token, last])
    code.ret_void()
    return code.function


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
    width, stride = call["width"], call["stride"]
    firsts = [code.add(block, number(dots.sums * t)) for t in range(wide)]
    tokens = [code.address(call["blocks"], code.mul(each, stride), I8) for each in firsts]
    rows = code.address(group["weight"], code.mul(row, width), I8)
    tile = Tile(code, wide, dots)
    tile.multiply(tokens, rows, width, width)
    tile.finish(Finish(code, ending, dots, call, group), row, block, token, last)
    code.ret_void()
    return code.function

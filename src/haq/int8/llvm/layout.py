"""The integers of many tokens in blocks: four bytes of each of them lie side by side.

A register then has four bytes of as many tokens as it has sums. Multiplied with as many columns of
a weight's row, each token has a sum in a place of its own, from beginning to end.
"""

from collections.abc import Sequence

from llvmlite import ir

from haq.int8.llvm.dots import Dots
from haq.int8.llvm.words import I8, I32, I64, POINTER, Code, Value, constants, number, vector

BYTES = 4
"""Of a token, that go into one sum of an instruction: four integers, or two of int16."""


def define(module: ir.Module, dots: Dots) -> Value:
    """The function ``lay_out(integers, stride, blocks, start, stop)``.

    It takes as many tokens as a register has sums, which are ``stride`` bytes from each other, and
    of their bytes those from ``start`` to before ``stop``: all three multiples of a register's.
    """
    code = Code(module, "lay_out", [POINTER, I64, POINTER, I64, I64])
    integers, stride, blocks, first, last = code.parameters
    fours, register = vector(I32, dots.sums), BYTES * dots.sums
    with code.loop(first, last, register) as start:
        places = [code.add(start, code.mul(stride, number(token))) for token in range(dots.sums)]
        rows = [code.load(code.address(integers, p, I8), typ=fours, align=register) for p in places]
        block = code.address(blocks, code.mul(start, number(dots.sums)), I8)
        for index, row in enumerate(transposed(code, rows)):
            code.store(row, code.address(block, number(index), fours))
    code.ret_void()
    return code.function


def transposed(code: Code, rows: Sequence[Value]) -> list[Value]:
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

"""AMX: registers of 16 times 64 bytes, and the instructions that multiply two of them.

They multiply 16 rows of 64 bytes with 64 bytes of 16 tokens, and add that to 16 by 16 sums: of
products of bytes, or of those of bfloat16 in float32.
"""

import ctypes
import functools
import sys
from contextlib import AbstractContextManager
from typing import Protocol

from haq.int8.llvm.words import I8, I32, VOID, Code, Value, constants, number, spread, vector

SIDE = 16
"""Rows of a weight, and tokens, that one register has."""

DEPTH = 64
"""Bytes of each of them."""

REGISTERS = 8

_TOGETHER = number(DEPTH)

# Linux gives the registers, 8 KiB of a thread's state, to processes that ask for them.
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def permitted() -> bool:
    """Whether the system lets this process use the registers of a processor that has them."""
    if sys.platform != "linux":
        return False
    request = map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST, _TILE_DATA))
    answer: int = ctypes.CDLL(None).syscall(*request)
    return answer == 0


class Products(Protocol):
    """What registers are multiplied by."""

    @property
    def of_matrices(self) -> str:
        """The instruction, as LLVM calls it."""

    @property
    def instruction(self) -> bool:
        """Whether the processor has it; else what it does is written out."""

    def add(self, code: Code, sums: Value, weight: Value, token: Value) -> Value:
        """``sums``, 32 bits each, and the products of four bytes of a row with those of tokens."""


class Matrices(Protocol):
    """Registers for matrices, by their numbers, in a function that is being written."""

    def clear(self, register: int) -> None:
        """All sums to 0."""

    def load(self, register: int, address: Value, stride: Value = _TOGETHER) -> None:
        """A block: `SIDE` times `DEPTH` bytes, which are ``stride`` from each other."""

    def add(self, sums: int, weight: int, tokens: int) -> None:
        """To ``sums`` the products of a register of a weight with one of tokens."""

    def store(self, register: int, address: Value, stride: Value = _TOGETHER) -> None:
        """The sums, row by row."""


class Registers:
    """The processor's."""

    def __init__(self, code: Code, products: Products) -> None:
        self._code, self._products = code, products

    def clear(self, register: int) -> None:
        self._do("tilezero", number(register, I8))

    def load(self, register: int, address: Value, stride: Value = _TOGETHER) -> None:
        self._do("tileloadd64", number(register, I8), address, stride)

    def add(self, sums: int, weight: int, tokens: int) -> None:
        registers = (number(register, I8) for register in (sums, weight, tokens))
        self._do(self._products.of_matrices, *registers)

    def store(self, register: int, address: Value, stride: Value = _TOGETHER) -> None:
        self._do("tilestored64", number(register, I8), address, stride)

    def _do(self, name: str, *arguments: Value) -> None:
        self._code.intrinsic(f"llvm.x86.{name}", VOID, *arguments)


class WrittenOut:
    """What they do, written out, for tests on processors that have none."""

    def __init__(self, code: Code, products: Products) -> None:
        self._code, self._products = code, products
        self._row, self._sums = vector(I8, DEPTH), vector(I32, SIDE)
        self._places = [code.room(SIDE * DEPTH) for _ in range(REGISTERS)]

    def clear(self, register: int) -> None:
        with self._each() as row:
            self._code.store(number(0, self._sums), self._at(register, row))

    def load(self, register: int, address: Value, stride: Value = _TOGETHER) -> None:
        with self._each() as row:
            place = self._code.address(address, self._code.mul(row, stride), I8)
            line = self._code.load(place, typ=self._row, align=1)
            self._code.store(line, self._at(register, row))

    def add(self, sums: int, weight: int, tokens: int) -> None:
        code = self._code
        with self._each() as row:
            with self._each() as four:
                of_row = code.read(self._at(weight, row), four, I32)
                of_tokens = code.value(self._at(tokens, four), self._row)
                total = code.value(self._at(sums, row), self._sums)
                rows = code.bitcast(spread(code, of_row, SIDE), self._row)
                code.store(self._products.add(code, total, rows, of_tokens), self._at(sums, row))

    def store(self, register: int, address: Value, stride: Value = _TOGETHER) -> None:
        with self._each() as row:
            value = self._code.value(self._at(register, row), self._sums)
            place = self._code.address(address, self._code.mul(row, stride), I8)
            self._code.store(value, place, align=1)

    def _each(self) -> AbstractContextManager[Value]:
        return self._code.loop(number(0), number(SIDE))

    def _at(self, register: int, row: Value) -> Value:
        return self._code.address(self._places[register], row, self._row)


def configure(code: Code, products: Products) -> None:
    """What a thread does before its first product: say how large its registers are."""
    if not products.instruction:
        return
    # Palette 1; the bytes of a row from 16 on, two bytes each, and the rows from 48 on.
    widths = [DEPTH, 0] * REGISTERS + [0, 0] * REGISTERS
    rows = [SIDE] * REGISTERS + [0] * REGISTERS
    place = code.room(DEPTH)
    code.store(constants(I8, [1, *[0] * 15, *widths, *rows]), place)
    code.intrinsic("llvm.x86.ldtilecfg", VOID, place)


def release(code: Code, products: Products) -> None:
    """What it does after its last one, for nobody to save them any more."""
    if products.instruction:
        code.intrinsic("llvm.x86.tilerelease", VOID)


def registers(code: Code, products: Products) -> Matrices:
    """Those of a function that is being written."""
    return Registers(code, products) if products.instruction else WrittenOut(code, products)

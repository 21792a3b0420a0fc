"""AMX: registers of 16 times 64 bytes, and the instruction that multiplies two of them.

It multiplies 16 rows of 64 bytes with 64 bytes of 16 tokens, and adds that to 16 by 16 sums.
"""

import ctypes
import functools
import sys
from contextlib import AbstractContextManager
from typing import Protocol

from haq.int8.llvm.dots import Dots
from haq.int8.llvm.words import I8, I32, VOID, Code, Value, constants, number, spread, vector

SIDE = 16
"""Rows of a weight, and tokens, that one register has."""

DEPTH = 64
"""Bytes of each of them."""

REGISTERS = 8

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


class Matrices(Protocol):
    """Registers for matrices, by their numbers, in a function that is being written."""

    def clear(self, register: int) -> None:
        """All sums to 0."""

    def load(self, register: int, address: Value) -> None:
        """A block: `SIDE` times `DEPTH` bytes."""

    def add(self, sums: int, weight: int, tokens: int) -> None:
        """To ``sums`` the products of a register of a weight with one of tokens."""

    def store(self, register: int, address: Value) -> None:
        """The sums, row by row."""


class Registers:
    """The processor's."""

    def __init__(self, code: Code) -> None:
        self._code = code

    def clear(self, register: int) -> None:
        self._do("tilezero", number(register, I8))

    def load(self, register: int, address: Value) -> None:
        self._do("tileloadd64", number(register, I8), address, number(DEPTH))

    def add(self, sums: int, weight: int, tokens: int) -> None:
        self._do("tdpbsud", *(number(register, I8) for register in (sums, weight, tokens)))

    def store(self, register: int, address: Value) -> None:
        self._do("tilestored64", number(register, I8), address, number(DEPTH))

    def _do(self, name: str, *arguments: Value) -> None:
        self._code.intrinsic(f"llvm.x86.{name}", VOID, *arguments)


class WrittenOut:
    """What they do, written out, for tests on processors that have none."""

    def __init__(self, code: Code, dots: Dots) -> None:
        self._code, self._dots = code, dots
        self._row, self._sums = vector(I8, DEPTH), vector(I32, SIDE)
        self._places = [code.room(SIDE * DEPTH) for _ in range(REGISTERS)]

    def clear(self, register: int) -> None:
        with self._each() as row:
            self._code.store(number(0, self._sums), self._at(register, row))

    def load(self, register: int, address: Value) -> None:
        with self._each() as row:
            place = self._code.address(address, row, self._row)
            self._code.store(self._code.value(place, self._row), self._at(register, row))

    def add(self, sums: int, weight: int, tokens: int) -> None:
        code = self._code
        with self._each() as row:
            with self._each() as four:
                of_row = code.read(self._at(weight, row), four, I32)
                of_tokens = code.value(self._at(tokens, four), self._row)
                total = code.value(self._at(sums, row), self._sums)
                rows = code.bitcast(spread(code, of_row, SIDE), self._row)
                code.store(self._dots.add(code, total, rows, of_tokens), self._at(sums, row))

    def store(self, register: int, address: Value) -> None:
        with self._each() as row:
            value = self._code.value(self._at(register, row), self._sums)
            self._code.store(value, self._code.address(address, row, self._sums))

    def _each(self) -> AbstractContextManager[Value]:
        return self._code.loop(number(0), number(SIDE))

    def _at(self, register: int, row: Value) -> Value:
        return self._code.address(self._places[register], row, self._row)


def configure(code: Code, dots: Dots) -> None:
    """What a thread does before its first product: say how large its registers are."""
    if not dots.instruction:
        return
    # Palette 1; the bytes of a row from 16 on, two bytes each, and the rows from 48 on.
    widths = [DEPTH, 0] * REGISTERS + [0, 0] * REGISTERS
    rows = [SIDE] * REGISTERS + [0] * REGISTERS
    place = code.room(DEPTH)
    code.store(constants(I8, [1, *[0] * 15, *widths, *rows]), place)
    code.intrinsic("llvm.x86.ldtilecfg", VOID, place)


def release(code: Code, dots: Dots) -> None:
    """What it does after its last one, for nobody to save them any more."""
    if dots.instruction:
        code.intrinsic("llvm.x86.tilerelease", VOID)


def registers(code: Code, dots: Dots) -> Matrices:
    """Those of a function that is being written."""
    return Registers(code) if dots.instruction else WrittenOut(code, dots)

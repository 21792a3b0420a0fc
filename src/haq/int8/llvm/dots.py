"""The processor's instructions for sums of products of bytes, and who may use which.

x86 has had one for pairs of int16 from the beginning, which cannot overflow where both come from
int8: its weight is widened as it is loaded. Processors with VNNI multiply four bytes at a time,
those of the token unsigned: they are given q + 128, and 128 times the sum of the weight's row is
taken off the sum, modulo 2^32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from haq.int8.llvm.words import I8, I16, I32, Code, Type, Value, constants, lanes_of, number, vector

ZERO_POINT = 128
"""What is added to a token's integers where they must be unsigned."""


class Dots(Protocol):
    """Dot products of weights and tokens, a register at a time."""

    @property
    def token(self) -> Type:
        """The type of a token's integers in memory."""

    @property
    def unsigned(self) -> bool:
        """Whether tokens are stored with `ZERO_POINT` added."""

    @property
    def lanes(self) -> int:
        """Weights that one step multiplies."""

    @property
    def sums(self) -> int:
        """Sums that one register holds."""

    @property
    def registers(self) -> int:
        """Vector registers of the processor."""

    @property
    def instruction(self) -> bool:
        """Whether the processor has the instructions; else what they do is written out."""

    @property
    def matrices(self) -> bool:
        """Whether it also multiplies small matrices: `haq.int8.llvm.amx`."""

    @property
    def of_matrices(self) -> str:
        """The instruction that does, as LLVM calls it."""

    def of_token(self, code: Code, integers: Value) -> Value:
        """A token's integers as they are stored, from int32, one or a vector of them."""

    def widened(self, code: Code, weight: Value) -> Value:
        """A register of weights as they are multiplied: of the type of a token's integers."""

    def add(self, code: Code, sums: Value, weight: Value, token: Value) -> Value:
        """``sums`` and the products of a register of widened weights with one of a token."""

    def product(self, code: Code, weight: Value, token: Value) -> Value:
        """Of single integers, or each of a vector with its own: int32."""


@dataclass(frozen=True)
class PairsOfWords:
    """Sums of two products of int16.

    Attributes:
        width: of a register, in bits.
    """

    width: int
    unsigned = False
    token = I16
    instruction = True
    matrices = False
    of_matrices = ""

    @property
    def lanes(self) -> int:
        return self.width // 16

    @property
    def sums(self) -> int:
        return self.width // 32

    @property
    def registers(self) -> int:
        return 32 if self.width == 512 else 16

    def of_token(self, code: Code, integers: Value) -> Value:
        return code.trunc(integers, vector(I16, lanes_of(integers.type)))

    def widened(self, code: Code, weight: Value) -> Value:
        return code.sext(weight, vector(I16, self.lanes))

    def add(self, code: Code, sums: Value, weight: Value, token: Value) -> Value:
        name = {256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}[self.width]
        return code.add(sums, code.intrinsic(name, sums.type, weight, token))

    def product(self, code: Code, weight: Value, token: Value) -> Value:
        wide = vector(I32, lanes_of(weight.type))
        return code.mul(code.sext(weight, wide), code.sext(token, wide))


@dataclass(frozen=True)
class FoursOfBytes:
    """Sums of four products of an unsigned byte and a signed one: VNNI.

    Attributes:
        width: of a register, in bits.
        registers: how many there are.
        instruction: whether the processor has it; else what it does is written out, for tests.
        matrices: whether it also multiplies small matrices of these bytes: AMX.
    """

    width: int
    registers: int
    instruction: bool = True
    matrices: bool = False
    unsigned = True
    token = I8
    of_matrices = "tdpbsud"

    @property
    def lanes(self) -> int:
        return self.width // 8

    @property
    def sums(self) -> int:
        return self.width // 32

    def of_token(self, code: Code, integers: Value) -> Value:
        lanes = lanes_of(integers.type)
        wide = vector(I32, lanes)
        return code.trunc(code.add(integers, number(ZERO_POINT, wide)), vector(I8, lanes))

    def widened(self, code: Code, weight: Value) -> Value:
        return weight

    def add(self, code: Code, sums: Value, weight: Value, token: Value) -> Value:
        if not self.instruction:
            return _written_out(code, sums, weight, token)
        name = f"llvm.x86.avx512.vpdpbusd.{self.width}"
        return code.intrinsic(name, sums.type, sums, token, weight)

    def product(self, code: Code, weight: Value, token: Value) -> Value:
        wide = vector(I32, lanes_of(weight.type))
        return code.mul(code.sext(weight, wide), code.zext(token, wide))


def ahead(dots: Dots) -> int:
    """How far ahead of its use memory is asked for, in bytes; 0 for not at all.

    Zen 3 reads a row faster when it is asked for it, and so do Intel's processors with AMX, the
    more so the farther ahead, up to a page; Zen 4 slower.
    """
    if dots.matrices:
        return 4096
    return 0 if dots.registers == 32 else 1024


def _written_out(code: Code, sums: Value, weight: Value, token: Value) -> Value:
    """What ``vpdpbusd`` does."""
    wide = vector(I32, weight.type.count)
    products = code.mul(code.sext(weight, wide), code.zext(token, wide))
    for offset in range(4):
        every_fourth = constants(I32, range(offset, weight.type.count, 4))
        sums = code.add(sums, code.shuffle_vector(products, products, every_fourth))
    return sums


def best_of(features: Mapping[str, bool]) -> Dots | None:
    """The fastest way for a processor, by its features as LLVM names them; None if it has none.

    Examples:
        >>> best_of({"avx2": True})
        PairsOfWords(width=256)
        >>> best_of({"sse2": True}) is None
        True
    """
    if features.get("avx512vnni") and features.get("avx512vl") and features.get("avx512bw"):
        return FoursOfBytes(512, registers=32, matrices=bool(features.get("amx-int8")))
    if features.get("avxvnni"):
        return FoursOfBytes(256, registers=16)
    if features.get("avx512bw"):
        return PairsOfWords(512)
    return PairsOfWords(256) if features.get("avx2") else None

"""From sums of integers to outputs: the formula of `haq.int8.matmul`, in its order."""

from collections.abc import Sequence
from dataclasses import dataclass

from haq.int8.llvm import floats
from haq.int8.llvm.calls import Told
from haq.int8.llvm.dots import ZERO_POINT, Dots
from haq.int8.llvm.words import (
    FLOAT,
    I32,
    Code,
    Type,
    Value,
    lanes_of,
    multiply_add,
    number,
    spread,
    vector,
)


@dataclass(frozen=True)
class Ending:
    """What becomes of the sums.

    Attributes:
        target: the type of the outputs, a name of torch's.
        scaled: whether they are multiplied by the tokens' scales.
        shifted: whether the tokens have zero points.
        biased: whether there is a bias.
    """

    target: str
    scaled: bool
    shifted: bool
    biased: bool


@dataclass(frozen=True)
class Finish:
    """Writes the outputs of a product.

    Attributes:
        code: to write to.
        ending: what becomes of the sums.
        dots: what they are sums of.
        call, group: what the kernel is told.
    """

    code: Code
    ending: Ending
    dots: Dots
    call: Told
    group: Told

    def write(self, totals: Value, row: Value, token: Value) -> None:
        """Outputs, where they belong.

        Args:
            totals: int32, of a row of the weight, or of several side by side.
            row: the first of them.
            token: whose.
        """
        code, ending, lanes = self.code, self.ending, lanes_of(totals.type)
        if self.dots.unsigned:
            surplus = code.read(self.group["sums"], row, I32, lanes)
            totals = code.sub(totals, code.mul(surplus, number(ZERO_POINT, totals.type)))
        result = code.sitofp(totals, vector(FLOAT, lanes))
        result = code.fmul(result, code.read(self.group["scale"], row, FLOAT, lanes))
        if ending.shifted:
            shift = spread(code, code.read(self.call["shifts"], token, FLOAT), lanes)
            step = code.read(self.group["row_sums"], row, FLOAT, lanes)
            result = multiply_add(code, shift, step, result)  # As torch's `addcmul`.
        if ending.scaled:
            scale = spread(code, code.read(self.call["scales"], token, FLOAT), lanes)
            result = code.fmul(result, scale)
        if ending.biased:
            result = code.fadd(result, code.read(self.group["bias"], row, FLOAT, lanes))
        place = code.add(code.mul(token, self.call["rows"]), row)
        floats.write(code, ending.target, result, self.call["out"], place)

    def write_wanted(
        self,
        place: Value,
        kind: Type,
        row: Value,
        first: Value,
        count: int,
        wanted: Sequence[Value],
    ) -> None:
        """Outputs of tokens whose totals lie one after the other.

        Args:
            place: where they begin.
            kind: the type of a token's totals.
            row: the first of theirs.
            first: the first token.
            count: of tokens.
            wanted: the first of those that are, and the one after the last.
        """
        code, (token, last) = self.code, wanted
        start = code.select(code.icmp_signed("<", first, token), token, first)
        stop = code.smaller(last, code.add(first, number(count)))
        with code.loop(start, stop) as there:
            totals = code.address(place, code.sub(there, first), kind)
            self.write(code.value(totals, kind), row, there)

"""The exponential of numbers that are not positive: what a softmax needs."""

import math

from haq.int8.llvm.words import (
    I32,
    Code,
    Value,
    constant,
    lanes_of,
    multiply_add,
    number,
    suffix,
    vector,
)

# The series of e^r for r in [-ln(2)/2, ln(2)/2].
_SERIES = [1 / math.factorial(k) for k in range(8)]

# ln(2) in two parts: times an integer of a few bits, the first is exact.
_LOG_2 = 0.693359375, math.log(2) - 0.693359375

# Below this, 2^n is no ordinary float32 any more, and what it weighs is nothing.
_LEAST_POWER = -126.0


def exponential(code: Code, value: Value) -> Value:
    """``exp(value)`` for values up to 0, within a few units of float32's last place."""
    kind = value.type
    power = code.fmul(value, constant(kind, 1 / math.log(2)))
    nothing = code.fcmp_ordered("<", power, constant(kind, _LEAST_POWER))
    power = code.intrinsic(f"llvm.roundeven.{suffix(kind)}", kind, power)
    power = code.select(nothing, constant(kind, 0.0), power)
    rest = value
    for part in _LOG_2:
        rest = multiply_add(code, power, constant(kind, -part), rest)
    result = constant(kind, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        result = multiply_add(code, result, rest, constant(kind, coefficient))
    integers = vector(I32, lanes_of(kind))
    exponent = code.add(code.fptosi(power, integers), number(127, integers))
    scale = code.bitcast(code.shl(exponent, number(23, integers)), kind)
    return code.select(nothing, constant(kind, 0.0), code.fmul(result, scale))


def silu(code: Code, value: Value) -> Value:
    """``x * sigmoid(x)``; of both signs, by the exponential of what is not positive."""
    zero, one = (constant(value.type, number) for number in (0.0, 1.0))
    negative = code.fcmp_ordered("<", value, zero)
    small = exponential(code, code.select(negative, value, code.fneg(value)))
    top = code.select(negative, small, one)
    return code.fdiv(code.fmul(value, top), code.fadd(one, small))

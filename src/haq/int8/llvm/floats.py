"""Numbers of torch's float types, to and from float32, in torch's own bits."""

from haq.int8.llvm.words import (
    FLOAT,
    HALF,
    I16,
    I32,
    Code,
    Type,
    Value,
    constant,
    lanes_of,
    multiply_add,
    number,
    vector,
)

STORED: dict[str, Type] = {"float32": FLOAT, "float16": HALF, "bfloat16": I16}
"""How each type is read and written; LLVM's own bfloat16 would need a library on some machines."""

_NAN = 0x7FC0


def read(code: Code, kind: str, base: Value, index: Value, lanes: int) -> Value:
    """Float32 of ``lanes`` elements from the ``index``-th on."""
    return _read(code, kind, code.read(base, index, STORED[kind], lanes))


def write(code: Code, kind: str, value: Value, base: Value, index: Value) -> None:
    """Float32 to the nearest numbers of a type, ties to even."""
    code.write(_stored(code, kind, value), base, index, STORED[kind])


def rounded(code: Code, kind: str, value: Value) -> Value:
    """Float32 that a type holds, the nearest."""
    return _read(code, kind, _stored(code, kind, value))


def add_pairs(code: Code, sums: Value, a: Value, b: Value) -> Value:
    """``sums`` and the products of two numbers of bfloat16 each, in float32.

    It is written out what processors have instructions for.

    Args:
        code: to write to.
        sums: float32.
        a: pairs of bfloat16, int32, as many.
        b: likewise.
    """
    for part in (_lower, _upper):
        sums = multiply_add(code, part(code, a), part(code, b), sums)
    return sums


def _lower(code: Code, pairs: Value) -> Value:
    bits = code.shl(pairs, number(16, pairs.type))
    return code.bitcast(bits, vector(FLOAT, lanes_of(pairs.type)))


def _upper(code: Code, pairs: Value) -> Value:
    bits = code.and_(pairs, number(-(2**16), pairs.type))
    return code.bitcast(bits, vector(FLOAT, lanes_of(pairs.type)))


def _read(code: Code, kind: str, stored: Value) -> Value:
    lanes = lanes_of(stored.type)
    floats = vector(FLOAT, lanes)
    if kind == "float32":
        return stored
    if kind == "float16":
        return code.fpext(stored, floats)
    wide = vector(I32, lanes)
    return code.bitcast(code.shl(code.zext(stored, wide), number(16, wide)), floats)


def _stored(code: Code, kind: str, value: Value) -> Value:
    if kind == "float16":
        return code.fptrunc(value, vector(HALF, lanes_of(value.type)))
    return _to_bfloat16(code, value) if kind == "bfloat16" else value


def _to_bfloat16(code: Code, value: Value) -> Value:
    lanes = lanes_of(value.type)
    wide, narrow = vector(I32, lanes), vector(I16, lanes)
    bits = code.bitcast(value, wide)
    last = code.and_(code.lshr(bits, number(16, wide)), number(1, wide))
    half = code.add(code.add(bits, last), number(0x7FFF, wide))
    rounded = code.trunc(code.lshr(half, number(16, wide)), narrow)
    return code.select(code.fcmp_unordered("uno", value, value), constant(narrow, _NAN), rounded)

"""What a token goes through between the products of a layer: sums, gates and rotations.

Each rounds where torch would, an operation at a time, so that results have torch's bits, but for
the last one of a sigmoid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.chain import Step
from haq.int8.llvm.rounding import gate
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import FLOAT, POINTER, Code, Type, Value, constant, number, parts, spread

_LANES = 8

# Elements that a thread takes as a whole: a line of the cache is written to by one thread only.
_SHARE = 64

_SUM = ("a", "b", "out", "width")

_GATE = (
    "a",  # float [R, I], to be activated; a row begins `between` elements after the one before
    "b",  # float [R, I], to be multiplied with, likewise
    "out",  # float [R, I]
    "rows",  # R
    "width",  # I
    "between",
)

_WEIGHTED = (
    "a",  # float32 [A, D]
    "b",  # float32 [A], the factor of each row
    "out",  # float [D]
    "rows",  # A
    "width",  # D
)

_ROTATION = (
    "query",  # float [H, D]
    "key",  # float [G, D]
    "value",  # float [G, V]
    "cos",  # float [R], R <= D
    "sin",  # float [R]
    "turned_query",  # float32 [H, D], scaled
    "turned_key",  # float [G, D]; a row begins `key_group` elements after the one before
    "placed_value",  # float [G, V], likewise
    "key_group",
    "value_group",
    "heads",  # H
    "groups",  # G
    "size",  # D
    "width",  # V
    "turned",  # R
)


def sum_step(dtype: torch.dtype, a: int, b: int, out: int, width: int) -> Step:
    """``out = a + b``, float ``[width]`` at these addresses."""
    return Step(compiler.kernel_of(_sum, (dtype,)), _SUM, [a, b, out, width])


def gate_step(
    dtype: torch.dtype, a: int, b: int, out: int, rows: int, width: int, between: int
) -> Step:
    """``out = silu(a) * b``.

    Args:
        dtype: of all three.
        a: an address, as the next two; ``[R, I]``, with gaps between rows.
        b: likewise.
        out: ``[R, I]``, without gaps.
        rows: R.
        width: I.
        between: elements from where a row of ``a`` and ``b`` begins to where the next one does.
    """
    told = [a, b, out, rows, width, between]
    return Step(compiler.kernel_of(_gate, (dtype,)), _GATE, told)


def gated(both: Tensor) -> Tensor:
    """``silu(a) * b`` of the halves of rows, all at once.

    What follows may do that, too: `haq.int8.llvm.weight.products`.

    Args:
        both: float32 ``[R, 2 I]``, contiguous.

    Returns:
        Float32 ``[R, I]``.

    Examples:
        >>> gated(torch.tensor([[0.0, 50.0, 3.0, 2.0]]))
        tensor([[  0., 100.]])
    """
    rows, inner = len(both), both.shape[1] // 2
    out = both.new_empty(rows, inner)
    a = both.data_ptr()
    b = a + inner * both.itemsize
    step = gate_step(both.dtype, a, b, out.data_ptr(), rows, inner, 2 * inner)
    step.kernel(step.places, torch.get_num_threads())
    return out


def weighted_step(dtype: torch.dtype, a: int, b: int, out: int, rows: int, width: int) -> Step:
    """``out = sum over rows r of a[r] * b[r]`` in float32, in the order of the rows, cast.

    Args:
        dtype: of the result.
        a: an address, as the next two; float32 ``[A, D]``.
        b: float32 ``[A]``.
        out: ``[D]``.
        rows: A.
        width: D.
    """
    return Step(compiler.kernel_of(_weighted, (dtype,)), _WEIGHTED, [a, b, out, rows, width])


def rotation_step(
    dtype: torch.dtype,
    scale: float,
    query: int,
    key: int,
    value: int,
    turned_query: int,
    shape: Sequence[int],
) -> Step:
    """Rotary embeddings of a token, whose halves are rotated; what is beyond R stays.

    What it is rotated by, and where its key and value belong, is to be told.

    Args:
        dtype: of all but the rotated query.
        scale: the rotated query is multiplied with it.
        query: an address, as the next three; as it comes from its product.
        key: likewise.
        value: likewise; it is copied to its place.
        turned_query: float32.
        shape: H, G, D, V and R.
    """
    told = [query, key, value, 0, 0, turned_query, 0, 0, 0, 0, *shape]
    return Step(compiler.kernel_of(_rotation, (dtype, scale)), _ROTATION, told)


def _sum(dtype: torch.dtype) -> Any:
    code, call, kind = _begin(_SUM, dtype)
    for lanes, start, stop in _own_share(code, call["width"]):
        with code.loop(start, stop, lanes) as index:
            a, b = (floats.read(code, kind, call[name], index, lanes) for name in "ab")
            floats.write(code, kind, code.fadd(a, b), call["out"], index)
    code.ret_void()
    return code.module


def _gate(dtype: torch.dtype) -> Any:
    code, call, kind = _begin(_GATE, dtype)
    shares = _own_share(code, call["width"])
    with code.loop(number(0), call["rows"]) as row:
        before = code.mul(row, call["between"])
        a, b = (code.address(call[name], before, floats.STORED[kind]) for name in "ab")
        out = code.address(call["out"], code.mul(row, call["width"]), floats.STORED[kind])
        for lanes, start, stop in shares:
            with code.loop(start, stop, lanes) as index:
                halves = (floats.read(code, kind, half, index, lanes) for half in (a, b))
                floats.write(code, kind, gate(code, kind, *halves), out, index)
    code.ret_void()
    return code.module


def _weighted(dtype: torch.dtype) -> Any:
    code, call, kind = _begin(_WEIGHTED, dtype)
    for lanes, start, stop in _own_share(code, call["width"]):
        zero = constant(FLOAT, 0.0)
        with code.loop(start, stop, lanes) as index:
            total = code.variable(spread(code, zero, lanes).type, spread(code, zero, lanes))
            with code.loop(number(0), call["rows"]) as row:
                place = code.add(code.mul(row, call["width"]), index)
                value = code.read(call["a"], place, FLOAT, lanes)
                factor = spread(code, code.read(call["b"], row, FLOAT), lanes)
                before = code.value(total, value.type)
                code.store(code.fadd(before, code.fmul(value, factor)), total)
            floats.write(code, kind, code.value(total, value.type), call["out"], index)
    code.ret_void()
    return code.module


def _rotation(dtype: torch.dtype, scale: float) -> Any:
    code, call, kind = _begin(_ROTATION, dtype)
    first, step = threads.number_and_count(code)
    with code.loop(first, call["heads"], step) as head:
        source, out = _rows(code, call, head, kind, ("query", "turned_query"), call["size"], FLOAT)
        _turn(code, call, kind, source, out, "float32", scale)
    stored = floats.STORED[kind]
    with code.loop(first, call["groups"], step) as group:
        names = "key", "turned_key"
        source, out = _rows(code, call, group, kind, names, call["size"], stored, call["key_group"])
        _turn(code, call, kind, source, out, kind, 1.0)
        names, width = ("value", "placed_value"), call["width"]
        source, out = _rows(code, call, group, kind, names, width, stored, call["value_group"])
        with code.loop(number(0), width) as index:
            code.write(code.read(source, index, stored), out, index, stored)
    code.ret_void()
    return code.module


def _rows(
    code: Code,
    call: Told,
    row: Value,
    kind: str,
    names: tuple[str, str],
    size: Value,
    stored: Type,
    between: Value | None = None,
) -> tuple[Value, Value]:
    """Where a row is read, and where it is written."""
    source = code.address(call[names[0]], code.mul(row, size), floats.STORED[kind])
    before = code.mul(row, size if between is None else between)
    return source, code.address(call[names[1]], before, stored)


def _turn(
    code: Code, call: Told, kind: str, source: Value, out: Value, target: str, scale: float
) -> None:
    """One head."""
    half = code.sdiv(call["turned"], number(2))

    def write(value: Value, index: Value, lanes: int) -> None:
        value = code.fmul(value, spread(code, constant(FLOAT, scale), lanes))
        floats.write(code, target, value, out, index)

    for lanes, start, stop in parts(code, half, _LANES):
        with code.loop(start, stop, lanes) as index:
            places = index, code.add(index, half)
            a, b = (floats.read(code, kind, source, place, lanes) for place in places)
            for place, own, other in ((places[0], a, code.fneg(b)), (places[1], b, a)):
                cos, sin = (
                    floats.read(code, kind, call[name], place, lanes) for name in ("cos", "sin")
                )
                terms = (
                    floats.rounded(code, kind, code.fmul(value, factor))
                    for value, factor in ((own, cos), (other, sin))
                )
                write(floats.rounded(code, kind, code.fadd(*terms)), place, lanes)
    with code.loop(call["turned"], call["size"]) as index:
        write(floats.read(code, kind, source, index, 1), index, 1)


def _begin(names: tuple[str, ...], dtype: torch.dtype) -> tuple[Code, Told, str]:
    code = Code(ir.Module(), "run", [POINTER], internal=False)
    return code, Told(code, code.parameters[0], names), name_of(dtype)


def _own_share(code: Code, width: Value) -> list[tuple[int, Value, Value]]:
    """A thread's part of a row: lanes, from where, to where."""
    own, count = threads.number_and_count(code)
    size = code.mul(count, number(_SHARE))
    share = code.mul(code.sdiv(code.add(width, code.sub(size, number(1))), size), number(_SHARE))
    start = code.smaller(width, code.mul(own, share))
    stop = code.smaller(width, code.add(start, share))
    whole = code.add(start, code.and_(code.sub(stop, start), number(-_LANES)))
    return [(_LANES, start, whole), (1, whole, stop)]

"""Attention of a whole prompt, in one call.

A thread takes some queries of a head at a time, as many as two registers hold numbers: each query
has its place in them from beginning to end. What is multiplied with them, a number of a key or of a
value, is the same for all. So nothing is ever summed across a register, and the softmax of all
queries is that of one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.exponential import exponential
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    I32,
    POINTER,
    Code,
    Value,
    constant,
    constants,
    multiply_add,
    number,
    spread,
    vector,
)

# Registers that queries are in.
_REGISTERS = 2

_CALL = (
    "query",  # float [H, Q, D]
    "key",  # float32 [G, T, D]
    "value",  # float32 [G, T, V]
    "out",  # float [H, Q, V]
    "room",  # for each thread float32 [D + T + V, queries at once]
    "heads",  # H
    "shared",  # H / G
    "queries",  # Q
    "keys",  # T
    "size",  # D
    "width",  # V
    *(f"{of}_{by}" for of in ("query", "out") for by in ("head", "token")),  # strides
    "factor",  # of the scores: the bits of a float32
    "counter",  # how many pieces have been taken: 0
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, causal: bool, scale: float
) -> None:
    """``softmax(query @ key.T * scale) @ value`` in float32.

    Args:
        query: float ``[H, Q, D]``, with numbers of a token side by side.
        key: float32 ``[G, T, D]``, contiguous; H / G heads in a row share one.
        value: float32 ``[G, T, V]``, contiguous.
        out: float ``[H, Q, V]``, dtype of ``query``, with numbers of a token side by side; written
            to.
        causal: whether a query sees as many keys as there are queries up to it; else all.
        scale: of the scores.
    """
    (heads, queries, size), (groups, tokens, width) = query.shape, value.shape
    at_once = _REGISTERS * compiler.dots_here().sums
    room = key.new_empty(torch.get_num_threads(), size + tokens + width, at_once)
    places = [tensor.data_ptr() for tensor in (query, key, value, out, room)]
    places += [heads, heads // groups, queries, tokens, size, width]
    places += [*query.stride()[:2], *out.stride()[:2]]
    places += [int(torch.tensor(scale, dtype=torch.float32).view(torch.int32)), 0]
    compiler.run(_module, (query.dtype, causal), places)


def _module(dtype: torch.dtype, causal: bool) -> Any:
    dots, module = compiler.dots_here(), ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    at_once = number(_REGISTERS * dots.sums)
    rounded_up = code.add(call["queries"], code.sub(at_once, number(1)))
    blocks = code.sdiv(rounded_up, at_once)
    thread, _ = threads.number_and_count(code)
    rows = code.add(code.add(call["size"], call["keys"]), call["width"])
    room = code.address(call["room"], code.mul(thread, code.mul(rows, at_once)), FLOAT)
    every = threads.pieces(code, call.place("counter"), number(1), code.mul(call["heads"], blocks))
    with every as (piece, _):
        head = code.sdiv(piece, blocks)
        # The longest first, so that none is left to the end for one thread.
        block = code.sub(code.sub(blocks, number(1)), code.srem(piece, blocks))
        first = code.mul(block, at_once)
        _Queries(code, call, name_of(dtype), dots.sums, dots.registers, room, head, first).write(
            causal
        )
    code.ret_void()
    return module


class _Queries:
    """Some queries of a head."""

    def __init__(
        self,
        code: Code,
        call: Told,
        kind: str,
        lanes: int,
        registers: int,
        room: Value,
        head: Value,
        first: Value,
    ) -> None:
        self.code, self.call, self.kind, self.lanes = code, call, kind, lanes
        self.numbers = vector(FLOAT, lanes)
        self.at_once = _REGISTERS * lanes
        # Sums that a tile has for each query: with their inputs they are to fit into registers.
        self.columns = registers // 4
        self.first = first
        self.count = code.smaller(code.sub(call["queries"], first), number(self.at_once))
        stored = floats.STORED[kind]
        group = code.sdiv(head, call["shared"])
        key, value = (code.mul(code.mul(group, call["keys"]), call[of]) for of in ("size", "width"))
        self.key = code.address(call["key"], key, FLOAT)
        self.value = code.address(call["value"], value, FLOAT)
        self.query, self.out = (
            code.address(call[of], self._offset(of, head, first), stored) for of in ("query", "out")
        )
        self.turned = room  # [D, queries]
        self.scores = self._row(room, call["size"])  # [T, queries]
        self.sums = self._row(self.scores, call["keys"])  # [V, queries]

    def _offset(self, of: str, head: Value, token: Value) -> Value:
        code, call = self.code, self.call
        by_head = code.mul(head, call[f"{of}_head"])
        return code.add(by_head, code.mul(token, call[f"{of}_token"]))

    def _row(self, base: Value, index: Value) -> Value:
        return self.code.address(base, self.code.mul(index, number(self.at_once)), FLOAT)

    def write(self, causal: bool) -> None:
        code, call = self.code, self.call
        tokens = call["keys"]
        if causal:
            tokens = code.smaller(tokens, code.add(self.first, number(self.at_once)))
        self._turn()
        self._multiply(
            self.turned, call["size"], self.key, (call["size"], 1), tokens, self.scores, None
        )
        sums = self._exponentiate(tokens, self._largest(tokens, causal))
        inverse = [code.fdiv(constant(self.numbers, 1.0), each) for each in sums]
        self._multiply(
            self.scores, tokens, self.value, (1, call["width"]), call["width"], self.sums, inverse
        )
        self._turn_back()

    def _turn(self) -> None:
        """The queries, scaled: a row for each of their numbers. Where there is none, it is zero."""
        code, size, rows = self.code, self.call["size"], number(self.at_once)
        scale = code.bitcast(code.trunc(self.call["factor"], I32), FLOAT)
        with code.loop(number(0), self.count) as query:
            numbers = code.address(
                self.query, code.mul(query, self.call["query_token"]), floats.STORED[self.kind]
            )
            with code.loop(number(0), size) as index:
                value = code.fmul(floats.read(code, self.kind, numbers, index, 1), scale)
                code.write(value, self.turned, code.add(code.mul(index, rows), query), FLOAT)
        with code.loop(self.count, rows) as query, code.loop(number(0), size) as index:
            place = code.add(code.mul(index, rows), query)
            code.write(constant(FLOAT, 0.0), self.turned, place, FLOAT)

    def _turn_back(self) -> None:
        code, rows = self.code, number(self.at_once)
        with code.loop(number(0), self.count) as query:
            out = code.address(
                self.out, code.mul(query, self.call["out_token"]), floats.STORED[self.kind]
            )
            with code.loop(number(0), self.call["width"]) as index:
                place = code.add(code.mul(index, rows), query)
                floats.write(code, self.kind, code.read(self.sums, place, FLOAT), out, index)

    def _multiply(
        self,
        left: Value,
        steps: Value,
        right: Value,
        strides: tuple[int | Value, int | Value],
        columns: Value,
        out: Value,
        factors: Sequence[Value] | None,
    ) -> None:
        """Sums over steps, of what all queries have there times a number.

        Args:
            left: float32 ``[steps, queries]``.
            steps: that are summed.
            right: float32, a number for each column and step.
            strides: from a column to the next, and from a step to the next.
            columns: how many.
            out: float32 ``[columns, queries]``, written to.
            factors: of each query's sums.
        """
        code = self.code
        whole = code.and_(columns, number(-self.columns))
        for at_once, start, stop in ((self.columns, number(0), whole), (1, whole, columns)):
            with code.loop(start, stop, at_once) as column:
                here = code.address(right, self._times(column, strides[0]), FLOAT)
                sums = self._tile(left, steps, here, strides, at_once)
                for offset, registers in enumerate(sums):
                    row = self._row(out, code.add(column, number(offset)))
                    for index, each in enumerate(registers):
                        result = each if factors is None else code.fmul(each, factors[index])
                        code.write(result, row, number(index * self.lanes), FLOAT)

    def _tile(
        self,
        left: Value,
        steps: Value,
        right: Value,
        strides: tuple[int | Value, int | Value],
        columns: int,
    ) -> list[list[Value]]:
        code, zero = self.code, constant(self.numbers, 0.0)
        sums = [
            [code.variable(self.numbers, zero) for _ in range(_REGISTERS)] for _ in range(columns)
        ]
        # The addresses of columns, before the loop.
        bases = [
            code.address(right, self._times(number(c), strides[0]), FLOAT) for c in range(columns)
        ]
        with code.loop(number(0), steps) as step:
            row = self._row(left, step)
            queries = self._read(row)
            index = self._times(step, strides[1])
            for base, registers in zip(bases, sums, strict=True):
                factor = spread(code, code.read(base, index, FLOAT), self.lanes)
                for numbers, place in zip(queries, registers, strict=True):
                    total = code.value(place, self.numbers)
                    code.store(multiply_add(code, numbers, factor, total), place)
        return [[code.value(place, self.numbers) for place in registers] for registers in sums]

    def _times(self, index: Value, stride: int | Value) -> Value:
        return self.code.mul(index, number(stride) if isinstance(stride, int) else stride)

    def _largest(self, tokens: Value, causal: bool) -> list[Value]:
        """Of each query's scores. Those of keys that it does not see become minus infinity."""
        code = self.code
        lowest = constant(self.numbers, -math.inf)
        largest = [code.variable(self.numbers, lowest) for _ in range(_REGISTERS)]
        hidden = code.smaller(self.first, tokens) if causal else tokens
        with code.loop(number(0), hidden) as token:
            self._take_larger(largest, self._read(self._row(self.scores, token)))
        with code.loop(hidden, tokens) as token:
            row, seen = self._row(self.scores, token), []
            before = code.trunc(code.sub(token, self.first), I32)
            for index, scores in enumerate(self._read(row)):
                start = index * self.lanes
                queries = constants(I32, range(start, start + self.lanes))
                sees = code.icmp_signed("<=", spread(code, before, self.lanes), queries)
                seen.append(code.select(sees, scores, lowest))
                code.write(seen[-1], row, number(start), FLOAT)
            self._take_larger(largest, seen)
        return [code.value(each, self.numbers) for each in largest]

    def _take_larger(self, largest: Sequence[Value], scores: Sequence[Value]) -> None:
        code = self.code
        for place, score in zip(largest, scores, strict=True):
            old = code.value(place, self.numbers)
            code.store(code.select(code.fcmp_ordered(">", score, old), score, old), place)

    def _exponentiate(self, tokens: Value, largest: Sequence[Value]) -> list[Value]:
        """Scores to weights that still have to be divided by their sums, which these are."""
        code, zero = self.code, constant(self.numbers, 0.0)
        sums = [code.variable(self.numbers, zero) for _ in range(_REGISTERS)]
        with code.loop(number(0), tokens) as token:
            row = self._row(self.scores, token)
            for index, scores in enumerate(self._read(row)):
                weights = exponential(code, code.fsub(scores, largest[index]))
                code.write(weights, row, number(index * self.lanes), FLOAT)
                total = code.fadd(code.value(sums[index], self.numbers), weights)
                code.store(total, sums[index])
        return [code.value(each, self.numbers) for each in sums]

    def _read(self, row: Value) -> list[Value]:
        """A row of all queries."""
        places = (number(index * self.lanes) for index in range(_REGISTERS))
        return [self.code.read(row, place, FLOAT, self.lanes) for place in places]

"""Attention of one new token to all before it, in one call."""

import math
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.chain import Step
from haq.int8.llvm.exponential import exponential
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    POINTER,
    Code,
    Value,
    constant,
    multiply_add,
    number,
    parts,
    spread,
    total,
    vector,
)

# Registers of values of a head that are summed at once, and keys that are multiplied at once: each
# sum waits for the one before it.
_REGISTERS, _KEYS = 8, 4

_CALL = (
    "query",  # float32 [B, H, D], scaled
    "key",  # float [B, G, T, D]
    "value",  # float [B, G, T, V]
    "mask",  # float32 [B, H, T], to be added, or 0
    "scores",  # room for float32 [B, H, T]
    "out",  # float [B, H, V]
    "heads",  # B H
    "heads_of_row",  # H
    "shared",  # H / G
    "tokens_before",  # T
    "size",  # D
    "width",  # V
    *(f"{of}_{by}" for of in ("key", "value") for by in ("row", "group", "token")),  # strides
)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """``softmax(query @ key.T + mask) @ value`` in float32, for one query of each head.

    Args:
        query: float32 ``[B, H, 1, D]``, scaled.
        key: float ``[B, G, T, D]``, with numbers of a token side by side.
        value: float ``[B, G, T, V]``, dtype of ``key``, with numbers of a token side by side.
        mask: float32 ``[B, H, 1, T]``, to be added.

    Returns:
        ``[B, H, 1, V]`` in the dtype of ``value``.
    """
    (batch, heads, _, size), (groups, tokens) = query.shape, key.shape[1:3]
    query = query.contiguous()
    mask = None if mask is None else mask.contiguous()
    out = value.new_empty(batch, heads, 1, value.shape[-1])
    scores = query.new_empty(batch, heads, tokens)
    places = [query.data_ptr(), key.data_ptr(), value.data_ptr()]
    places += [0 if mask is None else mask.data_ptr(), scores.data_ptr(), out.data_ptr()]
    places += [batch * heads, heads, heads // groups, tokens, size, value.shape[-1]]
    places += [*key.stride()[:3], *value.stride()[:3]]
    compiler.run(_module, (key.dtype, mask is not None), places)
    return out


def step(
    dtype: torch.dtype, query: int, out: int, heads: int, groups: int, size: int, width: int
) -> Step:
    """`attend` for one row without a mask, as a part of a chain. Keys and values are to be told.

    Args:
        dtype: of keys, values and the result.
        query: an address, float32 ``[H, D]``.
        out: an address, ``[H, V]``.
        heads: H.
        groups: G.
        size: D.
        width: V.
    """
    told = [query, 0, 0, 0, 0, out, heads, heads, heads // groups, 0, size, width, *[0] * 6]
    return Step(compiler.kernel_of(_module, (dtype, False)), _CALL, told)


def _module(dtype: torch.dtype, masked: bool) -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    first, step = threads.number_and_count(code)
    with code.loop(first, call["heads"], step) as head:
        _Head(code, call, head, name_of(dtype)).write(masked)
    code.ret_void()
    return module


class _Head:
    """One head of one row of the batch."""

    def __init__(self, code: Code, call: Told, head: Value, kind: str) -> None:
        self.code, self.call, self.head, self.kind = code, call, head, kind
        self.lanes = compiler.dots_here().sums
        self.tokens, stored = call["tokens_before"], floats.STORED[kind]
        row, own = (f(head, call["heads_of_row"]) for f in (code.sdiv, code.srem))
        group = code.sdiv(own, call["shared"])
        self.key, self.value = (
            code.address(call[name], self._offset(name, row, group), stored)
            for name in ("key", "value")
        )
        before = code.mul(head, self.tokens)
        self.scores = code.address(call["scores"], before, FLOAT)
        self.mask = code.address(call["mask"], before, FLOAT)
        self.query = code.address(call["query"], code.mul(head, call["size"]), FLOAT)
        self.out = code.address(call["out"], code.mul(head, call["width"]), stored)

    def _offset(self, name: str, row: Value, group: Value) -> Value:
        code, call = self.code, self.call
        return code.add(code.mul(row, call[f"{name}_row"]), code.mul(group, call[f"{name}_group"]))

    def write(self, masked: bool) -> None:
        code = self.code
        largest = self._write_scores(masked)
        inverse = code.fdiv(constant(FLOAT, 1.0), self._exponentiate(largest))
        lanes, at_once = self.lanes, self.lanes * _REGISTERS
        in_registers = code.and_(self.call["width"], number(-at_once))
        with code.loop(number(0), in_registers, at_once) as index:
            self._sum_values(index, _REGISTERS, lanes, inverse)
        whole = code.and_(self.call["width"], number(-lanes))
        with code.loop(in_registers, whole, lanes) as index:
            self._sum_values(index, 1, lanes, inverse)
        with code.loop(whole, self.call["width"]) as index:
            self._sum_values(index, 1, 1, inverse)

    def _write_scores(self, masked: bool) -> Value:
        """Products with all keys, and the largest."""
        code = self.code
        largest = code.variable(FLOAT, constant(FLOAT, -math.inf))
        whole = code.and_(self.tokens, number(-_KEYS))
        for at_once, start, stop in ((_KEYS, number(0), whole), (1, whole, self.tokens)):
            with code.loop(start, stop, at_once) as token:
                tokens = [code.add(token, number(index)) for index in range(at_once)]
                for score, place in zip(self._scores_of(tokens), tokens, strict=True):
                    if masked:
                        score = code.fadd(score, code.read(self.mask, place, FLOAT))
                    code.write(score, self.scores, place, FLOAT)
                    old = code.value(largest, FLOAT)
                    code.store(code.select(code.fcmp_ordered(">", score, old), score, old), largest)
        return code.value(largest, FLOAT)

    def _scores_of(self, tokens: list[Value]) -> list[Value]:
        """The query's products with some keys."""
        code, call, stored = self.code, self.call, floats.STORED[self.kind]
        keys = [code.address(self.key, code.mul(t, call["key_token"]), stored) for t in tokens]
        scores: list[Value] = [constant(FLOAT, 0.0) for _ in keys]
        for lanes, start, stop in parts(code, call["size"], self.lanes):
            kind = vector(FLOAT, lanes)
            sums = [code.variable(kind, constant(kind, 0.0)) for _ in keys]
            with code.loop(start, stop, lanes) as index:
                query = code.read(self.query, index, FLOAT, lanes)
                for key, here in zip(keys, sums, strict=True):
                    numbers = floats.read(code, self.kind, key, index, lanes)
                    code.store(multiply_add(code, query, numbers, code.value(here, kind)), here)
            totals = [total(code, code.value(here, kind)) for here in sums]
            scores = [code.fadd(a, b) for a, b in zip(scores, totals, strict=True)]
        return scores

    def _exponentiate(self, largest: Value) -> Value:
        """Scores to weights that still have to be divided by their sum, which this is."""
        code, sums = self.code, []
        for lanes, start, stop in parts(code, self.tokens, self.lanes):
            kind = vector(FLOAT, lanes)
            here = code.variable(kind, constant(kind, 0.0))
            with code.loop(start, stop, lanes) as index:
                score = code.read(self.scores, index, FLOAT, lanes)
                weight = exponential(code, code.fsub(score, spread(code, largest, lanes)))
                code.write(weight, self.scores, index, FLOAT)
                code.store(code.fadd(code.value(here, kind), weight), here)
            sums.append(total(code, code.value(here, kind)))
        return code.fadd(*sums)

    def _sum_values(self, index: Value, registers: int, lanes: int, inverse: Value) -> None:
        """Some columns of the result."""
        code, kind = self.code, vector(FLOAT, lanes)
        sums = [code.variable(kind, constant(kind, 0.0)) for _ in range(registers)]
        places = [code.add(index, number(lanes * r)) for r in range(registers)]
        with code.loop(number(0), self.tokens) as token:
            offset = code.mul(token, self.call["value_token"])
            value = code.address(self.value, offset, floats.STORED[self.kind])
            weight = spread(code, code.read(self.scores, token, FLOAT), lanes)
            for each, place in zip(sums, places, strict=True):
                numbers = floats.read(code, self.kind, value, place, lanes)
                code.store(multiply_add(code, weight, numbers, code.value(each, kind)), each)
        for each, place in zip(sums, places, strict=True):
            result = code.fmul(code.value(each, kind), spread(code, inverse, lanes))
            floats.write(code, self.kind, result, self.out, place)

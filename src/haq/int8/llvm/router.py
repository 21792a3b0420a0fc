"""The experts that a router chooses for one token: its logits, and the largest of their softmax."""

import math
from typing import Any

import torch
from llvmlite import ir

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.chain import Step
from haq.int8.llvm.exponential import exponential
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    I64,
    POINTER,
    Code,
    Value,
    constant,
    multiply_add,
    number,
    parts,
    total,
    vector,
)

_LOGITS = (
    "a",  # float [D], the token
    "weight",  # float [E, D]
    "out",  # float32 [E]
    "rows",  # E
    "width",  # D
)

_CHOICE = (
    "a",  # float32 [E], the logits, used up
    "b",  # float [D], the token
    "scores",  # float32 [A], written to
    "chosen",  # int64 [A], written to
    "out",  # float [A, D], the token for each of its experts
    "rows",  # E
    "slots",  # A
    "width",  # D
)


def logits_step(
    dtype: torch.dtype, token: int, weight: int, out: int, experts: int, width: int
) -> Step:
    """``out = token @ weight.T``, rounded to the dtype.

    Args:
        dtype: of token and weight.
        token: an address, as the next two; ``[D]``.
        weight: ``[E, D]``.
        out: float32 ``[E]``.
        experts: E.
        width: D.
    """
    told = [token, weight, out, experts, width]
    return Step(compiler.kernel_of(_logits, (dtype,)), _LOGITS, told)


def choice_step(
    dtype: torch.dtype,
    normed: bool,
    rounded: bool,
    logits: int,
    token: int,
    scores: int,
    chosen: int,
    tokens: int,
    shape: tuple[int, int, int],
) -> Step:
    """The experts with the largest scores, the first of equals first, and the token for each.

    Scores are the softmax of all logits in float32.

    Args:
        dtype: of token and logits.
        normed: whether scores of those that are chosen are divided by their sum.
        rounded: whether scores are rounded to the dtype.
        logits: an address, as the next four; used up.
        token: what is copied.
        scores: of those that are chosen, float32 ``[A]``.
        chosen: int64 ``[A]``.
        tokens: ``[A, D]``.
        shape: E, A and D.
    """
    told = [logits, token, scores, chosen, tokens, *shape]
    return Step(compiler.kernel_of(_choice, (dtype, normed, rounded)), _CHOICE, told)


def _logits(dtype: torch.dtype) -> Any:
    code = Code(ir.Module(), "run", [POINTER], internal=False)
    call, kind = Told(code, code.parameters[0], _LOGITS), name_of(dtype)
    first, step = threads.number_and_count(code)
    with code.loop(first, call["rows"], step) as row:
        weight = code.address(call["weight"], code.mul(row, call["width"]), floats.STORED[kind])
        sums = []
        for lanes, start, stop in parts(code, call["width"], compiler.dots_here().sums):
            zero = constant(vector(FLOAT, lanes), 0.0)
            here = code.variable(zero.type, zero)
            with code.loop(start, stop, lanes) as index:
                a = floats.read(code, kind, call["a"], index, lanes)
                b = floats.read(code, kind, weight, index, lanes)
                code.store(multiply_add(code, a, b, code.value(here, zero.type)), here)
            sums.append(total(code, code.value(here, zero.type)))
        code.write(floats.rounded(code, kind, code.fadd(*sums)), call["out"], row, FLOAT)
    code.ret_void()
    return code.module


def _choice(dtype: torch.dtype, normed: bool, rounded: bool) -> Any:
    code = Code(ir.Module(), "run", [POINTER], internal=False)
    call, kind = Told(code, code.parameters[0], _CHOICE), name_of(dtype)
    first, step = threads.number_and_count(code)
    stored = floats.STORED[kind]
    with code.loop(first, call["width"], step) as index:
        value = code.read(call["b"], index, stored)
        with code.loop(number(0), call["slots"]) as slot:
            place = code.add(code.mul(slot, call["width"]), index)
            code.write(value, call["out"], place, stored)
    with code.if_then(code.icmp_signed("==", first, number(0))):
        _choose(code, call, normed, kind if rounded else "float32")
    code.ret_void()
    return code.module


def _choose(code: Code, call: Told, normed: bool, kind: str) -> None:
    """In one thread: there are few."""
    _, largest = _largest(code, call)
    sum_of_all, sum_of_chosen = (code.variable(FLOAT, constant(FLOAT, 0.0)) for _ in range(2))
    with code.loop(number(0), call["rows"]) as row:
        weight = exponential(code, code.fsub(code.read(call["a"], row, FLOAT), largest))
        code.write(weight, call["a"], row, FLOAT)
        code.store(code.fadd(code.value(sum_of_all, FLOAT), weight), sum_of_all)
    with code.loop(number(0), call["slots"]) as slot:
        row, weight = _largest(code, call)
        score = code.fdiv(weight, code.value(sum_of_all, FLOAT))
        code.write(constant(FLOAT, -1.0), call["a"], row, FLOAT)
        code.write(row, call["chosen"], slot, I64)
        code.write(score, call["scores"], slot, FLOAT)
        code.store(code.fadd(code.value(sum_of_chosen, FLOAT), score), sum_of_chosen)
    with code.loop(number(0), call["slots"]) as slot:
        score = code.read(call["scores"], slot, FLOAT)
        if normed:
            score = code.fdiv(score, code.value(sum_of_chosen, FLOAT))
        code.write(floats.rounded(code, kind, score), call["scores"], slot, FLOAT)


def _largest(code: Code, call: Told) -> tuple[Value, Value]:
    """Which expert has the largest number, and that; where all are NaN, the first."""
    best = code.variable(I64, number(0))
    most = code.variable(FLOAT, constant(FLOAT, -math.inf))
    with code.loop(number(0), call["rows"]) as row:
        value, old = code.read(call["a"], row, FLOAT), code.value(most, FLOAT)
        larger = code.fcmp_ordered(">", value, old)
        code.store(code.select(larger, value, old), most)
        code.store(code.select(larger, row, code.value(best, I64)), best)
    return code.value(best, I64), code.value(most, FLOAT)

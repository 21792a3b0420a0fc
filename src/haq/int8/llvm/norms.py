"""A norm by the root of the mean square, in one call."""

from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from haq.int8.llvm import compiler, floats, threads
from haq.int8.llvm.calls import Told
from haq.int8.llvm.chain import Step
from haq.int8.llvm.weight import name_of
from haq.int8.llvm.words import (
    FLOAT,
    POINTER,
    Code,
    Value,
    constant,
    parts,
    spread,
    total,
    vector,
)
from haq.int8.norm import Norm

_LANES = 8

_CALL = (
    "tokens",  # float [T, K]
    "count",  # T
    "width",  # K
    "weight",  # float [K]
    "bias",  # float [K]
    "out",  # float [T, K]
)


def norm(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A norm that is not centered; those that are, torch computes in one call itself.

    Sums are taken in float32, in an order of their own: within a few units of the last place of
    float32 the result is that of any other way to compute it.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``.
        norm: which one.
        weight: ``[K]``, dtype of ``x``.
        bias: ``[K]``, dtype of ``x``.

    Returns:
        The shape and dtype of ``x``.
    """
    assert not norm.centered
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    places = [x.data_ptr(), x.numel() // width, width, weight.data_ptr()]
    places += [0 if bias is None else bias.data_ptr(), out.data_ptr()]
    compiler.run(_module, (x.dtype, norm, bias is not None), places)
    return out


def step(x: int, count: int, norm: Norm, weight: Tensor, bias: Tensor | None, out: int) -> Step:
    """`norm` of ``[count, K]`` as a part of a chain.

    Args:
        x: the address of the tokens, 0 for one that is to be told.
        count: how many there are.
        norm: which one; it is not centered.
        weight: ``[K]``, contiguous.
        bias: ``[K]``, contiguous.
        out: the address of the result.
    """
    kernel = compiler.kernel_of(_module, (weight.dtype, norm, bias is not None))
    given = 0 if bias is None else bias.data_ptr()
    return Step(kernel, _CALL, [x, count, len(weight), weight.data_ptr(), given, out])


def _module(dtype: torch.dtype, norm: Norm, biased: bool) -> Any:
    module = ir.Module()
    code = Code(module, "run", [POINTER], internal=False)
    call = Told(code, code.parameters[0], _CALL)
    first, step = threads.number_and_count(code)
    with code.loop(first, call["count"], step) as token:
        _Token(code, call, token, name_of(dtype)).write(norm, biased)
    code.ret_void()
    return module


class _Token:
    """One token's norm."""

    def __init__(self, code: Code, call: Told, token: Value, kind: str) -> None:
        self.code, self.call, self.kind = code, call, kind
        self.width = call["width"]
        start, stored = code.mul(token, self.width), floats.STORED[kind]
        self.values = code.address(call["tokens"], start, stored)
        self.out = code.address(call["out"], start, stored)

    def write(self, norm: Norm, biased: bool) -> None:
        code = self.code
        mean = code.fdiv(self._sum_of_squares(), code.sitofp(self.width, FLOAT))
        root = code.intrinsic("llvm.sqrt.f32", FLOAT, code.fadd(mean, constant(FLOAT, norm.eps)))
        inverse = code.fdiv(constant(FLOAT, 1.0), root)
        for lanes, start, stop in parts(code, self.width, _LANES):
            with code.loop(start, stop, lanes) as index:
                value = code.fmul(self._read(index, lanes), spread(code, inverse, lanes))
                if norm.cast_first:
                    value = floats.rounded(code, self.kind, value)
                weight = floats.read(code, self.kind, self.call["weight"], index, lanes)
                if norm.offset:
                    weight = code.fadd(weight, constant(weight.type, float(norm.offset)))
                value = code.fmul(value, weight)
                if biased:
                    bias = floats.read(code, self.kind, self.call["bias"], index, lanes)
                    value = code.fadd(value, bias)
                floats.write(code, self.kind, value, self.out, index)

    def _sum_of_squares(self) -> Value:
        code, sums = self.code, []
        for lanes, start, stop in parts(code, self.width, _LANES):
            kind = vector(FLOAT, lanes)
            here = code.variable(kind, constant(kind, 0.0))
            with code.loop(start, stop, lanes) as index:
                value = self._read(index, lanes)
                square = code.fmul(value, value)
                code.store(code.fadd(code.value(here, kind), square), here)
            sums.append(total(code, code.value(here, kind)))
        return code.fadd(*sums)

    def _read(self, index: Value, lanes: int) -> Value:
        return floats.read(self.code, self.kind, self.values, index, lanes)

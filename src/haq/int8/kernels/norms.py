# mypy: disable-error-code="untyped-decorator"
"""What does a norm give for each token, and which integers stand for that? In one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8.kernels.plans import launch
from haq.int8.kernels.tokens import (
    Int8Tokens,
    blocks_of,
    empty_tokens,
    larger_above,
    larger_below,
    rounded,
    store_grid,
)
from haq.int8.norm import Norm


def norm_tokens(
    x: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None = None,
    asymmetric: bool | None = None,
) -> tuple[Tensor, Int8Tokens | None]:
    """A norm, and its result rounded as `quantize_tokens` would round it.

    Sums are taken in float32, in an order of their own: within a few units of the last place of
    float32 the result is that of any other way to compute it. The integers are exactly those of
    the result that is given.

    Args:
        x: float ``[..., K]``.
        norm: which one.
        weight: ``[K]``, dtype of ``x``.
        bias: ``[K]``, dtype of ``x``.
        asymmetric: as for `quantize_tokens`; None for no integers.

    Returns:
        The shape and dtype of ``x``, and its rounded tokens ``[T, K]``.

    Raises:
        TypeError: a tensor is not float, or of another dtype than ``x``.
        ValueError: a shape does not fit.
        RuntimeError: Triton cannot compile or start a kernel here.
    """
    _check(x, weight, bias)
    x = x.contiguous()
    columns = x.shape[-1]
    count = x.numel() // columns
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = None
    if asymmetric is not None:
        tokens = empty_tokens(count, columns, asymmetric, x.device)
    launch(
        _norm_kernel,
        (count,),
        result,
        None if tokens is None else tokens.integers,
        None if tokens is None else tokens.scale,
        None if tokens is None else tokens.shift,
        x,
        weight,
        bias,
        columns,
        norm.eps,
        CENTERED=norm.centered,
        OFFSET=norm.offset,
        CAST_FIRST=norm.cast_first,
        **blocks_of(columns),
    )
    return result, tokens


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"`x` must be a float tensor, got {x.dtype}.")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"`x` must have shape [..., K], K > 0, got {list(x.shape)}.")
    for name, values in {"weight": weight, "bias": bias}.items():
        if values is None:
            continue
        if values.dtype != x.dtype:
            raise TypeError(f"`{name}` must be {x.dtype}, as `x` is, got {values.dtype}.")
        if values.shape != x.shape[-1:] or not values.is_contiguous():
            raise ValueError(
                f"`{name}` must be a contiguous tensor [{x.shape[-1]}], got shape "
                f"{list(values.shape)} and strides {list(values.stride())}."
            )


@triton.jit
def _norm_kernel(
    results: tl.tensor,
    integers: tl.tensor | None,
    scales: tl.tensor | None,
    shifts: tl.tensor | None,
    inputs: tl.tensor,
    weights: tl.tensor,
    biases: tl.tensor | None,
    columns: tl.tensor,
    eps: tl.tensor,
    CENTERED: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One token. What a long one does not keep in registers is read, and computed, again."""
    token = tl.program_id(0)
    start = token.to(tl.int64) * columns
    size = columns.to(tl.float32)
    mean = 0.0
    if CENTERED:
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            x = tl.load(inputs + start + offsets, mask=offsets < columns, other=0.0)
            total += x.to(tl.float32)
        mean = tl.div_rn(tl.sum(total, 0), size)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(inputs + start + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        difference = tl.where(offsets < columns, x - mean, 0.0)
        squares += difference * difference
    variance = tl.div_rn(tl.sum(squares, 0), size)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    highs = tl.zeros((BLOCK,), tl.int32)
    lows = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        y = _normed(
            results, inputs + start, weights, biases, offsets, columns, mean, inverse, OFFSET,
            CAST_FIRST,
        )  # fmt: skip
        tl.store(results + start + offsets, y, mask=offsets < columns)
        if integers is not None:
            highs = larger_above(highs, y.to(tl.float32), shifts is not None)
            if shifts is not None:
                lows = larger_below(lows, y.to(tl.float32))
    if integers is not None:
        scale, shift = store_grid(highs, lows, token, scales, shifts)
        for first in range(0, columns, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            y = _normed(
                results, inputs + start, weights, biases, offsets, columns, mean, inverse, OFFSET,
                CAST_FIRST,
            )  # fmt: skip
            q = rounded(y.to(tl.float32), scale, shift)
            tl.store(integers + start + offsets, q, mask=offsets < columns)


@triton.jit
def _normed(
    results: tl.tensor,
    inputs: tl.tensor,
    weights: tl.tensor,
    biases: tl.tensor | None,
    offsets: tl.tensor,
    columns: tl.tensor,
    mean: tl.tensor,
    inverse: tl.tensor,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
) -> tl.tensor:
    """Some columns of the result, in its dtype; zero beyond the last one."""
    mask = offsets < columns
    x = tl.load(inputs + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weights + offsets, mask=mask, other=0.0).to(tl.float32)
    if OFFSET == 1:
        weight += 1.0
    y = (x - mean) * inverse
    if CAST_FIRST:
        y = y.to(results.dtype.element_ty).to(tl.float32)
    y *= weight
    if biases is not None:
        y += tl.load(biases + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, y, 0.0).to(results.dtype.element_ty)

# mypy: disable-error-code="untyped-decorator"
"""Which integers stand for a token? Those of `haq.int8.tokens`, in one launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8 import grid
from haq.int8.kernels.plans import launch

_QMAX = tl.constexpr(float(grid.QMAX))
_SMALLEST_SCALE = tl.constexpr(grid.SMALLEST_SCALE)
_SMALLEST_LARGEST = tl.constexpr(grid.SMALLEST_SCALE * grid.QMAX)

# Adding and subtracting 1.5 * 2^23 leaves the nearest integer, ties to even, of what is below 2^22.
_ROUND = tl.constexpr(12582912.0)

# Columns of a token that one program holds at once.
_MOST_COLUMNS = 8192


@dataclass(frozen=True, slots=True)
class Int8Tokens:
    """Integers that stand for tokens: ``(integers + shift) * scale``.

    Attributes:
        integers: int8 ``[T, K]``, contiguous; in [-127, 127], or in [-128, 127] with a shift.
        scale: float32 ``[T, 1]``.
        shift: float32 ``[T, 1]`` of integers; None on the symmetric grid, for zero.
    """

    integers: Tensor
    scale: Tensor
    shift: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Int8Tokens":
        shift = None if self.shift is None else self.shift[rows]
        return Int8Tokens(self.integers[rows], self.scale[rows], shift)


def empty_tokens(count: int, columns: int, asymmetric: bool, device: torch.device) -> Int8Tokens:
    """Room for ``count`` tokens, which a kernel fills."""
    scale = torch.empty(count, 1, dtype=torch.float32, device=device)
    return Int8Tokens(
        torch.empty(count, columns, dtype=torch.int8, device=device),
        scale,
        torch.empty_like(scale) if asymmetric else None,
    )


def blocks_of(columns: int) -> dict[str, int]:
    """How a program goes through the columns of a token."""
    block = min(triton.next_power_of_2(columns), _MOST_COLUMNS)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def quantize_tokens(tokens: Tensor, asymmetric: bool = False) -> Int8Tokens:
    """What `haq.int8.tokens.round_tokens` gives, bit for bit, as int8 and in one launch.

    A quotient that is not finite has no integer: it becomes 0, and the token's scale, NaN or
    infinite, still spoils its outputs and no others.

    Args:
        tokens: float ``[T, K]``.
        asymmetric: give each token a zero point beside its scale.

    Raises:
        TypeError: ``tokens`` is not float.
        ValueError: ``tokens`` is not a matrix with columns.
    """
    if not tokens.is_floating_point():
        raise TypeError(f"`tokens` must be a float tensor, got {tokens.dtype}.")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"`tokens` must be a matrix [T, K], K > 0, got {list(tokens.shape)}.")
    tokens = tokens.contiguous()
    count, columns = tokens.shape
    result = empty_tokens(count, columns, asymmetric, tokens.device)
    launch(
        _quantize_kernel,
        (count,),
        tokens,
        result.integers,
        result.scale,
        result.shift,
        columns,
        **blocks_of(columns),
    )
    return result


@triton.jit
def _quantize_kernel(
    tokens: tl.tensor,
    integers: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor | None,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One token: its largest magnitudes below and above zero, then its integers."""
    token = tl.program_id(0)
    start = token.to(tl.int64) * columns
    highs = tl.zeros((BLOCK,), tl.int32)
    lows = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(tokens + start + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        highs = larger_above(highs, x, shifts is not None)
        if shifts is not None:
            lows = larger_below(lows, x)
    scale, shift = store_grid(highs, lows, token, scales, shifts)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(tokens + start + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        tl.store(integers + start + offsets, rounded(x, scale, shift), mask=offsets < columns)


# Floats without a sign are in the order of their bits, and NaN is the largest of them.


@triton.jit
def larger_above(highs: tl.tensor, x: tl.tensor, SHIFTED: tl.constexpr) -> tl.tensor:
    """Bits of the largest magnitudes so far; with a zero point of those above zero only."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if SHIFTED:
        bits = tl.where(x < 0, 0, bits)
    return tl.maximum(highs, bits)


@triton.jit
def larger_below(lows: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Bits of the largest magnitudes so far of what is below zero."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(lows, tl.where(x > 0, 0, bits))


@triton.jit
def store_grid(
    highs: tl.tensor,
    lows: tl.tensor,
    token: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor | None,
) -> tuple[tl.tensor, tl.tensor]:
    """The scale and the shift of a token, which are also stored."""
    high = tl.max(highs, 0).to(tl.float32, bitcast=True)
    # `tl.where`, because `tl.maximum` and `tl.minimum` may drop NaN.
    if shifts is None:
        shift = 0.0
        scale = tl.div_rn(tl.where(high < _SMALLEST_LARGEST, _SMALLEST_LARGEST, high), _QMAX)
    else:
        low = -tl.max(lows, 0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(high - low, 255.0)
        scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
        shift = (tl.div_rn(low, scale) + _ROUND) - _ROUND + 128.0
        tl.store(shifts + token, shift)
    tl.store(scales + token, scale)
    return scale, shift


@triton.jit
def rounded(x: tl.tensor, scale: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """The integers of some columns of a token, int8."""
    q = (tl.div_rn(x, scale) + _ROUND) - _ROUND - shift
    # Where both ends lie on ties, rounding both away from zero needs one integer too many.
    q = tl.where(q > _QMAX, _QMAX, q)
    return tl.where(tl.abs(q) <= 128.0, q, 0.0).to(tl.int8)

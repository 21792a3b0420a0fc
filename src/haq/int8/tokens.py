"""Tokens on the grid: what the int8 product reads, computed as each token arrives.

Most inputs are as often negative as positive, and the symmetric grid fits them. What comes out of
an activation is not: a ReLU gives nothing below zero, and a token of gated values mostly has its
largest on one side. Such a token is better off with a zero point: the 256 integers then span the
range from its smallest value to its largest, zero included. The products cost the same, because
x86 multiplies unsigned bytes anyway; around them it is one addition more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haq.int8 import grid

_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True, slots=True)
class RoundedTokens:
    """Integers that stand for tokens: ``(integers + shift) * scale``.

    Attributes:
        integers: float32 or int8 ``[T, K]``, in [-127, 127], or in [-128, 127] with a shift. To be
            read only: several layers do.
        scale: float32 ``[T, 1]``.
        shift: float32 ``[T, 1]`` of integers; None on the symmetric grid, for zero.
    """

    integers: Tensor
    scale: Tensor
    shift: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> "RoundedTokens":
        shift = None if self.shift is None else self.shift[rows]
        return RoundedTokens(self.integers[rows], self.scale[rows], shift)

    def steps(self) -> Tensor:
        """How many times its scale each number is: integers in [-255, 255], ``[T, K]``."""
        return self.integers if self.shift is None else self.integers + self.shift

    def dequantize(self) -> Tensor:
        """What the integers stand for: float32 ``[T, K]``."""
        return self.steps() * self.scale


# Tokens that are rounded while they are in the cache.
_ROWS_AT_ONCE = 64


def rounded_rows(tokens: Tensor, asymmetric: bool = False) -> RoundedTokens:
    """`round_tokens` for products: the integers of a long prompt are int8, a quarter of the memory.

    Args:
        tokens: float ``[T, K]``, contiguous; unchanged.
        asymmetric: as for `round_tokens`.
    """
    count = len(tokens)
    if count <= _ROWS_AT_ONCE:
        return round_tokens(tokens, asymmetric)
    integers = torch.empty_like(tokens, dtype=torch.int8)
    scale = tokens.new_empty(count, 1, dtype=torch.float32)
    shift = torch.empty_like(scale) if asymmetric else None
    for start in range(0, count, _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        rounded = round_tokens(tokens[here], asymmetric)
        integers[here], scale[here] = rounded.integers, rounded.scale
        if shift is not None and rounded.shift is not None:
            shift[here] = rounded.shift
    return RoundedTokens(integers, scale, shift)


def round_tokens(tokens: Tensor, asymmetric: bool = False) -> RoundedTokens:
    """Round every token with a scale of its own, and with a zero point if ``asymmetric``.

    Eager torch pays microseconds per operation, as much as the product of a small weight itself,
    and each new tensor of a long prompt costs more than what is computed in it: these are the
    shortest chains, mostly in place. On the symmetric grid the integers are those of
    `grid.quantize_rows`; only the scale of a token of zeros is another one.

    Args:
        tokens: float ``[T, K]``, contiguous; unchanged.
        asymmetric: span each token's own range, zero included.

    Examples:
        >>> round_tokens(torch.tensor([[1.27, -0.5]])).integers
        tensor([[127., -50.]])
        >>> round_tokens(torch.tensor([[2.55, 0.0, 1.0]]), asymmetric=True).integers
        tensor([[ 127., -128.,  -28.]])
    """
    values = tokens if tokens.dtype == torch.float32 else tokens.float()
    if asymmetric:
        return _with_zero_point(values)
    largest = values.abs().amax(-1, keepdim=True)
    scale = largest.clamp_(min=grid.SMALLEST_SCALE * grid.QMAX).div_(grid.QMAX)
    return RoundedTokens(_divided(values, scale, tokens).round_(), scale)


def _with_zero_point(values: Tensor) -> RoundedTokens:
    low = values.amin(-1, keepdim=True).clamp_(max=0)
    scale = values.amax(-1, keepdim=True).clamp_(min=0).sub_(low)
    scale.div_(_HIGHEST - _LOWEST).clamp_(min=grid.SMALLEST_SCALE)
    shift = low.div_(scale).round_().sub_(_LOWEST)
    # Where both ends lie on ties, rounding both away from zero would need one integer too many.
    integers = (values / scale).round_().sub_(shift).clamp_(max=_HIGHEST)
    return RoundedTokens(integers, scale, shift)


def _divided(values: Tensor, scale: Tensor, tokens: Tensor) -> Tensor:
    """``values / scale``, in place unless that would write to the caller's tokens."""
    return values / scale if values is tokens else values.div_(scale)


def row_sums(weight: Tensor, scale: Tensor) -> Tensor:
    """What one step of every input adds to an output: float32 ``[N]``.

    Args:
        weight: int8 ``[N, K]``.
        scale: float32 ``[N, 1]``.

    Examples:
        >>> row_sums(torch.tensor([[3, -1]], dtype=torch.int8), torch.tensor([[0.5]]))
        tensor([1.])
    """
    return grid.sums_of_rows(weight).float() * scale.view(-1)

"""The symmetric int8 grid: scales, rounding onto it, and back.

An int8 tensor here always means integers in [-127, 127] times a positive float32 scale, without a
zero point. -128 is left out so that the grid is symmetric: ``quantize(-x) == -quantize(x)``.

Two shapes of scale are used. A weight ``[N, K]`` has one scale per output channel, ``[N, 1]``; an
input ``[..., K]`` has one scale per token, ``[..., 1]``, computed when it arrives. Both are the
largest magnitude of a row over 127, so one function serves both. A row of zeros gets scale 1, so
that nothing is ever divided by zero.
"""

import torch
from torch import Tensor

QMAX = 127
"""Largest integer of the grid; the smallest is ``-QMAX``."""

# Below this a float32 scale is subnormal: its reciprocal overflows and its rounding is coarse. Rows
# this small are zero for every purpose a network has.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def row_scale(values: Tensor) -> Tensor:
    """Scale of each row on the grid: the largest magnitude of the last dimension over 127.

    Args:
        values: float tensor ``[..., K]``.

    Returns:
        float32 ``[..., 1]``, strictly positive for finite input. Rows of zeros get 1.

    Examples:
        >>> row_scale(torch.tensor([[0.0, -2.54], [0.0, 0.0]]))
        tensor([[0.0200],
                [1.0000]])
    """
    scale = largest_magnitude(values, -1).float() / QMAX
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)


def largest_magnitude(values: Tensor, dim: int) -> Tensor:
    """The largest ``|x|`` along a dimension, which is kept; NaN where there is one.

    Examples:
        >>> largest_magnitude(torch.tensor([[0.5, -2.0], [1.0, 0.0]]), 0)
        tensor([[1., 2.]])
    """
    # Two passes that write nothing of the size of the weight. The infinity norm and `aminmax` would
    # be one, but torch does not vectorize them: they are 10 to 15 times slower.
    return torch.maximum(values.amin(dim, keepdim=True).neg_(), values.amax(dim, keepdim=True))


def quantize(values: Tensor, scale: Tensor) -> Tensor:
    """Nearest integers of the grid, ties to even.

    Args:
        values: float tensor ``[..., K]``.
        scale: float32 that broadcasts against ``values``, strictly positive.

    Returns:
        int8, the shape of ``values``. Values beyond the grid's ends are clamped to them.

    Examples:
        >>> quantize(torch.tensor([[0.0, 0.25, -1.0]]), torch.tensor([[0.1]]))
        tensor([[  0,   2, -10]], dtype=torch.int8)
    """
    return (values.float() / scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row with its own scale: tokens of an input, output channels of a weight.

    Args:
        values: float tensor ``[..., K]``.

    Returns:
        int8 ``[..., K]`` and its float32 scale ``[..., 1]``. The error of every element is at most
        half of its row's scale.

    Examples:
        >>> quantize_rows(torch.tensor([[1.27, -0.5]]))
        (tensor([[127, -50]], dtype=torch.int8), tensor([[0.0100]]))
    """
    scale = row_scale(values)
    return quantize(values, scale), scale


# As many as a core's cache holds as int32, which torch makes of int8 to add it up.
_ROWS_AT_ONCE = 64


def sums_of_rows(integers: Tensor) -> Tensor:
    """The sum of each row: int32 ``[N]``.

    Args:
        integers: int8 ``[N, K]``.

    Examples:
        >>> sums_of_rows(torch.tensor([[3, -1], [127, 127]], dtype=torch.int8))
        tensor([  2, 254], dtype=torch.int32)
    """
    if not integers.is_cpu:
        return integers.sum(1, dtype=torch.int32)
    sums = integers.new_empty(len(integers), dtype=torch.int32)
    for start in range(0, len(integers), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        torch.sum(integers[here], 1, dtype=torch.int32, out=sums[here])
    return sums


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """The float32 values that int8 integers stand for.

    Args:
        integers: int8 ``[..., K]``.
        scale: float32 that broadcasts against ``integers``.

    Examples:
        >>> dequantize(torch.tensor([[127, -50]], dtype=torch.int8), torch.tensor([[0.5]]))
        tensor([[ 63.5000, -25.0000]])
    """
    return integers.float() * scale


def fake_quantize_rows(values: Tensor) -> Tensor:
    """What is left of ``values`` after a trip to int8 and back, one scale per row.

    Used wherever the effect of the grid is studied in float: the search for scales and the Hessian.
    Bit-identical to ``dequantize(*quantize_rows(values))``, without the int8 copy.

    Args:
        values: float tensor ``[..., K]``.

    Returns:
        The shape and dtype of ``values``.

    Examples:
        >>> fake_quantize_rows(torch.tensor([[127.0, 0.4, -3.6]]))
        tensor([[127.,   0.,  -4.]])
    """
    return fake_quantize_rows_(values.to(torch.float32, copy=True)).to(values.dtype)


def fake_quantize_rows_(values: Tensor) -> Tensor:
    """`fake_quantize_rows` in place, of float32."""
    scale = row_scale(values)
    # Within its own scale no value can pass the grid's ends, so there is nothing to clamp.
    return values.div_(scale).round_().mul_(scale)

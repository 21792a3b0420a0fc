"""A large weight on the grid, without anything in between that is as large as the weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from haq.int8 import grid, matmul
from haq.int8.llvm.pages import new_bytes
from haq.int8.llvm.weight import TYPES

# Of a matrix: as many as a core's cache holds.
_ROWS_AT_ONCE = 64


def quantize_matrix(
    weight: Tensor,
    factors: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`haq.int8.grid.quantize_rows` of a large weight: in one call of a kernel, or rows by rows.

    Args:
        weight: float ``[N, K]``.
        factors: float32 ``[K]``, of its columns; None for ones.
        out: int8 ``[N, K]`` and float32 ``[N, 1]`` to write to; memory that was used before is
            there faster than new one.

    Returns:
        int8 ``[N, K]`` and its scale, float32 ``[N, 1]``.

    Examples:
        >>> quantize_matrix(torch.tensor([[1.27, -0.5]]), torch.tensor([1.0, 2.0]))
        (tensor([[ 127, -100]], dtype=torch.int8), tensor([[0.0100]]))
    """
    if out is None:
        integers = new_integers(weight.shape, weight.device)
        out = integers, weight.new_empty(len(weight), 1, dtype=torch.float32)
    if _plain(weight) and matmul.compiles():
        from haq.int8.llvm.rows import quantize_rows

        quantize_rows(weight, factors, *out)
        return out
    integers, scale = out
    at_once = _ROWS_AT_ONCE if weight.is_cpu else max(1, len(weight))
    for start in range(0, len(weight), at_once):
        here = slice(start, start + at_once)
        rows = weight[here] if factors is None else weight[here] * factors
        integers[here], scale[here] = grid.quantize_rows(rows)
    return out


def new_integers(shape: Sequence[int], device: torch.device) -> Tensor:
    """Memory for a weight int8 ``[N, K]``; a layer on the CPU that is made of it leaves it there.

    Examples:
        >>> new_integers((2, 3), torch.device("cpu")).dtype
        torch.int8
    """
    if device.type == "cpu":
        return new_bytes(shape)
    return torch.empty(shape, dtype=torch.int8, device=device)


def _plain(weight: Tensor) -> bool:
    return weight.is_cpu and weight.is_contiguous() and weight.dtype in TYPES

# mypy: disable-error-code="untyped-decorator"
"""What does every product compute, and of which operands?"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """The operands, in the order in which all kernels take them."""

    integers: Tensor
    weight: Tensor
    weight_scale: Tensor
    token_scale: Tensor | None = None
    shift: Tensor | None = None
    row_sums: Tensor | None = None
    bias: Tensor | None = None

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.integers, self.weight

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self.weight_scale, self.token_scale, self.shift, self.row_sums, self.bias


@triton.jit
def sums(
    token_rows: tl.tensor,
    token_mask: tl.tensor,
    weight_rows: tl.tensor,
    weight_mask: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    columns: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """int32 ``[BLOCK_M, BLOCK_N]``: sums over the columns from ``start``, up to ``stop``.

    The rows are pointers. ``EVEN`` says that BLOCK_K divides the number of columns.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(start, stop, BLOCK_K):
        offsets = first + tl.arange(0, BLOCK_K)
        x_mask = token_mask[:, None]
        w_mask = weight_mask[None, :]
        if not EVEN:
            x_mask = x_mask & (offsets < columns)[None, :]
            w_mask = w_mask & (offsets < columns)[:, None]
        x = tl.load(token_rows[:, None] + offsets[None, :], mask=x_mask, other=0)
        w = tl.load(weight_rows[None, :] + offsets[:, None], mask=w_mask, other=0)
        total = tl.dot(x, w, total)
    return total


@triton.jit
def scaled(
    sums: tl.tensor,
    tokens: tl.tensor,
    token_mask: tl.tensor,
    outs: tl.tensor,
    out_mask: tl.tensor,
    weight_scales: tl.tensor,
    token_scales: tl.tensor | None,
    shifts: tl.tensor | None,
    row_sums: tl.tensor | None,
    biases: tl.tensor | None,
) -> tl.tensor:
    """What follows the sums, in the order of `haq.int8.matmul`."""
    result = sums.to(tl.float32) * tl.load(weight_scales + outs, mask=out_mask)[None, :]
    if shifts is not None:
        shift = tl.load(shifts + tokens, mask=token_mask)
        result += shift[:, None] * tl.load(row_sums + outs, mask=out_mask)[None, :]
    if token_scales is not None:
        result *= tl.load(token_scales + tokens, mask=token_mask)[:, None]
    if biases is not None:
        result += tl.load(biases + outs, mask=out_mask)[None, :]
    return result

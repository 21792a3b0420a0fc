"""From float weights to int8: to nearest, and with the error of each column repaid by the next.

Both use the symmetric grid of `haq.int8.grid` with one scale per output channel, and both are pure
functions. They minimise different things. Rounding to nearest minimises |W - Q|. Hessian-aware
rounding minimises the error of the layer's output on real inputs,

    tr((W - Q) H (W - Q)^T),

and may take the farther integer to get there: its |W - Q| is larger, its output error smaller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from haq.int8 import grid, matmul
from haq.int8.matrix import new_integers
from haq.quantization.outer import debts_of

# Columns are rounded one by one within a block of this many, and what those before owe to a block
# is one product: the same arithmetic in another order, a matrix product instead of many rank-one
# updates.
_BLOCK, _BLOCK_OF_KERNEL = 128, 256


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every weight to its nearest integer.

    Args:
        weight: float ``[N, K]``.

    Returns:
        int8 ``[N, K]`` and its scale, float32 ``[N, 1]``.
    """
    return grid.quantize_rows(weight)


def round_with_compensation(weight: Tensor, scale: Tensor, root: Tensor) -> Tensor:
    """Round column by column; what the columns before k did wrong, column k makes good.

    With ``H = R R^T`` the error is ``|D R|^2``, D = W - Q, and as R is upper triangular, column k
    of D R is ``d_k R_kk`` and the sum over j < k of ``d_j R_jk``. Once the columns before k are
    rounded, the integer next to ``w_k + sum_j d_j R_jk / R_kk`` makes it smallest. The integers are
    those of GPTQ (arXiv 2210.17323, algorithm 1, with the order of columns and the scales fixed
    beforehand), which updates the weights that are left by rows of a root of the inverse of H: that
    the two are one is shown in QuIP (arXiv 2307.13304, section 3). This way needs no inverse.

    Args:
        weight: float ``[N, K]``; unchanged.
        scale: float32 ``[N, 1]``, positive.
        root: R ``[K, K]``, upper triangular with ``H = R R^T``. Its dtype is computed in.

    Returns:
        int8 ``[N, K]``.

    Examples:
        The two inputs are always equal, so rounding 0.4 down by 0.4 is repaid by rounding the
        second 0.4 up. Their sum, which is all that the output sees, is 0.8 before and 1 after; to
        nearest it would be 0.

        >>> from haq.quantization.hessian import triangular_root
        >>> root = triangular_root(torch.ones(2, 2), damping=0.01).upper
        >>> round_with_compensation(torch.tensor([[0.4, 0.4]]), torch.ones(1, 1), root)
        tensor([[0, 1]], dtype=torch.int8)
    """
    weight = weight.to(root.dtype).contiguous()
    integers = new_integers(weight.shape, weight.device)
    debts = debts_of(weight)
    round_block, size = _round_block, _BLOCK
    if weight.is_cpu and weight.dtype == torch.float32 and matmul.compiles():
        round_block, size = _round_by_kernel, _BLOCK_OF_KERNEL
    for start in range(0, len(root), size):
        before, here = slice(start), slice(start, start + size)
        shares = root[: here.stop, here] / root.diagonal()[here]
        block = Block(weight[:, here], scale, shares[start:], debts.owed(shares[before]))
        round_block(block, integers[:, here], debts.room(block.weight.shape[1]))
        debts.take()
    return integers


@dataclass(frozen=True)
class Block:
    """Columns that are rounded one by one.

    Attributes:
        weight: ``[N, B]``.
        scale: float32 ``[N, 1]``.
        shares: upper triangular ``[B, B]``: how much of a column's difference later ones owe.
        owed: ``[B, N]``: what the columns owe to those before the block.
    """

    weight: Tensor
    scale: Tensor
    shares: Tensor
    owed: Tensor


def _round_block(block: Block, integers: Tensor, differences: Tensor) -> None:
    """Write integers ``[N, B]`` and differences ``[B, N]`` of a block."""
    # Transposed, a column of W is contiguous, and so is what is added to it.
    columns = block.weight.T.clone(memory_format=torch.contiguous_format)
    targets = block.owed
    targets += columns
    step = block.scale.to(columns.dtype).reshape(-1)
    rounded = torch.empty(columns.shape, dtype=torch.int8, device=columns.device)
    for k in range(len(columns)):
        nearest = (targets[k] / step).round_().clamp_(-grid.QMAX, grid.QMAX)
        rounded[k] = nearest
        difference = columns[k].sub_(nearest.mul_(step))
        targets[k + 1 :].addr_(block.shares[k, k + 1 :], difference)
    integers.copy_(rounded.T)
    differences.copy_(columns)


def _round_by_kernel(block: Block, integers: Tensor, differences: Tensor) -> None:
    """`_round_block` in one call."""
    from haq.int8.llvm.columns import round_columns

    round_columns(block.weight, block.scale, block.shares, block.owed, integers, differences)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T): the squared output error, a scalar in the dtype of ``hessian``.

    Args:
        weight: float ``[N, K]``.
        rounded: the dequantized weights, float ``[N, K]``.
        hessian: ``[K, K]``.
    """
    difference = (weight - rounded).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum()

"""From float weights to int8: to nearest, and with the error of each column repaid by the next.

Both use the symmetric grid of `haq.int8.grid` with one scale per output channel, and both are pure
functions. They minimise different things. Rounding to nearest minimises |W - Q|. Hessian-aware
rounding minimises the error of the layer's output on real inputs,

    tr((W - Q) H (W - Q)^T),

and may take the farther integer to get there: its |W - Q| is larger, its output error smaller.
"""

import torch
from torch import Tensor

from haq.int8 import grid

# Columns are updated one by one within a block of this many, and the rest of the matrix once per
# block: the same arithmetic in another order, a matrix product instead of many rank-one updates.
_BLOCK = 128


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Every weight to its nearest integer.

    Args:
        weight: float ``[N, K]``.

    Returns:
        int8 ``[N, K]`` and its scale, float32 ``[N, 1]``.
    """
    return grid.quantize_rows(weight)


def round_with_compensation(weight: Tensor, scale: Tensor, upper: Tensor) -> Tensor:
    """Round column by column; each column's error is made good by the columns not yet rounded.

    After column k is rounded, with error e = w_k - q_k ``[N]``, the weights j > k that minimise the
    output error given that error are w_j - (e / U_kk) U_kj: one step of Optimal Brain Surgeon with
    the inverse Hessian restricted to the columns left, which is what the rows of U hold (GPTQ,
    arXiv 2210.17323, algorithm 1; the order of columns and the scales are fixed beforehand).

    Args:
        weight: float ``[N, K]``; unchanged.
        scale: float32 ``[N, 1]``, positive.
        upper: U ``[K, K]``, upper triangular with ``H^-1 = U^T U``. Its dtype is computed in.

    Returns:
        int8 ``[N, K]``.

    Examples:
        The two inputs are always equal, so rounding 0.4 down by 0.4 is repaid by rounding the
        second 0.4 up. Their sum, which is all that the output sees, is 0.8 before and 1 after; to
        nearest it would be 0.

        >>> from haq.quantization.hessian import inverse_factor
        >>> upper = inverse_factor(torch.ones(2, 2), damping=0.01).upper
        >>> round_with_compensation(torch.tensor([[0.4, 0.4]]), torch.ones(1, 1), upper)
        tensor([[0, 1]], dtype=torch.int8)
    """
    # Transposed, a column of W is contiguous, and so is what its error is added to. A copy always:
    # the transpose of a `Conv1D`'s weight is contiguous as it is.
    columns = weight.T.to(upper.dtype, copy=True, memory_format=torch.contiguous_format)  # [K, N]
    step = scale.to(upper.dtype).reshape(-1)  # [N]
    rounded = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        errors = columns.new_empty(stop - start, columns.shape[1])
        for k in range(start, stop):
            integers = (columns[k] / step).round_().clamp_(-grid.QMAX, grid.QMAX)
            rounded[k] = integers.to(torch.int8)
            error = columns[k].sub_(integers.mul_(step)).div_(upper[k, k])
            columns[k + 1 : stop].addr_(upper[k, k + 1 : stop], error, alpha=-1)
            errors[k - start] = error
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return rounded.T.contiguous()


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T): the squared output error, a scalar in the dtype of ``hessian``.

    Args:
        weight: float ``[N, K]``.
        rounded: the dequantized weights, float ``[N, K]``.
        hessian: ``[K, K]``.
    """
    difference = (weight - rounded).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum()

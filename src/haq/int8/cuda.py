"""The int8 product of an NVIDIA GPU: ``torch._int_mm``, whose cuBLASLt wants certain shapes.

More than 16 rows, and both other dimensions multiples of 8. Zero rows and columns change no sum, so
matrices are padded with them and the result is cut: exact, and ordinary shapes need no padding of
the weight. The arithmetic around the product is plain torch and runs, and is tested, on any device.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_MIN_ROWS = 17
_MULTIPLE = 8


class PaddedWeight:
    """A plain int8 weight whose sides are multiples of 8, multiplied with at least 17 tokens.

    Args:
        weight: int8 ``[N, K]``.
        scale: float32 ``[N, 1]``.
        int_mm: product of int8 ``[M, K]`` and ``[K, N]`` in int32, with ``torch._int_mm``'s wishes.
    """

    backend = "int_mm"

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        int_mm: Callable[[Tensor, Tensor], Tensor] = torch._int_mm,
    ) -> None:
        self._rows, self._columns = weight.shape
        self._weight = zero_pad(weight, _round_up(self._rows), _round_up(self._columns))
        self._scale = scale.view(1, -1)
        self._int_mm = int_mm

    def product(self, rounded: Tensor) -> Tensor:
        tokens = len(rounded)
        padded = zero_pad(rounded.to(torch.int8), max(tokens, _MIN_ROWS), self._weight.shape[1])
        sums = self._int_mm(padded, self._weight.t())  # [>= T, >= N] int32
        return sums[:tokens, : self._rows].float().mul_(self._scale)

    def unpack(self) -> Tensor:
        return self._weight[: self._rows, : self._columns].contiguous()

    def write(self, weight: Tensor) -> None:
        """Take the numbers of another weight of the same shape, from any device."""
        self._weight[: self._rows, : self._columns].copy_(weight, non_blocking=True)


def zero_pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``matrix`` with zero rows below and zero columns to the right, or itself if it fits already.

    Examples:
        >>> zero_pad(torch.ones(1, 2), 2, 3)
        tensor([[1., 1., 0.],
                [0., 0., 0.]])
    """
    if matrix.shape == (rows, columns):
        return matrix
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def _round_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE

"""The int8 products of an NVIDIA GPU: Triton's kernels, or ``torch._int_mm`` where they fail.

:mod:`haq.int8.kernels` has the kernels. cuBLASLt, behind ``torch._int_mm``, wants certain shapes:
more than 16 rows, and both other dimensions multiples of 8. Zero rows and columns change no sum, so
matrices are padded with them and the result is cut: exact, and ordinary shapes need no padding of
the weight. The arithmetic around that product is plain torch and runs, and is tested, on any
device.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from haq.int8.once import keep, once, state_of

if TYPE_CHECKING:  # Triton comes with torch for a GPU, and nobody else is to wait for its import.
    from haq.int8.kernels import Int8Tokens

_MIN_ROWS = 17
_MULTIPLE = 8

_TOKENS = "int8 tokens of Triton's kernels"


class _Rounded:
    """The int8 tokens of one tensor: each kind is made when it is first asked for.

    Args:
        asked: where it is noted which kinds were asked for.
    """

    def __init__(self, asked: set[bool]) -> None:
        self.asked = asked
        self.made: dict[bool, Int8Tokens] = {}

    def of(self, x: Tensor, asymmetric: bool) -> "Int8Tokens":
        from haq.int8 import kernels

        self.asked.add(asymmetric)
        if asymmetric not in self.made:
            rows = x.reshape(-1, x.shape[-1])
            self.made[asymmetric] = kernels.quantize_tokens(rows, asymmetric)
        return self.made[asymmetric]


def tokens_of(x: Tensor, asymmetric: bool, reader: object) -> "Int8Tokens":
    """The int8 tokens of a tensor, made once for all who read it one after the other.

    Args:
        x: float ``[..., K]``.
        asymmetric: with a zero point for each token.
        reader: who asks, as for `once`.

    Returns:
        ``[T, K]``, to be read only.
    """
    return once(x, _TOKENS, reader, lambda _: _Rounded(set())).of(x, asymmetric)


def leave_tokens(x: Tensor, tokens: "Int8Tokens | None", asked: set[bool]) -> None:
    """Leave tokens for who reads a tensor next with `tokens_of`.

    Args:
        x: a tensor that nobody has seen yet; of no inference mode.
        tokens: of it; None if there are none, and only the asking is to be noted.
        asked: the kinds of tokens that are asked for are added to it: False, True with zero points.
    """
    rounded = _Rounded(asked)
    if tokens is not None:
        rounded.made[tokens.shift is not None] = tokens
    keep(x, _TOKENS, rounded, state_of(x))


def whole(x: Tensor) -> Tensor:
    """The tensor that ``x`` is another view of, with the same tokens in the same memory, or ``x``.

    Models flatten batches of sequences before their experts, and what reads the same memory as
    another layer is then another object.

    Examples:
        >>> x = torch.ones(2, 3, 4)
        >>> whole(x.view(6, 4)) is x, whole(x[1]) is x
        (True, False)
    """
    base = x._base
    same = (
        base is not None
        and base.shape[-1:] == x.shape[-1:]
        and (base.numel(), base.dtype, base.data_ptr()) == (x.numel(), x.dtype, x.data_ptr())
        and base.is_contiguous()
        and x.is_contiguous()
    )
    return base if base is not None and same else x


class TritonWeight:
    """A plain int8 weight, multiplied by the kernels of :mod:`haq.int8.kernels`.

    Args:
        weight: int8 ``[N, K]``, contiguous.
        scale: float32 ``[N, 1]``.

    Raises:
        ImportError: Triton is not installed.
    """

    backend = "triton"

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        from haq.int8 import kernels

        self._kernels = kernels
        self._weight = weight
        self._scale = scale

    def product(self, rounded: Tensor) -> Tensor:
        return self._kernels.int8_product(rounded.to(torch.int8), self._weight, self._scale)

    def linear(self, x: Tensor, bias: Tensor | None, row_sums: Tensor | None) -> Tensor:
        """All of `haq.int8.matmul.linear`, in one or two launches, and one for the tokens.

        Args:
            x: float ``[..., K]``.
            bias: float32 ``[N]``.
            row_sums: float32 ``[N]``, for tokens with a zero point.

        Returns:
            ``[..., N]``, dtype of ``x``.
        """
        tokens = tokens_of(x, row_sums is not None, self)
        result = self._kernels.int8_linear(
            tokens, self._weight, self._scale, row_sums, bias, x.dtype
        )
        return result.view(*x.shape[:-1], result.shape[-1])

    def unpack(self) -> Tensor:
        return self._weight

    def write(self, weight: Tensor) -> None:
        """Take the numbers of another weight of the same shape, from any device."""
        self._weight.copy_(weight, non_blocking=True)


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

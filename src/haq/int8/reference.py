"""What a backend must do, a slow one that does it anywhere, and the test that tells.

The slow one is plain torch. No device but the CPU multiplies integer matrices there, so it takes
the product in float32 and keeps it exact by its length: products of int8 are at most 2^14, float32
holds every integer up to 2^24, so a sum of 1024 of them is exact in whatever order it is taken.
Longer rows are cut into pieces of that length whose sums are added in int32. Reduced precision
modes (TF32, bf16) do no harm: int8 fits their 8 bits of significand, and they too add in float32.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from haq.int8 import grid

EXACT_LENGTH = 2**24 // (128 * 128)
"""So many products of int8 float32 adds without an error, in whatever order."""


class PackedWeight(Protocol):
    """An int8 weight in the layout of one backend, with the scales of its rows."""

    @property
    def backend(self) -> str:
        """Name of the backend."""

    def product(self, rounded: Tensor) -> Tensor:
        """Exact integer sums, times the scales of the weight.

        Args:
            rounded: float32 or int8 ``[T, K]``, integers in [-128, 127], contiguous; unchanged.

        Returns:
            float32 ``[T, N]``, a new tensor: ``float(sum) * scale``, rounded in this order.
        """

    def unpack(self) -> Tensor:
        """The weight, int8 ``[N, K]``, bit for bit. A copy where the layout differs."""


@dataclass(frozen=True, eq=False)
class PlainWeight:
    """A weight kept as it is, for products that read plain int8 tensors.

    Attributes:
        backend: name of the backend whose product this is.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N, 1]``.
        int_product: int8 ``[T, K]`` and ``[N, K]``, contiguous, to int32 ``[T, N]``.
    """

    backend: str
    weight: Tensor
    scale: Tensor
    int_product: Callable[[Tensor, Tensor], Tensor]

    def product(self, rounded: Tensor) -> Tensor:
        sums = self.int_product(rounded.to(torch.int8), self.weight)  # [T, N] int32
        return sums.float().mul_(self.scale.view(1, -1))

    def unpack(self) -> Tensor:
        return self.weight

    def write(self, weight: Tensor) -> None:
        """Take the numbers of another weight of the same shape, from any device."""
        self.weight.copy_(weight, non_blocking=True)


def pack(weight: Tensor, scale: Tensor) -> PlainWeight:
    """Weight int8 ``[N, K]`` and scale float32 ``[N, 1]``, multiplied by :func:`int_product`."""
    return PlainWeight("reference", weight, scale, int_product)


def int_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product of two int8 matrices that share their last dimension.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[N, K]``, on the same device.

    Returns:
        int32 ``[M, N]``: ``a @ b.T``. Below K = 131 072 no sum can leave int32.

    Examples:
        >>> int_product(torch.tensor([[127, -128]]).char(), torch.tensor([[2, -1], [0, 1]]).char())
        tensor([[ 382, -128]], dtype=torch.int32)
    """
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    if a.is_meta:
        return total
    with torch.autocast(a.device.type, enabled=False):  # It would return bfloat16 sums.
        for start in range(0, a.shape[1], EXACT_LENGTH):
            piece = slice(start, start + EXACT_LENGTH)
            total += (a[:, piece].float() @ b[:, piece].float().t()).to(torch.int32)
    return total


# Odd sides, so that every kernel meets its edges. K is the largest prime for which all sums of
# [-128, 127] times [-128, 127] stay below 2^24, where float32 still tells integers apart.
_N, _K = 37, 1021


def difference(pack: Callable[[Tensor, Tensor], PackedWeight], device: torch.device) -> str:
    """How a backend differs from int64 arithmetic on ``device``, in words; empty if it does not.

    Args:
        pack: weight int8 ``[N, K]`` and scale float32 ``[N, 1]`` to a packed weight.
        device: where to multiply. The expected sums are always taken on the CPU.

    Examples:
        >>> difference(pack, torch.device("cpu"))
        ''
    """
    with torch.device("cpu"):  # whatever the default is
        weight, inputs = _extreme_integers()
        scale = (2 ** (torch.arange(_N) % 5)).float().view(-1, 1)  # [N, 1]
        expected = (inputs.long() @ weight.long().t()).float() * scale.view(1, -1)  # [T, N]
    packed = pack(weight.to(device), scale.to(device))
    if not torch.equal(packed.unpack().cpu(), weight):
        return "it does not give a packed weight back unchanged"
    rows = (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 5), slice(0, len(inputs)))
    for tokens, dtype in itertools.product(rows, (torch.float32, torch.int8)):
        product = packed.product(inputs[tokens].to(device, dtype)).cpu()
        wrong = int((product != expected[tokens]).sum())
        if wrong:
            return (
                f"not exact on this machine: {wrong} of {product.numel()} sums of "
                f"{len(product)} tokens differ from int64 arithmetic"
            )
    return ""


def _extreme_integers() -> tuple[Tensor, Tensor]:
    """Weight int8 ``[N, K]`` and inputs int8 ``[T, K]``: patterns that saturate, random rows."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.full((_K,), grid.QMAX, dtype=torch.int8)
    alternating = largest.clone()
    alternating[1::2] *= -1
    patterns = torch.stack([largest, -largest, alternating, -alternating])
    lowest = torch.full((1, _K), -128, dtype=torch.int8)

    def random(rows: int, low: int) -> Tensor:
        shape = (rows, _K)
        return torch.randint(low, grid.QMAX + 1, shape, dtype=torch.int8, generator=generator)

    weight = torch.cat([patterns, lowest, random(_N - 5, low=-128)])
    inputs = torch.cat([patterns, lowest, random(28, low=-128)])
    return weight, inputs

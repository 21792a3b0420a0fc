"""The CPU's product where bytes saturate: every token in two parts, by the sign of its integers.

Before VNNI, x86 multiplied unsigned by signed bytes with ``vpmaddubsw``, which adds two products in
int16. Twice 255 * 127 does not fit there, twice 128 * 127 does, and so does twice 128 * -128. So a
token q is given as two rows of unsigned integers up to 128, max(q, 0) and max(-q, 0), and what the
second gives is taken off what the first gives. Decoding waits for the weight, which is read once
for both; a prompt takes twice the arithmetic, and still a fraction of bfloat16's, for which these
processors have no instructions at all.
"""

import torch
from torch import Tensor

from haq.int8.cpu import FbgemmWeight
from haq.int8.reference import EXACT_LENGTH

# fbgemm returns float32, which holds every integer up to here.
_EXACT = 2**24

_LARGEST_INPUT = 128


class SignedRowsWeight:
    """A weight in fbgemm's layout, for products of bytes that would saturate."""

    backend = "fbgemm_signs"

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        # What is taken off must be an integer still: the scales come after.
        self._integers = FbgemmWeight(weight, torch.ones_like(scale), zero_point=0)
        self._scale = scale.view(-1)
        self._signs = scale.new_tensor([1.0, -1.0]).view(2, 1, 1)
        self._always_exact = _largest_sum(weight) < _EXACT

    def product(self, rounded: Tensor) -> Tensor:
        # Nobody needs to take the maximum with zero: fbgemm makes these unsigned by clamping them.
        rows = (self._signs * rounded).flatten(0, 1)  # [2 T, K]
        sums = self._integers.product(rows)
        if not self._always_exact and _largest(sums) >= _EXACT:
            return self._of_large_sums(rows).mul_(self._scale)
        above, below = sums.chunk(2)
        return above.sub_(below).mul_(self._scale)

    def unpack(self) -> Tensor:
        return self._integers.unpack()

    def _of_large_sums(self, rows: Tensor) -> Tensor:
        """The integers ``[T, N]``, from sums so short that float32 holds them."""
        total = rows.new_zeros(len(rows) // 2, len(self._scale), dtype=torch.float64)
        for start in range(0, rows.shape[1], EXACT_LENGTH):
            piece = torch.zeros_like(rows)
            here = slice(start, start + EXACT_LENGTH)
            piece[:, here] = rows[:, here]
            above, below = self._integers.product(piece).chunk(2)
            total += above.sub_(below)
        return total.float()


def _largest_sum(weight: Tensor) -> int:
    """What no sum of products with one row of a token can surpass."""
    above = weight.clamp(min=0).sum(1, dtype=torch.int64)
    below = above - weight.sum(1, dtype=torch.int64)
    return _LARGEST_INPUT * int(torch.maximum(above, below).amax())


def _largest(sums: Tensor) -> float:
    if not sums.numel():
        return 0.0
    low, high = sums.aminmax()
    return max(-float(low), float(high))

"""The norms that a kernel can compute."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last dimension: ``(x - mean) / sqrt(variance + eps) * (offset + w) + b``.

    Attributes:
        eps: what is added to the variance.
        centered: the mean is subtracted, as in a LayerNorm; without, it is taken to be zero.
        offset: 1 where the weight is stored as its difference from one, else 0.
        cast_first: the result is rounded to its dtype before it is multiplied by the weight, and
            then again.
    """

    eps: float
    centered: bool
    offset: int
    cast_first: bool

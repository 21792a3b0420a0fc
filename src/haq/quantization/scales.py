"""The scales there are to choose from: channel statistics, rules, and what the rules make of them.

An outlier channel of an input forces one large step on all other channels of its token. Dividing
channel k by s_k, and multiplying column k of every weight that reads it by s_k, moves the range
into the weight, which has a step of its own per output channel (SmoothQuant, arXiv 2211.10438,
equation 3). Which s is best depends on the layer: `haq.quantization.smoothing` finds out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from haq.processes import Processes

# Exponents alpha of s = a^alpha / w^(1 - alpha). Below 0.3 hardly anything moves.
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# A channel is not amplified beyond this fraction of the median of a * w: it is too small to matter,
# and following it would only spoil the range of the others.
_FLOOR = 0.1


class ChannelStatistics:
    """How large each input channel gets, over every calibration token.

    Attributes:
        maximum: largest magnitude, float32 ``[K]``.
        p4: 4-norm over tokens, divided by the fourth root of their number: float32 ``[K]``. Between
            the mean and the maximum: one wild token in a thousand does not decide it.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.maximum = torch.zeros(channels, device=device)
        self._fourth = torch.zeros(channels, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add the tokens of ``inputs``, float ``[T, K]``."""
        magnitude = inputs.float().abs()
        self.maximum = torch.maximum(self.maximum, magnitude.amax(0))
        self._fourth += magnitude.square().square().sum(0)
        self.tokens += inputs.shape[0]

    def sum_over(self, processes: Processes) -> None:
        """Add what the other processes saw."""
        processes.max_(self.maximum)
        processes.sum_(self._fourth)
        self.tokens = sum(processes.counts(self.tokens, self._fourth.device))

    @property
    def p4(self) -> Tensor:
        return (self._fourth / max(self.tokens, 1)).pow(0.25)


@dataclass(frozen=True)
class Candidate:
    """One way to choose s from the statistics.

    Attributes:
        family: "none" is s = 1. The others are s = a^strength / w^(1 - strength): "p4" with the
            4-norm over tokens as a, tiny channels held up; "smoothquant" as published, with the
            maximum as a.
        strength: alpha in [0, 1].
    """

    family: Literal["none", "p4", "smoothquant"]
    strength: float = 0.0

    def __str__(self) -> str:
        return "none" if self.family == "none" else f"{self.family} {self.strength:g}"


def search_candidates() -> list[Candidate]:
    """Everything that the search tries; doing nothing comes first, and wins ties."""
    return [Candidate("none"), *(Candidate("p4", alpha) for alpha in _STRENGTHS)]


def candidate_scale(candidate: Candidate, statistics: ChannelStatistics, weight: Tensor) -> Tensor:
    """s of one candidate.

    Args:
        candidate: the rule.
        statistics: of the group's input.
        weight: float32 ``[K]``, the largest magnitude of each input channel over all consumers.

    Returns:
        float32 ``[K]``, positive, 1 in the geometric mean. Channels that are zero in every input or
        every weight get 1.
    """
    inputs = statistics.p4 if candidate.family == "p4" else statistics.maximum
    alive = (inputs > 0) & (weight > 0)
    if candidate.family == "none" or not bool(alive.any()):
        return torch.ones_like(inputs)
    if candidate.family == "p4":
        floor = _FLOOR * (inputs * weight)[alive].median()
        inputs = torch.maximum(inputs, floor / weight)
    scale = inputs**candidate.strength / weight ** (1 - candidate.strength)
    # Only ratios between channels matter; around 1 the folded parameters keep their magnitude.
    scale = scale / scale[alive].log().mean().exp()
    return torch.where(alive, scale, 1.0)


@dataclass(frozen=True)
class Choice:
    """A scale, and the rule it came from.

    Attributes:
        scale: float32 ``[K]``, positive, equal for channels that share a row of the producer.
        candidate: the rule.
    """

    scale: Tensor
    candidate: Candidate


def choices(
    candidates: Sequence[Candidate],
    statistics: ChannelStatistics,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    powers_of_two: bool = False,
) -> list[Choice]:
    """The scale of every candidate.

    Args:
        candidates: the rules.
        statistics: of the input.
        weight: as for `candidate_scale`.
        rows: of the producer, int64 ``[K]``: channels with the same one share a scale.
        powers_of_two: round every scale to one, so that 16-bit weights take it without rounding.
    """
    options = [Choice(candidate_scale(c, statistics, weight), c) for c in candidates]
    if rows is not None:
        options = [replace(o, scale=_largest_of_each_row(o.scale, rows)) for o in options]
    if powers_of_two:
        options = [replace(o, scale=o.scale.log2().round().exp2()) for o in options]
    return options


def _largest_of_each_row(scale: Tensor, rows: Tensor) -> Tensor:
    largest = scale.new_zeros(int(rows.max()) + 1)
    return largest.scatter_reduce(0, rows, scale, "amax")[rows]

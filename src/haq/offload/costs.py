"""What an expert costs on either side and on the way between them, in seconds."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Costs:
    """Seconds, for the experts of one model on one machine.

    Measured when an `ExpertOffloader` is attached (`haq.offload.measure`), or given, so that a
    placement and a simulation can be repeated anywhere.

    Attributes:
        gpu_expert: for an expert on the GPU, whatever the number of its tokens: mostly the reading
            of its weights.
        gpu_token: for each token of it.
        cpu_expert: as ``gpu_expert``, on the CPU.
        cpu_token: as ``gpu_token``, on the CPU.
        copy: to bring the weights of one expert from the CPU's memory to the GPU's.
        round_trip: for the tokens of a layer to the CPU, and what becomes of them back.

    Raises:
        ValueError: a cost is not positive and finite; ``gpu_token``, ``cpu_token`` and
            ``round_trip`` may be zero.

    Examples:
        >>> costs = Costs(1e-3, 0.0, 4e-3, 1e-3, 7e-3, 1e-4)
        >>> round(costs.layer([1], [1, 2]), 6)
        0.0111
    """

    gpu_expert: float
    gpu_token: float
    cpu_expert: float
    cpu_token: float
    copy: float
    round_trip: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            may_be_zero = name in ("gpu_token", "cpu_token", "round_trip")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or not (value or may_be_zero):
                raise ValueError(
                    f"`{name}` must be a {'' if may_be_zero else 'positive '}number of seconds"
                    f"{' that is not negative' if may_be_zero else ''}, got {value!r}. Leave "
                    "`costs` out to have them measured."
                )

    def gpu(self, tokens: Iterable[int]) -> float:
        """Experts with so many tokens each, one after the other on the GPU."""
        return sum(self.gpu_expert + self.gpu_token * count for count in tokens)

    def cpu(self, tokens: Iterable[int]) -> float:
        """Experts with so many tokens each on the CPU, and the way there and back."""
        seconds = sum(self.cpu_expert + self.cpu_token * count for count in tokens)
        return self.round_trip + seconds if seconds else 0.0

    def layer(self, gpu: Iterable[int], cpu: Iterable[int]) -> float:
        """A layer whose experts run on both sides at the same time: the slower one's seconds."""
        return max(self.gpu(gpu), self.cpu(cpu))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

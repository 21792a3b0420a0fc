"""What an attached model's routing tells while it runs."""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from haq.offload.routing import RoutingStatistics

Index = NDArray[np.int64]


class RoutingWatch:
    """Adds every call of every layer to statistics, and knows the layers before it.

    Layers of one forward pass see the same tokens in the same order. A pass starts at the first
    layer; each thread has its own.

    Args:
        statistics: added to.
    """

    def __init__(self, statistics: RoutingStatistics) -> None:
        self.statistics = statistics
        self._here = threading.local()

    def note(self, layer: int, index: Tensor, gates: Tensor) -> None:
        """One call of one layer.

        Args:
            layer: its number.
            index: int64 ``[T, A]``, on the CPU.
            gates: float ``[T, A]``, on the CPU.
        """
        chosen: Index = index.numpy().copy()  # The next call overwrites it.
        before = self._before(layer, len(chosen))
        self.statistics.add(layer, chosen, gates.float().numpy(), before)
        self._here.layer = layer
        self._here.seen = [chosen, *before[: len(self.statistics.transitions) - 1]]

    def chosen(self) -> Sequence[Index]:
        """Of the last call in this thread and of the layers before it, the nearest first."""
        return getattr(self._here, "seen", [])

    def _before(self, layer: int, tokens: int) -> list[Index]:
        seen: list[Index] = getattr(self._here, "seen", [])
        follows = layer > 0 and getattr(self._here, "layer", None) == layer - 1
        return seen if follows and len(seen[0]) == tokens else []

"""Experts of the next layers, brought to the GPU before they are asked for."""

from collections.abc import Callable, Sequence

import numpy as np

from haq.logs import get_logger
from haq.offload.costs import Costs
from haq.offload.schedule import MOST_TOKENS_TO_PREDICT, arrives_in_time, prefetch_gain
from haq.offload.slots import SpareSlots
from haq.offload.watch import RoutingWatch

logger = get_logger(__name__)


class Prefetcher:
    """Predicts from the experts chosen now, and loads what pays and can arrive in time.

    Args:
        spare: where experts are brought to.
        resident: experts by layer that need not be.
        watch: knows what was chosen, and has the statistics.
        costs: seconds.
        layer_seconds: what a layer takes, on average.
        depth: how many layers it looks ahead.

    Attributes:
        stopped: why it stopped; empty if it goes on.
    """

    def __init__(
        self,
        spare: SpareSlots,
        resident: Sequence[frozenset[int]],
        watch: RoutingWatch,
        costs: Costs,
        layer_seconds: Callable[[], float],
        depth: int,
    ) -> None:
        self._spare = spare
        self._resident = resident
        self._watch = watch
        self._costs = costs
        self._layer_seconds = layer_seconds
        self._depth = depth
        self.stopped = ""

    def look_ahead(self, layer: int) -> None:
        """After the experts of ``layer`` are known: begin to bring the one that helps most.

        A copy that failed, for want of memory as a rule, ends prefetching; generation goes on.
        """
        if self.stopped:
            return
        failures = self._spare.forget_failures()
        if failures:
            self.stopped = str(failures[0]).partition("\n")[0] or type(failures[0]).__name__
            logger.warning(f"Experts are not prefetched any more: {self.stopped}")
            return
        best = self._best(layer)
        if best is not None:
            self._spare.load_early(best)

    def _best(self, layer: int) -> tuple[int, int] | None:
        """The expert that saves most on average and can arrive in time."""
        seen = self._watch.chosen()
        if not seen or len(seen[0]) > MOST_TOKENS_TO_PREDICT or self._spare.on_their_way():
            return None
        chosen = np.unique(seen[0])
        seconds = self._layer_seconds()
        options: list[tuple[float, tuple[int, int]]] = []
        for ahead in range(1, self._depth + 1):
            target = layer + ahead
            if target >= len(self._resident):
                break
            if not arrives_in_time(0, ahead, seconds, self._costs):
                continue
            options += self._options(layer, chosen, ahead)
        gain, key = max(options, default=(0.0, (0, 0)))
        return key if gain > 0 else None

    def _options(
        self, layer: int, chosen: np.ndarray, ahead: int
    ) -> list[tuple[float, tuple[int, int]]]:
        """The most likely expert of a layer that is not there, with what it saves."""
        target = layer + ahead
        statistics = self._watch.statistics
        chosen = chosen[chosen < statistics.num_experts]
        scores = statistics.scores(layer, chosen, ahead)
        likely = scores / max(float(scores.sum()), 1e-12) * statistics.experts_per_token
        for expert in np.argsort(-scores, kind="stable"):
            key = target, int(expert)
            if expert not in self._resident[target] and key not in self._spare:
                return [(prefetch_gain(min(float(likely[expert]), 1.0), self._costs), key)]
        return []

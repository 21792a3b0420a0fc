"""A trace on a placement, token after token: which choices are hits, also with copies ahead."""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from haq.offload.costs import Costs
from haq.offload.odds import Floats, Integers
from haq.offload.paths import Booleans, Cell
from haq.offload.placement import Placement
from haq.offload.routing import RoutingStatistics


class Replay:
    """A trace on a placement.

    Args:
        trace: int64 ``[T, L, A]``.
        placement: where the experts are.
        costs: of an expert on either side.
        lanes: "parallel" or "sequential".

    Attributes:
        gpu: seconds of the GPU's lane with so many hits, ``[A + 1]``.
        cpu: of the CPU's lane with so many misses, ``[A + 1]``.
        seconds: of a layer with so many hits and misses, ``[A + 1, A + 1]``.
        resident: bool ``[L, E + 1]``; the last column, of none, is false.
    """

    def __init__(self, trace: Integers, placement: Placement, costs: Costs, lanes: str) -> None:
        self.trace = trace
        self.placement = placement
        self.costs = costs
        numbers = range(trace.shape[2] + 1)
        self.gpu = np.array([costs.gpu([1] * number) for number in numbers])
        self.cpu = np.array([costs.cpu([1] * number) for number in numbers])
        combine = np.maximum.outer if lanes == "parallel" else np.add.outer
        self.seconds: Floats = combine(self.gpu, self.cpu)
        self.resident = np.zeros((trace.shape[1], placement.num_experts + 1), dtype=bool)
        for layer, experts in enumerate(placement.resident):
            self.resident[layer, list(experts)] = True

    def resident_choices(self) -> Booleans:
        """Which choices fell on residents: bool ``[T, L, A]``."""
        layers = np.arange(self.trace.shape[1])[:, None]
        chosen: Booleans = self.resident[layers, self.trace]
        return chosen


@dataclass
class _Copy:
    """An expert in the spare room, or on its way there: when it arrives, and for which layer."""

    arrival: float
    awaited: bool = True
    used: bool = False


class SpareRoom:
    """Room on the GPU for experts that are not resident.

    Args:
        size: experts.

    Attributes:
        copied: how many were brought.
        used: how many of those were chosen while they were here.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._copies: OrderedDict[Cell, _Copy] = OrderedDict()  # the least recently used first
        self.copied = 0
        self.used = 0

    def __contains__(self, cell: Cell) -> bool:
        """Whether it is here or on its way."""
        return cell in self._copies

    def use(self, cell: Cell, now: float) -> bool:
        """Whether an expert is here now; if so, it is in use."""
        copy = self._copies.get(cell)
        if copy is None or copy.arrival > now:
            return False
        self._copies.move_to_end(cell)
        self.used += not copy.used
        copy.used = True
        return True

    def passed(self, layer: int) -> None:
        """A layer has its experts: what was copied for it waits no longer."""
        for cell, copy in self._copies.items():
            if cell[0] == layer:
                copy.awaited = False

    def keep(self, cell: Cell) -> None:
        """An expert that is here is wanted again."""
        self._copies[cell].awaited = True

    def make_room(self) -> bool:
        """Whether there is room for one more, now that what is least wanted was thrown out."""
        if len(self._copies) < self._size:
            return True
        oldest = next((cell for cell, copy in self._copies.items() if not copy.awaited), None)
        if oldest is None:
            return False
        del self._copies[oldest]
        return True

    def bring(self, cell: Cell, arrival: float) -> None:
        """An expert arrives then; there must be room."""
        self._copies[cell] = _Copy(arrival)
        self.copied += 1


def hits_with_prefetch(
    replay: Replay, statistics: RoutingStatistics, cache: SpareRoom, ahead: int
) -> Booleans:
    """Which choices were hits, bool ``[T, L, A]``, with experts copied ahead."""
    tokens, layers, _ = replay.trace.shape
    prefetcher = _Prefetcher(replay, statistics, cache, ahead)
    hit = replay.resident_choices()
    now = 0.0
    for token in range(tokens):
        for layer in range(layers):
            chosen = replay.trace[token, layer]
            known = chosen < replay.placement.num_experts
            for slot in np.flatnonzero(known & ~hit[token, layer]):
                hit[token, layer, slot] = cache.use((layer, int(chosen[slot])), now)
            cache.passed(layer)
            hits = int(hit[token, layer].sum())
            duration = float(replay.seconds[hits, int(known.sum()) - hits])
            if layer + ahead < layers:
                mean = (now + duration) / (token * layers + layer + 1)
                start = now + duration + (ahead - 1) * mean
                prefetcher.look_ahead(layer, chosen[known], now, start)
            now += duration
    return hit


class _Prefetcher:
    """Decides what to copy, and keeps the lane that copies busy.

    Args:
        replay: the trace and where the residents are.
        statistics: to predict from.
        cache: where copies go.
        ahead: how many layers ahead.
    """

    def __init__(
        self, replay: Replay, statistics: RoutingStatistics, cache: SpareRoom, ahead: int
    ) -> None:
        self._replay = replay
        self._statistics = statistics
        self._cache = cache
        self._ahead = ahead
        self._free = 0.0  # when the lane has finished what it was given

    def look_ahead(self, layer: int, chosen: Integers, now: float, start: float) -> None:
        """Start the copies that pay.

        Args:
            layer: whose experts became known.
            chosen: those experts.
            now: when.
            start: when the layer ahead is expected to begin.
        """
        scores = self._statistics.scores(layer, chosen, self._ahead)
        target = layer + self._ahead
        slots = self._replay.trace.shape[2]
        chances = np.minimum(scores * slots / scores.sum(), 1)
        # As `RoutingStatistics.predict`, without the residents.
        ranked = [int(expert) for expert in np.argsort(-scores, kind="stable")]
        ranked = [expert for expert in ranked if not self._replay.resident[target, expert]]
        for expert in ranked:
            if (target, expert) in self._cache:
                self._cache.keep((target, expert))
                continue
            arrival = max(self._free, now) + self._replay.costs.copy
            if arrival > start:  # and so would all that follow
                return
            missing = [e for e in ranked if (target, e) not in self._cache]
            if chances[expert] * self._saving(chances, missing, expert) <= 0:
                continue
            if not self._cache.make_room():
                return
            self._cache.bring((target, expert), arrival)
            self._free = arrival

    def _saving(self, chances: Floats, missing: list[int], expert: int) -> float:
        """Seconds that a layer is expected to save by one expert, if that one is chosen.

        The others that are chosen miss independently of each other, each with the share that those
        of the missing have in all chances.
        """
        others = self._replay.trace.shape[2] - 1
        rest = chances.sum() - chances[expert]
        cold = chances[missing].sum() - chances[expert]
        share = min(max(float(cold / rest), 0.0), 1.0) if rest > 0 else 0.0
        seconds = self._replay.seconds
        saving = 0.0
        for misses in range(others + 1):
            hits = others - misses
            weight = math.comb(others, misses) * share**misses * (1 - share) ** hits
            saving += weight * float(seconds[hits, misses + 1] - seconds[hits + 1, misses])
        return saving


def check_trace(trace: Integers, layers: int, experts: int) -> None:
    form = f"int64 [T, {layers}, A]"
    if not isinstance(trace, np.ndarray) or trace.dtype != np.int64:
        got = trace.dtype if isinstance(trace, np.ndarray) else type(trace).__name__
        raise ValueError(f"`trace` must be {form}, got {got}. `routing_trace` makes one.")
    if trace.ndim != 3 or trace.shape[1] != layers or 0 in trace.shape:
        raise ValueError(
            f"`trace` must be {form} with at least one token, got shape {list(trace.shape)}. Pass "
            "a trace of the same model."
        )
    lowest, highest = int(trace.min()), int(trace.max())
    if lowest < 0 or highest > experts:
        raise ValueError(
            f"`trace` must hold experts from 0 to {experts - 1}, or {experts} for none, got "
            f"{lowest if lowest < 0 else highest}. Pass a trace of the same model."
        )

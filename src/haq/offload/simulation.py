"""What a placement would bring on recorded routing: tokens one at a time, with no model at hand."""

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from haq.offload.costs import Costs
from haq.offload.placement import Booleans, Cell, Floats, Integers, Placement

if TYPE_CHECKING:
    from haq.offload.routing import RoutingStatistics

# Comparing every expert's last use with all others takes [T, A, E] at a time.
_CHUNK = 1024


@dataclass(frozen=True)
class Simulation:
    """How a placement did on a trace.

    Attributes:
        hit_rate: share of all choices that fell on an expert in the GPU's memory.
        spread_over_layers: standard deviation of the layers' hit rates.
        spread_over_tokens: standard deviation of the tokens' hit rates.
        layers_without_round_trip: share of all layers of all tokens that had nothing to compute on
            the CPU.
        seconds_per_token: mean time of a token in the experts of all layers.
        seconds_std: standard deviation of that time over tokens.
        copied: experts that were copied to the GPU ahead of their use.
        prefetches_used: those of them that were chosen while they were there.
        prefetches_wasted: the others.
        overlap: how much of the shorter lane's time was hidden behind the longer one: 1 if all, 0
            if none. 1, too, if there was nothing to hide.
        hit_rates: for each layer.
        layers: names of the experts modules.
    """

    hit_rate: float
    spread_over_layers: float
    spread_over_tokens: float
    layers_without_round_trip: float
    seconds_per_token: float
    seconds_std: float
    copied: int
    prefetches_used: int
    prefetches_wasted: int
    overlap: float
    hit_rates: tuple[float, ...]
    layers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        values = asdict(self)
        return values | {"hit_rates": list(self.hit_rates), "layers": list(self.layers)}

    def __str__(self) -> str:
        mean, deviation = 1e3 * self.seconds_per_token, 1e3 * self.seconds_std
        copies = f"{self.copied} ({self.prefetches_used} used, {self.prefetches_wasted} wasted)"
        rows = [
            ("ms per token", f"{mean:.3g} (standard deviation {deviation:.2g})"),
            ("hit rate", f"{self.hit_rate:.3f}"),
            ("spread over layers", f"{self.spread_over_layers:.3f}"),
            ("spread over tokens", f"{self.spread_over_tokens:.3f}"),
            ("layers without round trip", f"{self.layers_without_round_trip:.3f}"),
            ("overlap of the lanes", f"{self.overlap:.3f}"),
            ("experts copied ahead", copies),
        ]
        width = max(len(name) for name in ("layer", *self.layers))
        lines = [f"{name.ljust(26)} {value}" for name, value in rows]
        lines += ["", f"{'layer'.ljust(width)}  hit rate", "-" * (width + 10)]
        pairs = zip(self.layers, self.hit_rates, strict=True)
        return "\n".join([*lines, *(f"{name.ljust(width)}  {rate:8.3f}" for name, rate in pairs)])


def simulate(
    trace: Integers,
    placement: Placement,
    costs: Costs,
    *,
    statistics: "RoutingStatistics | None" = None,
    prefetch: bool = False,
    spare: int = 0,
    ahead: int = 1,
    lanes: Literal["parallel", "sequential"] = "parallel",
) -> Simulation:
    """Replay tokens one at a time, as when decoding a single sequence.

    Args:
        trace: the experts of every token in every layer, int64 ``[T, L, A]``, such as from
            `routing_trace`. The number E stands for none.
        placement: where the experts are.
        costs: of an expert on either side, and of a copy.
        statistics: what `prefetch` predicts from.
        prefetch: as soon as a layer's experts are known, copy those that a layer behind it will
            probably want, if they are not there, the copy will be finished in time, and the layer
            is expected to be faster with it. Copies run one after the other beside both lanes.
        spare: experts, over all layers, for which the GPU has room beside the residents. They keep
            what was copied until the room is wanted; the least recently used goes first, but
            nothing that still waits for its layer.
        ahead: how many layers the prediction looks ahead.
        lanes: "parallel" where both sides compute at the same time; "sequential" where the CPU's
            part begins after the GPU's.

    Raises:
        ValueError: the trace does not fit the placement, or an option the others.

    Examples:
        >>> placement = Placement("uniform", ((0, 1),), 4, (0.5,), 3e-3, ("layer 0",))
        >>> trace = np.array([[[0, 1]], [[1, 2]]])
        >>> result = simulate(trace, placement, Costs(1e-3, 0.0, 4e-3, 0.0, 7e-3, 1e-4))
        >>> result.hit_rate, round(result.seconds_per_token, 6)  # 2 ms and 4.1 ms
        (0.75, 0.00305)
    """
    _check_trace(trace, len(placement.layers), placement.num_experts)
    _check_options(spare, ahead, lanes)
    replay = _Replay(trace, placement, costs, lanes)
    if prefetch:
        if statistics is None:
            raise ValueError(
                "`statistics` must be given to predict what to copy, got None. Pass what "
                "`RoutingStatistics.collect` returned, or `prefetch=False`."
            )
        statistics.check(len(placement.layers), placement.num_experts)
        cache = _SpareRoom(spare)
        hits = _replay_with_prefetch(replay, statistics, cache, ahead)
        return replay.summary(hits, cache.copied, cache.used)
    return replay.summary(replay.resident_choices())


class _Replay:
    """A trace on a placement.

    Args:
        trace: int64 ``[T, L, A]``.
        placement: where the experts are.
        costs: of an expert on either side.
        lanes: "parallel" or "sequential".

    Attributes:
        seconds: of a layer with so many hits and misses, ``[A + 1, A + 1]``.
    """

    def __init__(self, trace: Integers, placement: Placement, costs: Costs, lanes: str) -> None:
        self.trace = trace
        self.placement = placement
        self.costs = costs
        numbers = range(trace.shape[2] + 1)
        self._gpu = np.array([costs.gpu([1] * number) for number in numbers])
        self._cpu = np.array([costs.cpu([1] * number) for number in numbers])
        combine = np.maximum.outer if lanes == "parallel" else np.add.outer
        self.seconds: Floats = combine(self._gpu, self._cpu)
        # With a last column for the number that stands for none.
        self.resident = np.zeros((trace.shape[1], placement.num_experts + 1), dtype=bool)
        for layer, experts in enumerate(placement.resident):
            self.resident[layer, list(experts)] = True

    def resident_choices(self) -> Booleans:
        """Which choices fell on residents: bool ``[T, L, A]``."""
        layers = np.arange(self.trace.shape[1])[:, None]
        chosen: Booleans = self.resident[layers, self.trace]
        return chosen

    def summary(self, hit: Booleans, copied: int = 0, used: int = 0) -> Simulation:
        """What comes out if these choices were hits, bool ``[T, L, A]``."""
        chosen = (self.trace < self.placement.num_experts).sum(-1)
        hits = hit.sum(-1)
        misses = chosen - hits
        seconds = self.seconds[hits, misses]
        gpu, cpu = self._gpu[hits], self._cpu[misses]
        by_layer = _rates(hits.sum(0), chosen.sum(0))
        by_token = _rates(hits.sum(1), chosen.sum(1))
        shorter = float(np.minimum(gpu, cpu).sum())
        not_hidden = float((seconds - np.maximum(gpu, cpu)).sum())
        return Simulation(
            hit_rate=float(_rates(hits.sum(), chosen.sum())),
            spread_over_layers=float(by_layer.std()),
            spread_over_tokens=float(by_token.std()),
            layers_without_round_trip=float((misses == 0).mean()),
            seconds_per_token=float(seconds.sum(1).mean()),
            seconds_std=float(seconds.sum(1).std()),
            copied=copied,
            prefetches_used=used,
            prefetches_wasted=copied - used,
            overlap=1 - not_hidden / shorter if shorter else 1.0,
            hit_rates=tuple(map(float, by_layer)),
            layers=self.placement.layers,
        )


def _rates(hits: NDArray[Any], chosen: NDArray[Any]) -> Floats:
    """Hits per choice; 1 where nothing was chosen, for then nothing was missed."""
    rates: Floats = np.where(chosen > 0, hits / np.maximum(chosen, 1), 1.0)
    return rates


# --- Prefetch -------------------------------------------------------------------------------------


@dataclass
class _Copy:
    """An expert in the spare room, or on its way there: when it arrives, and for which layer."""

    arrival: float
    awaited: bool = True
    used: bool = False


class _SpareRoom:
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


def _replay_with_prefetch(
    replay: _Replay, statistics: "RoutingStatistics", cache: _SpareRoom, ahead: int
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
        self, replay: _Replay, statistics: "RoutingStatistics", cache: _SpareRoom, ahead: int
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


# --- Prediction -----------------------------------------------------------------------------------


def prediction_recall(
    statistics: "RoutingStatistics", trace: Integers, capacity: int, ahead: int = 1
) -> dict[str, float]:
    """How many of a layer's experts were among those that were predicted.

    Args:
        statistics: of the routing, best of other text than the trace.
        trace: int64 ``[T, L, A]``, the tokens of one text in their order; E stands for none.
        capacity: how many experts of each layer a prediction may name.
        ahead: from how many layers before "transitions" predicts. The layers that have none before
            them are left out everywhere.

    Returns:
        The recall of three predictions: "transitions", the most likely ones after what the layer
        before chose (`RoutingStatistics.predict`); "popularity", always the most popular; "lru",
        those of the layer that were used last.

    Raises:
        ValueError: the trace does not fit the statistics, ``capacity`` is not in [1, E], or there
            is no layer so far ahead.

    Examples:
        >>> from haq.offload.routing import RoutingStatistics
        >>> statistics = RoutingStatistics(2, num_experts=4, experts_per_token=1)
        >>> trace = np.array([[[0], [3]], [[1], [2]], [[0], [3]], [[1], [2]]])
        >>> statistics.add(0, trace[:, 0], None)
        >>> statistics.add(1, trace[:, 1], None, before=[trace[:, 0]])
        >>> prediction_recall(statistics, trace, capacity=1)
        {'transitions': 1.0, 'popularity': 0.5, 'lru': 0.0}
    """
    layers, experts = len(statistics.layers), statistics.num_experts
    _check_trace(trace, layers, experts)
    if not 1 <= capacity <= experts:
        raise ValueError(
            f"`capacity` must be from 1 to {experts}, the experts of a layer, got {capacity!r}. "
            "A quarter of them is a good start."
        )
    if not 1 <= ahead < min(layers, 4):
        raise ValueError(
            f"`ahead` must be from 1 to {min(layers - 1, 3)} for {layers} layers, got {ahead!r}. "
            "Statistics reach three layers."
        )
    found = dict.fromkeys(("transitions", "popularity", "lru"), 0)
    popularity = statistics.popularity
    for layer in range(ahead, layers):
        chosen = trace[:, layer]
        scores = _scores_of_tokens(statistics, layer - ahead, trace[:, layer - ahead], ahead)
        static = np.broadcast_to(popularity[layer], scores.shape)
        found["transitions"] += _found_in_best(scores, chosen, capacity)
        found["popularity"] += _found_in_best(static, chosen, capacity)
        found["lru"] += _found_in_recent(chosen, experts, capacity)
    total = max(int((trace[:, ahead:] < experts).sum()), 1)
    return {name: count / total for name, count in found.items()}


def _scores_of_tokens(
    statistics: "RoutingStatistics", layer: int, chosen: Integers, ahead: int
) -> Floats:
    """`RoutingStatistics.scores` of every token's experts ``[T, A]``: ``[T, E]``."""
    experts = statistics.num_experts
    # Scores are sums over the chosen experts. The last row is that of none.
    rows = [statistics.scores(layer, [expert], ahead) for expert in range(experts)]
    table = np.stack([*rows, np.zeros(experts)])
    scores = np.zeros((len(chosen), experts))
    for slot in range(chosen.shape[1]):
        scores += table[chosen[:, slot]]
    scores[(chosen == experts).all(1)] = statistics.popularity[layer + ahead]
    return scores


def _found_in_best(scores: Floats, chosen: Integers, capacity: int) -> int:
    """Choices ``[T, A]`` among those with the best scores ``[T, E]``; E is never found."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :capacity]
    among = np.zeros((len(scores), scores.shape[1] + 1), dtype=bool)
    np.put_along_axis(among, best, True, axis=1)
    return int(np.take_along_axis(among, chosen, axis=1).sum())


def _found_in_recent(chosen: Integers, experts: int, capacity: int) -> int:
    """Choices ``[T, A]`` among those that were used last, of the tokens before."""
    tokens, slots = chosen.shape
    # When each expert was used last, up to and with each token: 0 for never; [1 + T, E + 1].
    last = np.zeros((tokens + 1, experts + 1), dtype=np.int64)
    times = np.arange(1, tokens * slots + 1).reshape(tokens, slots)
    np.put_along_axis(last[1:], chosen, times, axis=1)
    last[:, experts] = 0
    last = np.maximum.accumulate(last, axis=0)[:-1]
    found = 0
    for start in range(0, tokens, _CHUNK):
        before = last[start : start + _CHUNK]
        own = np.take_along_axis(before, chosen[start : start + _CHUNK], axis=1)
        later = (before[:, None, :] > own[:, :, None]).sum(-1)
        found += int(((own > 0) & (later < capacity)).sum())
    return found


# --- What came in ---------------------------------------------------------------------------------


def _check_trace(trace: Integers, layers: int, experts: int) -> None:
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


def _check_options(spare: int, ahead: int, lanes: str) -> None:
    if spare < 0:
        raise ValueError(
            f"`spare` must be a number of experts that is not negative, got {spare!r}. With 0 "
            "nothing is copied."
        )
    if not 1 <= ahead <= 3:
        raise ValueError(
            f"`ahead` must be from 1 to 3, as far as statistics reach, got {ahead!r}. Start with 1."
        )
    if lanes not in ("parallel", "sequential"):
        raise ValueError(
            f'`lanes` must be "parallel" or "sequential", got {lanes!r}. haq runs them in parallel.'
        )

"""What a placement would bring on recorded routing: tokens one at a time, with no model at hand."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from haq.offload.costs import Costs
from haq.offload.odds import Floats, Integers
from haq.offload.paths import Booleans
from haq.offload.placement import Placement
from haq.offload.replay import Replay, SpareRoom, check_trace, hits_with_prefetch
from haq.offload.routing import RoutingStatistics


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
    statistics: RoutingStatistics | None = None,
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
    check_trace(trace, len(placement.layers), placement.num_experts)
    _check_options(spare, ahead, lanes)
    replay = Replay(trace, placement, costs, lanes)
    if prefetch:
        if statistics is None:
            raise ValueError(
                "`statistics` must be given to predict what to copy, got None. Pass what "
                "`RoutingStatistics.collect` returned, or `prefetch=False`."
            )
        statistics.check(len(placement.layers), placement.num_experts)
        cache = SpareRoom(spare)
        hits = hits_with_prefetch(replay, statistics, cache, ahead)
        return _summary(replay, hits, cache.copied, cache.used)
    return _summary(replay, replay.resident_choices())


def _summary(replay: Replay, hit: Booleans, copied: int = 0, used: int = 0) -> Simulation:
    """What comes out if these choices were hits, bool ``[T, L, A]``."""
    chosen = (replay.trace < replay.placement.num_experts).sum(-1)
    hits = hit.sum(-1)
    misses = chosen - hits
    seconds = replay.seconds[hits, misses]
    gpu, cpu = replay.gpu[hits], replay.cpu[misses]
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
        layers=replay.placement.layers,
    )


def _rates(hits: NDArray[Any], chosen: NDArray[Any]) -> Floats:
    """Hits per choice; 1 where nothing was chosen, for then nothing was missed."""
    rates: Floats = np.where(chosen > 0, hits / np.maximum(chosen, 1), 1.0)
    return rates


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

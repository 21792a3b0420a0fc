"""Replayed routing against plain loops, and copies against a few tokens worked out by hand."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from haq.offload.costs import Costs
from haq.offload.placement import Placement, place
from haq.offload.recall import prediction_recall
from haq.offload.routing import RoutingStatistics
from haq.offload.simulation import Simulation, simulate

Integers = NDArray[np.int64]

COSTS = Costs(0.4e-3, 0.1e-3, 4e-3, 0.2e-3, 7e-3, 1e-4)


def random_trace(seed: int, tokens: int, layers: int, experts: int, chosen: int) -> Integers:
    """Uneven routing that remembers the layer before; one choice in ten is none."""
    rng = np.random.default_rng(seed)
    tilt = rng.normal(size=(layers, experts, experts))
    trace = np.zeros((tokens, layers, chosen), dtype=np.int64)
    for token in range(tokens):
        before = 0
        for layer in range(layers):
            noisy = tilt[layer, before] + rng.gumbel(size=experts)
            trace[token, layer] = np.argsort(-noisy)[:chosen]
            before = trace[token, layer, 0]
    return np.where(rng.random(trace.shape) < 0.1, experts, trace)


def random_placement(seed: int, layers: int, experts: int) -> Placement:
    masks = np.random.default_rng(seed).random((layers, experts)) < 0.5
    resident = tuple(tuple(np.flatnonzero(mask).tolist()) for mask in masks)
    names = tuple(f"layer {layer}" for layer in range(layers))
    return Placement("path", resident, experts, (0.5,) * layers, 1e-3, names)


def statistics_of(trace: Integers, experts: int) -> RoutingStatistics:
    statistics = RoutingStatistics(trace.shape[1], experts, trace.shape[2])
    for layer in range(trace.shape[1]):
        before = [trace[:, layer - back] for back in (1, 2, 3) if back <= layer]
        statistics.add(layer, trace[:, layer], None, before)
    return statistics


def followed(layers: int = 2) -> RoutingStatistics:
    """Three experts, one per token; expert i of a layer is followed by expert i of the next."""
    index = np.repeat(np.arange(3), 1000)[:, None]
    return statistics_of(np.repeat(index[:, None], layers, 1), 3)


def nothing_resident(layers: int = 2) -> Placement:
    names = tuple(f"layer {layer}" for layer in range(layers))
    return Placement("uniform", ((),) * layers, 3, (0.0,) * layers, 1.0, names)


def tokens(*experts: tuple[int, ...]) -> Integers:
    """A trace of one expert per token: a tuple of all layers' experts for each."""
    return np.array(experts, dtype=np.int64)[..., None]


# --- Without copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", ["parallel", "sequential"])
@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
)
def test_against_a_loop(
    lanes: Any, seed: int, count: int, layers: int, experts: int, chosen: int
) -> None:
    trace = random_trace(seed, count, layers, experts, min(chosen, experts))
    placement = random_placement(seed, layers, experts)
    total, by_token, free = [], [], 0
    by_layer = [[0, 0] for _ in range(layers)]
    longer = shorter = 0.0
    for token in trace.tolist():
        seconds, all_hits, all_chosen = 0.0, 0, 0
        for layer, choices in enumerate(token):
            real = [expert for expert in choices if expert != experts]
            hits = sum(expert in placement.resident[layer] for expert in real)
            misses = len(real) - hits
            gpu, cpu = 0.5e-3 * hits, 4.2e-3 * misses + 1e-4 * (misses > 0)
            seconds += max(gpu, cpu) if lanes == "parallel" else gpu + cpu
            longer, shorter = longer + max(gpu, cpu), shorter + min(gpu, cpu)
            all_hits, all_chosen = all_hits + hits, all_chosen + len(real)
            by_layer[layer][0] += hits
            by_layer[layer][1] += len(real)
            free += misses == 0
        total.append(seconds)
        by_token.append(all_hits / all_chosen if all_chosen else 1.0)
    rates = [hits / real if real else 1.0 for hits, real in by_layer]
    found, asked = (sum(pair[i] for pair in by_layer) for i in (0, 1))

    result = simulate(trace, placement, COSTS, lanes=lanes)
    assert result.hit_rates == pytest.approx(rates)
    assert result.hit_rate == pytest.approx(found / asked if asked else 1.0)
    assert result.spread_over_layers == pytest.approx(np.std(rates))
    assert result.spread_over_tokens == pytest.approx(np.std(by_token))
    assert result.layers_without_round_trip == pytest.approx(free / (count * layers))
    assert result.seconds_per_token == pytest.approx(np.mean(total))
    assert result.seconds_std == pytest.approx(np.std(total), abs=1e-12)
    assert (result.copied, result.prefetches_used, result.prefetches_wasted) == (0, 0, 0)
    hidden = 1 - (sum(total) - longer) / shorter if shorter else 1.0
    assert result.overlap == pytest.approx(hidden)
    assert result.overlap == pytest.approx(0 if shorter and lanes == "sequential" else 1)


def test_what_was_expected_is_what_happens() -> None:
    """On the tokens that the statistics are of, with one expert per token."""
    trace = random_trace(5, 200, 4, 6, 1)
    trace[trace == 6] = 0
    statistics = statistics_of(trace, 6)
    placement = place("latency", statistics, COSTS, [1] * 4, 11)
    result = simulate(trace, placement, COSTS)
    assert result.hit_rates == pytest.approx(placement.hit_rates)
    assert result.seconds_per_token == pytest.approx(placement.seconds)
    assert result.spread_over_layers == pytest.approx(placement.spread)


def test_long_traces_take_no_two_seconds() -> None:
    trace = np.random.default_rng(0).integers(0, 8, (100_000, 32, 2))
    placement = random_placement(0, 32, 8)
    start = time.process_time()
    result = simulate(trace, placement, COSTS)
    assert time.process_time() - start < 2
    share = sum(map(len, placement.resident)) / 256
    assert result.hit_rate == pytest.approx(share, abs=0.01)


# --- Copies ---------------------------------------------------------------------------------------

# A hit is 1 s, a miss 10 s: time for two copies.
BY_HAND = Costs(1.0, 0.0, 10.0, 0.0, 5.0, 0.0)


def test_room_for_one_copy() -> None:
    trace = tokens(
        (0, 0),  # The copy of (1, 0) arrives at 5, layer 1 begins at 10: a hit.
        (1, 2),  # (1, 1) takes its place, but is not chosen.
        (1, 1),  # It is still there.
        (2, 0),  # (1, 2) takes its place, and is never chosen.
    )
    result = simulate(
        trace, nothing_resident(), BY_HAND, statistics=followed(), prefetch=True, spare=1
    )
    assert result.hit_rates == (0, 0.5)
    assert result.seconds_per_token == pytest.approx((11 + 20 + 11 + 20) / 4)
    assert (result.copied, result.prefetches_used, result.prefetches_wasted) == (3, 2, 1)
    assert result.layers_without_round_trip == pytest.approx(2 / 8)


def test_the_least_recently_used_makes_room() -> None:
    trace = tokens(
        (0, 0),  # (1, 0) arrives at 5, and what is next likely, (1, 1), at 10, just in time.
        (2, 0),  # (1, 2) takes the place of (1, 1), for (1, 0) was used after it came.
        (1, 0),  # (1, 1) takes the place of (1, 2), which was never used.
        (1, 2),
    )
    result = simulate(
        trace, nothing_resident(), BY_HAND, statistics=followed(), prefetch=True, spare=2
    )
    assert result.hit_rates == (0, 0.75)
    assert result.seconds_per_token == pytest.approx((11 + 11 + 11 + 20) / 4)
    assert (result.copied, result.prefetches_used, result.prefetches_wasted) == (4, 1, 3)


def test_what_is_here_and_expected_is_kept() -> None:
    """The second token could bring (1, 1) or (1, 2), but only in the place of what it needs."""
    trace = tokens((0, 0), (0, 0), (0, 0))
    result = simulate(
        trace, nothing_resident(), BY_HAND, statistics=followed(), prefetch=True, spare=1
    )
    assert result.hit_rates == (0, 1)
    assert (result.copied, result.prefetches_used) == (1, 1)


@pytest.mark.parametrize(
    ("copy", "copied", "hits"),
    [(10.0, 2, 1.0), (10.1, 0, 0.0), (5.0, 3, 1.0), (3.3, 3, 1.0), (5.1, 2, 1.0)],
)
def test_copies_that_would_come_too_late_are_not_begun(
    copy: float, copied: int, hits: float
) -> None:
    """Layer 1 begins ten seconds after layer 0, and copies run one after the other."""
    costs = Costs(1.0, 0.0, 10.0, 0.0, copy, 0.0)
    result = simulate(
        tokens((0, 0), (1, 1)), nothing_resident(), costs, statistics=followed(), prefetch=True,
        spare=3,
    )  # fmt: skip
    assert result.copied == copied
    assert result.hit_rates == (0, hits)


def test_the_lane_is_busy_until_its_copies_are_done() -> None:
    """A hit in layer 1 leaves no time for a copy to layer 2 once the lane has another."""
    placement = Placement("uniform", ((), (0, 1, 2), ()), 3, (0, 1, 0), 1.0, ("a", "b", "c"))
    costs = Costs(6.0, 0.0, 10.0, 0.0, 6.0, 0.0)
    options: dict[str, Any] = {"statistics": followed(3), "prefetch": True, "spare": 1}
    near = simulate(tokens((0, 0, 0)), placement, costs, **options)
    assert (near.hit_rates, near.copied) == ((0, 1, 1), 1)  # begun at 10, there at 16
    # Two layers ahead it begins at 0, and layer 2 at 16.
    far = simulate(tokens((0, 0, 0)), placement, costs, **options, ahead=2)
    assert (far.hit_rates, far.copied) == ((0, 1, 1), 1)
    slow = Costs(6.0, 0.0, 10.0, 0.0, 15.0, 0.0)
    assert simulate(tokens((0, 0, 0)), placement, slow, **options).copied == 0
    assert simulate(tokens((0, 0, 0)), placement, slow, **options, ahead=2).hit_rates == (0, 1, 1)


def test_a_copy_that_is_late_is_a_miss_and_stays() -> None:
    """Two layers ahead, a fast layer between makes the estimate wrong."""
    placement = Placement("uniform", ((), (0, 1, 2), ()), 3, (0, 1, 0), 1.0, ("a", "b", "c"))
    costs = Costs(1.0, 0.0, 10.0, 0.0, 15.0, 0.0)
    # It was to begin at 10 + 10, begins at 11, and the copy arrives at 15. The second token begins
    # at 21, and finds it in its last layer.
    result = simulate(
        tokens((0, 0, 0), (0, 0, 0)), placement, costs, statistics=followed(3), prefetch=True,
        spare=1, ahead=2,
    )  # fmt: skip
    assert result.hit_rates == (0, 1, 0.5)
    assert result.seconds_per_token == pytest.approx((21 + 12) / 2)
    assert (result.copied, result.prefetches_used, result.prefetches_wasted) == (1, 1, 0)


def test_nothing_is_copied_that_does_not_pay() -> None:
    """A GPU slower than the CPU."""
    costs = Costs(10.0, 0.0, 9.0, 0.0, 1.0, 0.0)
    result = simulate(
        tokens((0, 0), (1, 1)), nothing_resident(), costs, statistics=followed(), prefetch=True,
        spare=6,
    )  # fmt: skip
    assert result.copied == 0


def test_copies_stop_where_another_hit_would_only_lengthen_the_gpus_lane() -> None:
    """Three experts per token: two hits and a miss take 6 s, three hits 9 s."""
    trace = np.tile(np.array([0, 1, 2]), (4, 2, 1))
    statistics = statistics_of(trace, 3)
    costs = Costs(3.0, 0.0, 5.0, 0.0, 0.5, 0.0)
    result = simulate(
        trace, nothing_resident(), costs, statistics=statistics, prefetch=True, spare=6
    )
    assert result.copied == 2
    assert result.hit_rates == pytest.approx((0, 2 / 3))
    assert result.seconds_per_token == pytest.approx(15 + 6)


def test_residents_are_not_copied() -> None:
    placement = Placement("uniform", ((), (0, 1, 2)), 3, (0, 1), 1.0, ("a", "b"))
    result = simulate(
        tokens((0, 0), (1, 1)), placement, BY_HAND, statistics=followed(), prefetch=True, spare=9
    )
    assert result.copied == 0


@pytest.mark.parametrize("spare", [0, 1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("lanes", ["parallel", "sequential"])
def test_copies_on_random_routing(spare: int, ahead: int, lanes: Any) -> None:
    """With copies that cost almost nothing."""
    trace = random_trace(1, 80, 4, 6, 2)
    trace[trace == 6] = 0  # a layer without any would leave no time
    statistics = statistics_of(trace, 6)
    placement = random_placement(3, 4, 6)
    costs = Costs(1e-6, 0.0, 1.0, 0.0, 1e-9, 0.0)
    result = simulate(
        trace, placement, costs, statistics=statistics, prefetch=True, spare=spare, ahead=ahead,
        lanes=lanes,
    )  # fmt: skip
    plain = simulate(trace, placement, costs, lanes=lanes)
    assert result.prefetches_used + result.prefetches_wasted == result.copied
    assert result.hit_rates[:ahead] == plain.hit_rates[:ahead]
    if spare == 0:
        assert result == plain
    else:
        assert result.hit_rate > plain.hit_rate + 0.01
        assert result.seconds_per_token < plain.seconds_per_token
    if spare == 5:  # for all of a layer that are not resident
        assert ahead == 2 or result.hit_rates[1:] == (1.0,) * 3


# --- Prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("capacity", [1, 3, 6])
def test_recall_against_a_loop(capacity: int, ahead: int) -> None:
    trace = random_trace(7, 60, 5, 7, 2)
    trace[3, 1] = 7  # a layer that chose nothing
    statistics = statistics_of(random_trace(7, 300, 5, 7, 2), 7)
    found = {"transitions": 0, "popularity": 0, "lru": 0}
    total = 0
    recent: list[list[int]] = [[] for _ in range(5)]
    for token in trace:
        for layer, chosen in enumerate(token):
            real = [int(expert) for expert in chosen if expert != 7]
            if layer >= ahead:
                total += len(real)
                likely = statistics.predict(layer - ahead, token[layer - ahead], ahead)
                counts = statistics.counts[layer]
                popular = np.argsort(-counts, kind="stable").tolist()
                found["transitions"] += len(set(likely[:capacity].tolist()) & set(real))
                found["popularity"] += len(set(popular[:capacity]) & set(real))
                found["lru"] += len(set(recent[layer][-capacity:]) & set(real))
            for expert in real:
                recent[layer] = [e for e in recent[layer] if e != expert] + [expert]
    recall = prediction_recall(statistics, trace, capacity, ahead)
    assert recall == pytest.approx({name: count / total for name, count in found.items()})


def test_recall_of_a_long_trace() -> None:
    """Longer than what is compared at a time: each expert comes again after three others."""
    index = np.tile(np.arange(4), 1000)[:, None, None]
    trace = np.repeat(index, 2, axis=1)
    statistics = statistics_of(trace, 4)
    assert prediction_recall(statistics, trace, 3)["lru"] == 0
    assert prediction_recall(statistics, trace, 4)["lru"] == pytest.approx(1 - 4 / 4000)


def test_recall_with_room_for_all() -> None:
    trace = random_trace(2, 50, 3, 5, 2)
    recall = prediction_recall(statistics_of(trace, 5), trace, 5)
    assert (recall["transitions"], recall["popularity"]) == (1, 1)


# --- What comes out -------------------------------------------------------------------------------

RESULT = Simulation(
    hit_rate=0.625,
    spread_over_layers=0.125,
    spread_over_tokens=0.1,
    layers_without_round_trip=0.25,
    seconds_per_token=12.5e-3,
    seconds_std=1.5e-3,
    copied=7,
    prefetches_used=5,
    prefetches_wasted=2,
    overlap=1.0,
    hit_rates=(0.75, 0.5),
    layers=("model.layers.0.mlp", "m"),
)


def test_table() -> None:
    assert str(RESULT) == (
        "ms per token               12.5 (standard deviation 1.5)\n"
        "hit rate                   0.625\n"
        "spread over layers         0.125\n"
        "spread over tokens         0.100\n"
        "layers without round trip  0.250\n"
        "overlap of the lanes       1.000\n"
        "experts copied ahead       7 (5 used, 2 wasted)\n"
        "\n"
        "layer               hit rate\n"
        "----------------------------\n"
        "model.layers.0.mlp     0.750\n"
        "m                      0.500"
    )


def test_plain_values() -> None:
    values = json.loads(json.dumps(RESULT.to_dict()))
    for name in ("hit_rates", "layers"):
        values[name] = tuple(values[name])
    assert Simulation(**values) == RESULT


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([[[0]]], r"`trace` must be int64 \[T, 2, A\], got list"),
        (np.zeros((3, 2, 1), np.int32), r"`trace` must be int64 \[T, 2, A\], got int32"),
        (np.zeros((3, 2), np.int64), r"`trace` must be .* got shape \[3, 2\]"),
        (np.zeros((3, 4, 1), np.int64), r"`trace` must be .* got shape \[3, 4, 1\]"),
        (np.zeros((0, 2, 1), np.int64), r"at least one token, got shape \[0, 2, 1\]"),
        (np.full((3, 2, 1), 4), r"experts from 0 to 2, or 3 for none, got 4"),
        (np.full((3, 2, 1), -1), r"experts from 0 to 2, or 3 for none, got -1"),
    ],
)
def test_bad_traces(trace: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(trace, nothing_resident(), BY_HAND)
    with pytest.raises(ValueError, match=message):
        prediction_recall(followed(), trace, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": True}, "`statistics` must be given .* got None"),
        ({"spare": -1}, "`spare` must be .* not negative, got -1"),
        ({"ahead": 0}, "`ahead` must be from 1 to 3, .* got 0"),
        ({"ahead": 4}, "`ahead` must be from 1 to 3, .* got 4"),
        ({"lanes": "both"}, "`lanes` must be .* got 'both'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(tokens((0, 0)), nothing_resident(), BY_HAND, **options)


def test_statistics_of_another_model() -> None:
    with pytest.raises(ValueError, match="2 layers of 3"):
        simulate(tokens((0, 0)), nothing_resident(), BY_HAND, statistics=followed(3), prefetch=True)


@pytest.mark.parametrize(
    ("capacity", "ahead", "message"),
    [
        (0, 1, "`capacity` must be from 1 to 3, .* got 0"),
        (4, 1, "`capacity` must be from 1 to 3, .* got 4"),
        (1, 0, "`ahead` must be from 1 to 1 for 2 layers, got 0"),
        (1, 2, "`ahead` must be from 1 to 1 for 2 layers, got 2"),
    ],
)
def test_bad_predictions(capacity: int, ahead: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prediction_recall(followed(), tokens((0, 0)), capacity, ahead)

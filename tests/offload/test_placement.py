"""Placements against an enumeration of all that a token may choose, and of all placements."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

import haq
from haq.offload.costs import Costs
from haq.offload.placement import POLICIES, Placement, expected_seconds, place
from haq.offload.routing import RoutingStatistics

Floats = NDArray[np.float64]
Cell = tuple[int, int]

# A GPU ten times as fast: the fewer misses the better.
ORDINARY = Costs(0.4e-3, 0.0, 4e-3, 0.0, 7e-3, 1e-4)
# A GPU slower than the CPU: a layer is fastest with some experts on each side.
SLOW_GPU = Costs(3e-3, 1e-3, 2e-3, 0.0, 7e-3, 0.0)


def random_statistics(seed: int, layers: int, experts: int, chosen: int) -> RoutingStatistics:
    """Uneven routing of 60 tokens, and every set of experts once, so that no share is 0 or 1."""
    rng = np.random.default_rng(seed)
    sets = list(itertools.combinations(range(experts), chosen))
    statistics = RoutingStatistics(layers, experts, chosen)
    before: list[NDArray[np.int64]] = []
    for layer in range(layers):
        drawn = rng.choice(len(sets), size=60, p=rng.dirichlet(np.full(len(sets), 0.5)))
        index = np.array([sets[i] for i in (*drawn, *range(len(sets)))], dtype=np.int64)
        statistics.add(layer, index, None, before[:3])
        before.insert(0, index)
    return statistics


def random_costs(seed: int) -> Costs:
    rng = np.random.default_rng(seed)
    gpu, cpu, copy = 10 ** rng.uniform(-4, -2, 3)
    return Costs(gpu, rng.choice([0, gpu]), cpu, rng.choice([0, cpu]), copy, rng.choice([0, cpu]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[RoutingStatistics, Costs]:
    experts = draw(st.integers(2, 4))
    chosen = draw(st.integers(1, experts))
    seed = draw(st.integers(0, 10**6))
    return random_statistics(seed, draw(st.integers(1, 3)), experts, chosen), random_costs(seed)


def seconds_of_sets(statistics: RoutingStatistics, costs: Costs, layer: int) -> dict[int, float]:
    """For each set of residents, as bits, the expected seconds: by all that a token may choose.

    The distribution with the most entropy of those with the right shares, found by Newton's method.
    """
    chosen, experts = statistics.experts_per_token, statistics.num_experts
    share = statistics.counts[layer] / statistics.counts[layer].sum() * chosen
    sets = list(itertools.combinations(range(experts), chosen))
    member = np.array([[float(e in s) for e in range(experts)] for s in sets])
    theta = np.zeros(experts)
    for _ in range(200):
        probability = np.exp(member @ theta)
        probability /= probability.sum()
        mean = probability @ member
        covariance = (member.T * probability) @ member - np.outer(mean, mean)
        theta += 0.5 * np.linalg.pinv(covariance, rcond=1e-10) @ (share - mean)
    assert np.abs(probability @ member - share).max() < 1e-9
    result = {}
    for bits in range(2**experts):
        hits = [sum(bits >> e & 1 for e in s) for s in sets]
        times = [costs.layer([1] * h, [1] * (chosen - h)) for h in hits]
        result[bits] = float(probability @ np.array(times))
    return result


def bits_of(experts: Sequence[int]) -> int:
    return sum(1 << expert for expert in experts)


def used_bytes(placement: Placement, sizes: Sequence[int]) -> int:
    return sum(len(e) * size for e, size in zip(placement.resident, sizes, strict=True))


def cells(placement: Placement) -> set[Cell]:
    return {(layer, expert) for layer, e in enumerate(placement.resident) for expert in e}


# --- Expected seconds -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_expected_seconds_is_that_of_all_choices(
    case: tuple[RoutingStatistics, Costs], seed: int
) -> None:
    statistics, costs = case
    rng = np.random.default_rng(seed)
    resident = [
        np.flatnonzero(rng.random(statistics.num_experts) < 0.5).tolist() for _ in statistics.layers
    ]
    expected = sum(
        seconds_of_sets(statistics, costs, layer)[bits_of(experts)]
        for layer, experts in enumerate(resident)
    )
    assert expected_seconds(resident, statistics, costs) == pytest.approx(expected, rel=1e-5)


def test_one_expert_per_token_needs_no_model() -> None:
    statistics = RoutingStatistics.from_counts(
        np.array([[5, 3, 2], [1, 1, 8]]), experts_per_token=1
    )
    costs = Costs(1.0, 0.5, 8.0, 1.0, 20.0, 3.0)
    expected = (0.7 * 1.5 + 0.3 * 12) + (0.2 * 1.5 + 0.8 * 12)
    assert expected_seconds([[0, 2], [0, 1]], statistics, costs) == pytest.approx(expected)


def test_an_expert_that_is_always_or_never_chosen() -> None:
    counts = np.array([[10, 6, 4, 0]])  # of ten tokens with two experts each
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=2)
    costs = Costs(1.0, 0.0, 8.0, 0.0, 20.0, 3.0)
    one, both = 11.0, 2.0
    for resident, expected in [
        ([0], one),
        ([0, 1], 0.6 * both + 0.4 * one),
        ([0, 3], one),
        ([3], 19.0),
    ]:
        assert expected_seconds([resident], statistics, costs) == pytest.approx(expected, rel=1e-3)


def test_many_experts_per_token() -> None:
    """No product of odds overflows; all alike, m follows a hypergeometric distribution."""
    statistics = RoutingStatistics.from_counts(np.full((1, 64), 3), experts_per_token=32)
    costs = Costs(1e-9, 0.0, 1.0, 0.0, 1.0, 0.0)
    # Linear in the number of misses: 32 * 48 / 64 of them.
    seconds = expected_seconds([list(range(16))], statistics, costs)
    assert seconds == pytest.approx(24.0)
    skewed = np.array([[10**6] * 47 + [10**6 // 17] * 17])
    statistics = RoutingStatistics.from_counts(skewed, experts_per_token=48)
    seconds = expected_seconds([list(range(47))], statistics, costs)
    assert seconds == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("layer", [0, 1])
def test_what_nobody_chose_counts_as_uniform(layer: int) -> None:
    counts = np.array([[0, 0], [0, 0]])
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=1)
    resident: list[list[int]] = [[], []]
    resident[layer] = [1]
    expected = 1.5 * 4.1e-3 + 0.5 * 0.4e-3
    assert expected_seconds(resident, statistics, ORDINARY) == pytest.approx(expected)


# --- Latency --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_latency_is_the_best_of_all(
    case: tuple[RoutingStatistics, Costs], data: st.DataObject
) -> None:
    statistics, costs = case
    layers, experts = len(statistics.layers), statistics.num_experts
    equal = data.draw(st.booleans())
    sizes = (
        [7] * layers
        if equal
        else data.draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    )
    budget = data.draw(st.integers(0, sum(sizes) * experts))
    seconds, weight = np.zeros(1), np.zeros(1)
    popular = np.zeros(1), np.zeros(1)
    for layer, size in enumerate(sizes):
        by_set = seconds_of_sets(statistics, costs, layer)
        number = np.array([bits.bit_count() for bits in by_set])
        seconds = np.add.outer(seconds, list(by_set.values())).ravel()
        weight = np.add.outer(weight, number * size).ravel()
        ranked = np.argsort(-statistics.counts[layer], kind="stable")
        tops = [by_set[bits_of(ranked[:k].tolist())] for k in range(experts + 1)]
        popular = (
            np.add.outer(popular[0], tops).ravel(),
            np.add.outer(popular[1], size * np.arange(experts + 1)).ravel(),
        )
    best = seconds[weight <= budget].min()
    best_popular = popular[0][popular[1] <= budget].min()
    placement = place("latency", statistics, costs, sizes, budget)
    assert used_bytes(placement, sizes) <= budget
    assert placement.seconds >= best * (1 - 1e-5)
    assert placement.seconds <= best_popular * (1 + 1e-5)
    chosen = statistics.experts_per_token
    times = [costs.layer([1] * (chosen - m), [1] * m) for m in range(chosen + 1)]
    if times == sorted(times):  # the most popular experts are the best then
        assert placement.seconds == pytest.approx(best, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_latency_is_never_worse(case: tuple[RoutingStatistics, Costs], data: st.DataObject) -> None:
    statistics, costs = case
    layers = len(statistics.layers)
    size = st.sampled_from([1, 2, 3, 999_983, 1_000_003])
    sizes = data.draw(st.lists(size, min_size=layers, max_size=layers))
    budget = data.draw(st.integers(0, sum(sizes) * statistics.num_experts))
    fastest = place("latency", statistics, costs, sizes, budget)
    assert used_bytes(fastest, sizes) <= budget
    for policy in POLICIES[1:]:
        other = place(policy, statistics, costs, sizes, budget)
        assert used_bytes(other, sizes) <= budget
        assert fastest.seconds <= other.seconds * (1 + 1e-9)


def test_sets_of_path_compete_where_hits_are_not_always_welcome() -> None:
    """A layer is fastest with a hit and a miss, so two experts that come together are no gain."""
    statistics = random_statistics(394, layers=2, experts=4, chosen=2)
    costs = Costs(3.0, 0.0, 2.0, 0.0, 9.0, 1.0)
    popular = [np.argsort(-row, kind="stable").tolist() for row in statistics.counts]
    best_popular = min(
        expected_seconds([popular[0][:k], popular[1][:n]], statistics, costs)
        for k, n in itertools.product(range(4), repeat=2)
        if k + n <= 3
    )
    path = place("path", statistics, costs, [1, 1], 3)
    assert path.seconds < best_popular * (1 - 1e-3)
    assert place("latency", statistics, costs, [1, 1], 3).seconds <= path.seconds * (1 + 1e-9)


@pytest.mark.parametrize("sizes", [[999_983, 1_000_003, 1_999_993], [1, 10**6, 10**9]])
def test_coarse_units(sizes: list[int]) -> None:
    """Never over the budget, at most a little below it, and never slower with a larger one."""
    statistics = random_statistics(3, layers=3, experts=4, chosen=2)
    tops = []
    for layer in range(3):
        ranked = np.argsort(-statistics.counts[layer], kind="stable")
        by_set = seconds_of_sets(statistics, ORDINARY, layer)
        tops.append([by_set[bits_of(ranked[:k].tolist())] for k in range(5)])
    total = sum(sizes) * 4
    unit = -(-total // 20_000)
    last = np.inf
    for budget in [0, *np.linspace(1, total, 60).astype(int).tolist(), total, 2 * total]:
        placement = place("latency", statistics, ORDINARY, sizes, budget)
        assert used_bytes(placement, sizes) <= budget
        assert placement.seconds <= last * (1 + 1e-9)
        last = placement.seconds
        bound = min(
            sum(tops[layer][k] for layer, k in enumerate(numbers))
            for numbers in itertools.product(range(5), repeat=3)
            if sum(k * s for k, s in zip(numbers, sizes, strict=True)) <= max(budget - 3 * unit, 0)
        )
        assert placement.seconds <= bound * (1 + 1e-6)
    assert placement.num_resident == 12


def test_memory_is_used_where_it_does_no_harm() -> None:
    statistics = RoutingStatistics.from_counts(np.full((2, 4), 5), experts_per_token=1)
    indifferent = Costs(2.0, 0.0, 1.5, 0.0, 9.0, 0.5)
    placement = place("latency", statistics, indifferent, [10, 10], 57)
    assert placement.resident == ((0, 1, 2, 3), (0,))


def test_among_equals_more_experts_win() -> None:
    """One that half of the tokens choose, or two small ones that a quarter chooses each."""
    counts = np.array([[4, 2, 1, 1], [2, 2, 2, 2]])
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=1)
    assert place("latency", statistics, ORDINARY, [2, 1], 2).resident == ((), (0, 1))


def test_memory_is_not_used_where_it_does_harm() -> None:
    statistics = RoutingStatistics.from_counts(np.full((2, 4), 5), experts_per_token=1)
    placement = place("latency", statistics, Costs(2.0, 0.0, 1.5, 0.0, 9.0, 0.4), [10, 10], 80)
    assert placement.resident == ((), ())


def test_slow_gpu_gets_a_part() -> None:
    """Two of four experts at a time, 4 ms each on the GPU and 2 ms on the CPU."""
    statistics = random_statistics(1, layers=2, experts=4, chosen=2)
    placement = place("latency", statistics, SLOW_GPU, [1, 1], 8)
    best = sum(min(seconds_of_sets(statistics, SLOW_GPU, layer).values()) for layer in range(2))
    everything = place("popularity", statistics, SLOW_GPU, [1, 1], 8)
    assert best * (1 - 1e-6) <= placement.seconds < everything.seconds


def test_latency_of_a_large_model_takes_no_two_seconds() -> None:
    rng = np.random.default_rng(0)
    counts = rng.gamma(0.5, size=(48, 128)) * 1000 + 100
    statistics = RoutingStatistics.from_counts(counts.astype(np.int64), experts_per_token=8)
    start = time.process_time()
    placement = place("latency", statistics, ORDINARY, [10**7] * 48, 3072 * 10**7)
    assert time.process_time() - start < 2
    assert placement.num_resident == 3072


# --- The other policies ---------------------------------------------------------------------------

COUNTS = np.array([[6, 1, 9, 4], [5, 5, 5, 5], [2, 12, 3, 3]])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, ((), (), ())),
        (1, ((), (), (1,))),
        (2, ((2,), (), (1,))),
        (3, ((0, 2), (), (1,))),
        (6, ((0, 2), (0, 1, 2), (1,))),
        (8, ((0, 2, 3), (0, 1, 2, 3), (1,))),
        (12, ((0, 1, 2, 3),) * 3),
        (99, ((0, 1, 2, 3),) * 3),
    ],
)
def test_popularity(budget: int, expected: tuple[tuple[int, ...], ...]) -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    assert place("popularity", statistics, ORDINARY, [1] * 3, budget).resident == expected


def test_popularity_is_a_share_of_the_layers_tokens() -> None:
    counts = np.array([[600, 400], [9, 1]])
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=1)
    assert place("popularity", statistics, ORDINARY, [1, 1], 1).resident == ((), (0,))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, ((2,), (), ())),
        (3, ((2,), (0,), (1,))),
        (5, ((0, 2), (0, 1), (1,))),
        (8, ((0, 2, 3), (0, 1, 2), (1, 2))),
    ],
)
def test_uniform(budget: int, expected: tuple[tuple[int, ...], ...]) -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    assert place("uniform", statistics, ORDINARY, [1] * 3, budget).resident == expected


def reference_path_order(statistics: RoutingStatistics) -> list[Cell]:
    """Half of the places to edges, half to the layer with the lowest hit rate, edge by edge."""
    counts = statistics.counts
    layers, experts = counts.shape
    share = [[int(c) / int(row.sum()) for c in row] for row in counts]
    edges = []
    for layer in range(layers - 1):
        joint = statistics.transitions[0, layer]
        for i, j in itertools.product(range(experts), repeat=2):
            known = int(joint[i, j]) / int(joint.sum()) if joint.any() else None
            flow = share[layer][i] * share[layer + 1][j] if known is None else known
            edges.append((-flow, layer, i, j))
    order: list[Cell] = []
    pending: list[Cell] = []

    def rate(layer: int) -> float:
        return sum(share[layer][e] for m, e in order if m == layer)

    def path() -> Cell | None:
        while pending:
            cell = pending.pop()
            if cell not in order:
                return cell
        mean = sum(map(rate, range(layers))) / layers
        heads = {}  # the first open edge of each layer
        for edge in sorted(edges):
            ends = [c for c in ((edge[1], edge[2]), (edge[1] + 1, edge[3])) if c not in order]
            if ends and edge[1] not in heads:
                heads[edge[1]] = (edge, ends)
        for _, ends in sorted(heads.values()):
            if all(rate(layer) <= mean + 1e-9 for layer, _ in ends):
                pending.extend(ends[1:])
                return ends[0]
        return None

    travelled = 0
    for number in range(1, layers * experts + 1):
        cell = path() if travelled < number / 2 else None
        travelled += cell is not None
        if cell is None:
            open_layers = [m for m in range(layers) if sum(n == m for n, _ in order) < experts]
            layer = min(open_layers, key=lambda m: (round(rate(m), 12), m))
            free = [e for e in range(experts) if (layer, e) not in order]
            cell = layer, min(free, key=lambda e: (-share[layer][e], e))
        order.append(cell)
    return order


@pytest.mark.parametrize("known", [True, False], ids=["transitions", "popularity only"])
@pytest.mark.parametrize("seed", range(6))
def test_path_follows_its_two_stages(seed: int, known: bool) -> None:
    statistics = random_statistics(seed, layers=4, experts=5, chosen=2)
    if not known:
        statistics.transitions[:] = 0
    order = reference_path_order(statistics)
    for budget in range(len(order) + 1):
        placement = place("path", statistics, ORDINARY, [1] * 4, budget)
        assert cells(placement) == set(order[:budget])


def test_path_begins_with_what_is_travelled_most() -> None:
    """Not with the most popular experts: those are followed by many different ones."""
    statistics = RoutingStatistics(2, num_experts=8, experts_per_token=1)
    first = np.array([0] * 7 + [5] * 6)[:, None]
    second = np.array([0, 1, 2, 3, 4, 6, 7] + [5] * 6)[:, None]
    statistics.add(0, first, None)
    statistics.add(1, second, None, [first])
    assert place("path", statistics, ORDINARY, [1, 1], 1).resident == ((5,), ())
    assert place("path", statistics, ORDINARY, [1, 1], 2).resident == ((5,), (5,))
    assert place("popularity", statistics, ORDINARY, [1, 1], 1).resident == ((0,), ())


def test_path_of_a_single_layer_is_its_popularity() -> None:
    statistics = RoutingStatistics.from_counts(COUNTS[:1], experts_per_token=1)
    assert place("path", statistics, ORDINARY, [1], 2).resident == ((0, 2),)


@settings(max_examples=25, deadline=None)
@given(cases(), st.data())
def test_larger_budgets(case: tuple[RoutingStatistics, Costs], data: st.DataObject) -> None:
    """All but "latency" only add experts, and with that one nothing gets slower."""
    statistics, costs = case
    layers = len(statistics.layers)
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers))
    before = {policy: place(policy, statistics, costs, sizes, 0) for policy in POLICIES}
    for budget in range(1, sum(sizes) * statistics.num_experts + 1):
        for policy in POLICIES:
            now = place(policy, statistics, costs, sizes, budget)
            assert used_bytes(now, sizes) <= budget
            if policy == "latency":
                assert now.seconds <= before[policy].seconds * (1 + 1e-9)
            else:
                assert cells(now) >= cells(before[policy])
            before[policy] = now
    for policy in POLICIES[1:]:
        assert before[policy].num_resident == layers * statistics.num_experts


@pytest.mark.parametrize("policy", POLICIES)
def test_budget_below_one_expert(policy: str) -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    placement = place(policy, statistics, ORDINARY, [10, 10, 10], 9)
    assert placement.resident == ((), (), ())
    assert placement.hit_rate == 0
    assert placement.seconds == pytest.approx(3 * 8.1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_stay_as_they_are(policy: str) -> None:
    statistics = random_statistics(0, layers=3, experts=4, chosen=2)
    counts, transitions = statistics.counts.copy(), statistics.transitions.copy()
    first = place(policy, statistics, ORDINARY, [1] * 3, 5)
    assert place(policy, statistics, ORDINARY, [1] * 3, 5) == first
    np.testing.assert_array_equal(statistics.counts, counts)
    np.testing.assert_array_equal(statistics.transitions, transitions)


def test_new_counts_are_not_mistaken_for_old_ones() -> None:
    statistics = RoutingStatistics.from_counts(np.array([[3, 1]]), experts_per_token=1)
    costs = Costs(1.0, 0.0, 2.0, 0.0, 9.0, 0.0)
    assert expected_seconds([[0]], statistics, costs) == pytest.approx(1.25)
    statistics.counts[0] = [1, 3]
    assert expected_seconds([[0]], statistics, costs) == pytest.approx(1.75)


# --- What comes out -------------------------------------------------------------------------------


def test_hit_rates_and_spread() -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    placement = place("popularity", statistics, ORDINARY, [1] * 3, 6)
    assert placement.hit_rates == pytest.approx((0.75, 0.75, 0.6))
    assert placement.hit_rate == pytest.approx(0.7)
    assert placement.spread == pytest.approx(0.05 * 2**0.5)
    assert placement.num_resident == 6
    assert placement.num_experts == 4
    assert placement.layers == statistics.layers
    assert placement.seconds == expected_seconds(placement.resident, statistics, ORDINARY)


def test_table() -> None:
    placement = Placement(
        "path", ((0, 1, 2, 3, 7), ()), 8, (0.75, 0.0), 1.5e-3, ("model.layers.0.mlp", "m")
    )
    assert str(placement) == (
        "path: 5 of 16 experts resident, expected hit rate 0.375 (spread over layers 0.375), "
        "1.5 ms per token\n"
        "\n"
        "layer               number  hit rate  resident\n"
        "----------------------------------------------\n"
        "model.layers.0.mlp       5     0.750  0-3, 7\n"
        "m                        0     0.000"
    )


def test_table_of_many_experts_stays_readable() -> None:
    every_other = tuple(range(0, 128, 2))
    names = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(48))
    table = str(Placement("latency", (every_other,) * 48, 128, (0.5,) * 48, 0.2, names))
    lines = table.splitlines()
    assert len(lines) == 48 + 4
    assert max(map(len, lines[1:])) <= 100
    assert lines[-1].endswith("  64     0.500  0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, ...")


def test_plain_values() -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    placement = place("latency", statistics, ORDINARY, [1] * 3, 6)
    values = json.loads(json.dumps(placement.to_dict()))
    again = Placement(
        policy=values["policy"],
        resident=tuple(map(tuple, values["resident"])),
        num_experts=values["num_experts"],
        hit_rates=tuple(values["hit_rates"]),
        seconds=values["seconds"],
        layers=tuple(values["layers"]),
    )
    assert again == placement


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "sizes", "budget", "message"),
    [
        ("fastest", [1] * 3, 5, r"`policy` must be one of 'latency', .* got 'fastest'"),
        ("path", [1] * 3, -1, r"`budget` must be .* not negative, got -1"),
        ("path", [1] * 3, 1.5, r"`budget` must be a whole number .* got 1.5"),
        ("path", [1] * 2, 5, r"`sizes` must hold .* 3 layers, got 2"),
        ("path", [1, 0, 1], 5, r"`sizes` must be positive .* got 0 for layer 1"),
        ("path", [1, 1, -4], 5, r"`sizes` must be positive .* got -4 for layer 2"),
    ],
)
def test_bad_options(policy: str, sizes: list[int], budget: int, message: str) -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    with pytest.raises(ValueError, match=message):
        place(policy, statistics, ORDINARY, sizes, budget)


def test_statistics_without_layers() -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    statistics.layers = ()
    with pytest.raises(ValueError, match="`statistics` must be of at least one layer"):
        place("latency", statistics, ORDINARY, [], 5)
    with pytest.raises(ValueError, match="`statistics` must be of at least one layer"):
        expected_seconds([], statistics, ORDINARY)


@pytest.mark.parametrize(
    ("resident", "message"),
    [
        ([[0], [1]], r"`resident` must hold the experts of 3 layers, got 2"),
        ([[0], [4], []], r"`resident` must hold .* 0 to 3 in each layer, got \[4\] for layer 1"),
        ([[0], [], [-1]], r"got \[-1\] for layer 2"),
        ([[2, 2], [], []], r"got \[2, 2\] for layer 0"),
    ],
)
def test_residents_that_do_not_fit(resident: list[list[int]], message: str) -> None:
    statistics = RoutingStatistics.from_counts(COUNTS, experts_per_token=2)
    with pytest.raises(ValueError, match=message):
        expected_seconds(resident, statistics, ORDINARY)


# --- Real routing ---------------------------------------------------------------------------------


@pytest.fixture(params=["mixtral_8x7b_original", "mixtral_8x7b_instruct"])
def mixtral(request: pytest.FixtureRequest, shared: Path) -> RoutingStatistics:
    """How often Mixtral-8x7B chose each expert on seven subjects of MMLU."""
    folder = shared / "data" / "routing" / "mixtral-popularity-mmlu" / request.param
    files = sorted(folder.glob("*.json"))
    if not files:
        pytest.skip(f"needs the reference data: no routing in {folder}")
    counts = sum(np.array(json.loads(f.read_text())["expert_popularity"]) for f in files)
    return RoutingStatistics.from_counts(counts, experts_per_token=2)


@pytest.mark.parametrize("budget", [64, 128, 192])
def test_path_on_real_routing(mixtral: RoutingStatistics, budget: int) -> None:
    path, popular = (
        place(policy, mixtral, ORDINARY, [1] * 32, budget) for policy in ("path", "popularity")
    )
    assert path.num_resident == budget
    assert path.spread <= popular.spread / 2
    assert path.hit_rate >= popular.hit_rate - 0.01


@pytest.mark.parametrize("costs", [ORDINARY, SLOW_GPU], ids=["ordinary", "slow GPU"])
@pytest.mark.parametrize("budget", [64, 128, 192])
def test_latency_on_real_routing(mixtral: RoutingStatistics, budget: int, costs: Costs) -> None:
    sizes = [1] * 32
    fastest = place("latency", mixtral, costs, sizes, budget)
    others = [place(policy, mixtral, costs, sizes, budget) for policy in POLICIES[1:]]
    assert fastest.seconds <= min(other.seconds for other in others) * (1 + 1e-9)
    if costs is ORDINARY:
        assert fastest.num_resident == budget
        assert fastest.seconds < min(other.seconds for other in others) * (1 - 1e-4)


@pytest.fixture(scope="module", params=["wikitext2-test.raw", "c4-sample.txt", "tinystories.json"])
def trained(request: pytest.FixtureRequest, shared: Path) -> RoutingStatistics:
    """How a trained Mixtral of four layers routes text."""
    folder, path = shared / "models" / "tiny-mixtral", shared / "data" / "text" / request.param
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = path.read_text(encoding="utf-8")
    texts = json.loads(text) if path.suffix == ".json" else text.splitlines()
    batches = haq.calibration_batches(tokenizer, texts, num_samples=16, sequence_length=128)
    return RoutingStatistics.collect(model, batches)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_path_on_a_trained_model(trained: RoutingStatistics, share: float) -> None:
    layers = len(trained.layers)
    budget = int(share * layers * trained.num_experts)
    path, popular, fastest = (
        place(policy, trained, ORDINARY, [1] * layers, budget)
        for policy in ("path", "popularity", "latency")
    )
    # It gives hits away for a small spread: with two experts of a layer up to 0.05 of them.
    assert path.hit_rate >= popular.hit_rate - 0.05
    assert path.spread <= popular.spread * (1 + 1e-9)
    assert fastest.seconds <= min(path.seconds, popular.seconds) * (1 + 1e-9)

"""Decisions while a model runs, against a simulation of every choice; what is predicted; costs."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq import Costs, RoutingStatistics
from haq.offload import measure as measure_module
from haq.offload import offloader as offloader_module
from haq.offload.collect import experts_modules
from haq.offload.measure import measure_costs
from haq.offload.prefetch import Prefetcher
from haq.offload.schedule import (
    MOST_TOKENS_TO_PREDICT,
    arrives_in_time,
    copies_that_pay,
    prefetch_gain,
)
from haq.offload.watch import RoutingWatch
from haq.offload.weights import expert_weights
from tests.offload.offloading import (
    COPIES,
    KINDS,
    LENGTH,
    MIXED,
    NO_COPIES,
    generated,
    offloader,
    plain_tokens,
    shared_model,
)

CPU = torch.device("cpu")


# --- Copies that pay ------------------------------------------------------------------------------


def simulated(resident: Sequence[int], cold: Sequence[int], copies: int, costs: Costs) -> float:
    """When a layer ends, by hand: three things happen side by side.

    The copies arrive one after the other. The GPU computes what is there first, and each copied
    expert when it has arrived. The CPU computes the rest, and has the way there and back.
    """
    gpu = 0.0
    for tokens in resident:
        gpu += costs.gpu_expert + costs.gpu_token * tokens
    arrived = 0.0
    for tokens in cold[:copies]:
        arrived += costs.copy
        gpu = max(gpu, arrived) + costs.gpu_expert + costs.gpu_token * tokens
    cpu = costs.round_trip if cold[copies:] else 0.0
    for tokens in cold[copies:]:
        cpu += costs.cpu_expert + costs.cpu_token * tokens
    return max(gpu, cpu)


seconds = st.floats(1e-6, 1e-2)
zero_or_more = st.one_of(st.just(0.0), seconds)
tokens_of = st.lists(st.integers(1, 2000), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    costs=st.builds(Costs, seconds, zero_or_more, seconds, zero_or_more, seconds, zero_or_more),
    resident=tokens_of,
    cold=tokens_of,
)
def test_copies_that_pay(costs: Costs, resident: list[int], cold: list[int]) -> None:
    cold.sort(reverse=True)
    copies = copies_that_pay(resident, cold, costs)
    assert 0 <= copies <= len(cold)
    ends = [simulated(resident, cold, count, costs) for count in range(len(cold) + 1)]
    # What is decided counts products of copied experts as if they waited for the last copy at most.
    waited = costs.gpu(cold[: max(copies - 1, 0)])
    assert ends[copies] <= (min(ends) + waited) * (1 + 1e-9)


def test_copies_that_pay_are_the_best_number_where_products_cost_nothing() -> None:
    numbers = random.Random(0)
    chosen = set()
    for _ in range(2000):
        costs = Costs(1e-12, 0.0, *(10 ** numbers.uniform(-5, -2) for _ in range(4)))
        cold = sorted((numbers.choice([1, 2, 30, 900]) for _ in range(6)), reverse=True)
        ends = [simulated([1, 1], cold, count, costs) for count in range(len(cold) + 1)]
        copies = copies_that_pay([1, 1], cold, costs)
        chosen.add(copies)
        assert ends[copies] <= min(ends) * (1 + 1e-6)
        # Of numbers that are as good the smallest one.
        assert all(end > min(ends) * (1 - 1e-12) for end in ends[:copies])
    assert chosen == set(range(7))


def test_copies_by_hand() -> None:
    costs = Costs(1.0, 0.0, 4.0, 0.0, 3.0, 1.0)
    # 0: CPU 1+8. 1: GPU 3+1, CPU 1+4. 2: GPU 6+1.
    assert copies_that_pay([], [1, 1], costs) == 1
    # As long as nine residents take, there is time for two copies.
    assert copies_that_pay([1] * 9, [1, 1], Costs(1.0, 0.0, 12.0, 0.0, 3.0, 1.0)) == 2
    assert copies_that_pay([1, 1], [], costs) == 0
    # A copy as long as all the work never pays.
    assert copies_that_pay([], [1], Costs(1e-9, 0.0, 4.0, 0.0, 5.0, 1.0)) == 0
    assert copies_that_pay([], [1], Costs(1e-9, 0.0, 4.0, 0.0, 4.9, 1.0)) == 1
    assert copies_that_pay([], [1, 1, 1, 1], NO_COPIES) == 0
    assert copies_that_pay([], [4, 3, 2, 1], COPIES) == 4


def test_what_prefetching_gains() -> None:
    costs = Costs(1.0, 0.5, 4.0, 2.0, 9.0, 3.0)
    # On the CPU 3 + 4 + 2, on the GPU 1 + 0.5.
    assert prefetch_gain(1.0, costs) == 7.5
    assert prefetch_gain(0.2, costs) == pytest.approx(1.5)
    assert prefetch_gain(0.0, costs) == 0
    assert prefetch_gain(1.0, Costs(9.0, 0.0, 4.0, 0.0, 1.0, 0.0)) < 0


@pytest.mark.parametrize(
    ("queued", "ahead", "layer", "copy", "expected"),
    [
        (0, 1, 2.0, 2.0, True),
        (0, 1, 2.0, 2.1, False),
        (0, 2, 2.0, 3.9, True),
        (1, 2, 2.0, 2.0, True),
        (1, 2, 2.0, 2.1, False),
        (2, 3, 0.0, 1e-9, False),
    ],
)
def test_copies_in_time(queued: int, ahead: int, layer: float, copy: float, expected: bool) -> None:
    assert arrives_in_time(queued, ahead, layer, Costs(1, 0, 1, 0, copy, 0)) is expected


# --- What is brought early ------------------------------------------------------------------------


class Spare:
    """What a prefetcher asks of spare slots, without slots."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, int]] = []
        self.failures: list[BaseException] = []
        self.waiting = 0

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self.loaded

    def load_early(self, key: tuple[int, int]) -> None:
        assert key not in self.loaded
        self.loaded.append(key)

    def forget_failures(self) -> list[BaseException]:
        failures, self.failures = self.failures, []
        return failures

    def on_their_way(self) -> int:
        return self.waiting


LAYERS, E = 5, 6


def statistics() -> RoutingStatistics:
    """Expert i of a layer is followed by i + 1 in the next, i + 3 in the one after it."""
    known = RoutingStatistics(LAYERS, E, 1)
    for first in range(E):
        before: list[np.ndarray] = []
        for layer, step in enumerate((0, 1, 3, 4, 5)):
            index = np.full((50 + first, 1), (first + step) % E, np.int64)
            known.add(layer, index, None, before[:3])
            before = [index, *before]
    return known


def prefetcher(
    resident: Sequence[set[int]] = ((),) * LAYERS,  # type: ignore[assignment]
    costs: Costs = MIXED,
    seconds: float = 1.0,
    depth: int = 1,
) -> tuple[Prefetcher, Spare, RoutingWatch]:
    spare: Any = Spare()
    watch = RoutingWatch(statistics())
    residents = [frozenset(experts) for experts in resident]
    return Prefetcher(spare, residents, watch, costs, lambda: seconds, depth), spare, watch


def note(watch: RoutingWatch, layer: int, *experts: int) -> None:
    index = torch.tensor(experts)[:, None]
    watch.note(layer, index, torch.ones(len(experts), 1))


def test_what_follows_is_prefetched() -> None:
    ahead, spare, watch = prefetcher()
    for layer, expert, expected in ((0, 2, 3), (1, 3, 5), (2, 5, 0), (3, 0, 1)):
        note(watch, layer, expert)
        ahead.look_ahead(layer)
        assert spare.loaded[-1] == (layer + 1, expected)
    note(watch, 4, 1)
    ahead.look_ahead(4)
    assert len(spare.loaded) == 4  # There is nothing after the last layer.


def test_what_is_there_is_not_prefetched() -> None:
    ahead, spare, watch = prefetcher([{0, 1, 2, 3}] * LAYERS)
    note(watch, 0, 2)
    ahead.look_ahead(0)
    assert spare.loaded[0] in {(1, 4), (1, 5)}  # 3 would be it, and is resident.
    ahead.look_ahead(0)
    assert set(spare.loaded) == {(1, 4), (1, 5)}
    ahead.look_ahead(0)
    assert len(spare.loaded) == 2


def test_a_copy_longer_than_a_layer_looks_further_ahead() -> None:
    costs = Costs(1e-3, 0, 1, 0, 1.5, 0)
    for depth, expected in ((1, set()), (2, {(2, 5)}), (3, {(2, 5), (3, 0)})):
        ahead, spare, watch = prefetcher(costs=costs, depth=depth)
        note(watch, 0, 2)
        for _ in range(len(expected)):
            ahead.look_ahead(0)
        assert set(spare.loaded) == expected
    ahead, spare, watch = prefetcher(costs=Costs(1e-3, 0, 1, 0, 3.1, 0), depth=3)
    note(watch, 0, 2)
    ahead.look_ahead(0)
    assert spare.loaded == []


def test_nothing_is_prefetched_that_does_not_help() -> None:
    ahead, spare, watch = prefetcher(costs=Costs(2, 0, 1, 0, 1e-3, 0))
    note(watch, 0, 2)
    ahead.look_ahead(0)
    assert spare.loaded == []


def test_one_copy_at_a_time() -> None:
    ahead, spare, watch = prefetcher()
    spare.waiting = 1
    note(watch, 0, 2)
    ahead.look_ahead(0)
    assert spare.loaded == []
    spare.waiting = 0
    ahead.look_ahead(0)
    assert spare.loaded == [(1, 3)]


def test_prompts_are_not_predicted() -> None:
    ahead, spare, watch = prefetcher()
    note(watch, 0, *([2] * (MOST_TOKENS_TO_PREDICT + 1)))
    ahead.look_ahead(0)
    assert spare.loaded == []
    note(watch, 0, *([2] * MOST_TOKENS_TO_PREDICT))
    ahead.look_ahead(0)
    assert spare.loaded == [(1, 3)]


def test_a_token_without_an_expert_predicts_nothing_strange() -> None:
    ahead, spare, watch = prefetcher()
    note(watch, 0, E, 4, E)
    ahead.look_ahead(0)
    assert spare.loaded == [(1, 5)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmuch"), "CUDA out of memory. Tried"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_copy_that_failed_ends_prefetching(error: BaseException, reason: str) -> None:
    ahead, spare, watch = prefetcher()
    assert ahead.stopped == ""
    note(watch, 0, 2)
    ahead.look_ahead(0)
    spare.failures = [error, RuntimeError("another")]
    for _ in range(3):
        ahead.look_ahead(0)
        assert ahead.stopped == reason
    assert len(spare.loaded) == 1


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({}, True),
        ({"prefetch": False}, False),
        ({"resident": 8}, False),  # There is nothing to bring.
        ({"costs": Costs(2.0, 0.0, 1.0, 0.0, 1e-6, 0.0), "placement": "uniform"}, False),
        ({"cold": "cpu", "spare_slots": 1}, True),
        ({"costs": NO_COPIES}, True),  # It may pay, but never arrives.
    ],
)
def test_where_prefetching_pays(options: dict[str, Any], runs: bool) -> None:
    model = shared_model("mixtral")
    with offloader(model, **{"resident": 3} | options) as given:
        assert given._machine is not None
        assert (given._machine.prefetcher is not None) == runs
        assert torch.equal(generated(model), plain_tokens("mixtral"))
        report = given.report()
    used_or_not = report.prefetches_used + report.prefetches_wasted
    if not runs or options.get("costs") is NO_COPIES:
        assert used_or_not == 0
    else:
        assert used_or_not > 0


# --- What is watched ------------------------------------------------------------------------------


def test_layers_follow_each_other() -> None:
    watch, expected = RoutingWatch(RoutingStatistics(4, 6, 2)), RoutingStatistics(4, 6, 2)
    rng = np.random.default_rng(0)
    for tokens in (5, 1, 1, 3):
        before: list[np.ndarray] = []
        for layer in range(4):
            index = np.stack([rng.choice(6, 2, replace=False) for _ in range(tokens)])
            gates = torch.rand(tokens, 2)
            tensor = torch.from_numpy(index.copy())
            watch.note(layer, tensor, gates)
            expected.add(layer, index, gates.numpy(), before[:3])
            before = [index, *before]
            tensor.fill_(5)  # The memory is used again.
            assert [each.tolist() for each in watch.chosen()] == [b.tolist() for b in before[:3]]
    for name in ("counts", "transitions", "gate_mass"):
        assert np.array_equal(getattr(watch.statistics, name), getattr(expected, name))
    assert watch.statistics.tokens == 10


def test_calls_that_do_not_follow_each_other() -> None:
    watch = RoutingWatch(RoutingStatistics(3, 6, 1))
    note(watch, 0, 1, 2)
    note(watch, 2, 3, 4)  # A layer was left out.
    assert watch.statistics.transitions.sum() == 0
    assert len(watch.chosen()) == 1
    note(watch, 0, 1, 2)
    note(watch, 1, 3, 4, 5)  # Other tokens.
    note(watch, 1, 3, 4, 5)  # The same layer again.
    assert watch.statistics.transitions.sum() == 0
    note(watch, 2, 0, 1, 2)
    assert watch.statistics.transitions[0, 1].sum() == 3
    assert watch.statistics.counts.sum(1).tolist() == [4, 6, 5]


def test_nothing_was_chosen_yet() -> None:
    ahead, spare, watch = prefetcher()
    assert list(watch.chosen()) == []
    ahead.look_ahead(0)
    assert spare.loaded == []


# --- What it costs --------------------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured yet, and measuring is short."""
    monkeypatch.setattr(measure_module, "_measured", {})
    monkeypatch.setattr(measure_module, "_SECONDS", 0.01)


class Counted:
    """Weights that count how often they compute."""

    def __init__(self, weights: Any) -> None:
        self._weights, self.calls = weights, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def rows(self, *arguments: Any) -> Tensor:
        self.calls += 1
        rows: Tensor = self._weights.rows(*arguments)
        return rows


def weights_of(name: str, kind: str) -> Counted:
    return Counted(expert_weights(next(iter(experts_modules(shared_model(name, kind)).values()))))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
def test_measured_costs(name: str, kind: str) -> None:
    weights: Any = weights_of(name, kind)
    costs = measure_costs(weights, CPU, torch.float32, 2)
    assert all(math.isfinite(value) and value >= 0 for value in costs.to_dict().values())
    for cost in (costs.gpu_expert, costs.cpu_expert, costs.copy):
        assert 0 < cost < 1
    # An expert computes for microseconds at least; a shared slot is only pointed elsewhere.
    assert costs.cpu_expert + costs.cpu_token > 1e-7
    assert costs.round_trip > 0
    calls = weights.calls
    assert calls > 0
    assert measure_costs(weights, CPU, torch.float32, 2) == costs
    # Both lanes are one processor, so its experts are as slow as all those of a token.
    more = measure_costs(weights, CPU, torch.float32, 5)
    for each, factor in ((costs, 2), (more, 5)):
        assert each.cpu_expert == pytest.approx(factor * each.gpu_expert)
        assert each.cpu_token == pytest.approx(factor * each.gpu_token)
    assert (more.gpu_expert, more.copy) == (costs.gpu_expert, costs.copy)
    assert weights.calls == calls


@pytest.mark.usefixtures("unmeasured")
def test_what_differs_is_measured_anew() -> None:
    one: Any = weights_of("mixtral", "float")
    measure_costs(one, CPU, torch.float32, 2)
    calls = one.calls
    other: Any = weights_of("olmoe", "float")  # Another shape.
    measure_costs(other, CPU, torch.float32, 2)
    assert other.calls > 0
    int8: Any = weights_of("mixtral", "int8")
    measure_costs(int8, CPU, torch.float32, 2)
    before = int8.calls
    measure_costs(int8, CPU, torch.bfloat16, 2)
    assert int8.calls > before > 0
    measure_costs(one, CPU, torch.float32, 2)
    assert one.calls == calls


def test_given_costs_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(offloader_module, "measure_costs", fails)
    assert offloader(shared_model("mixtral"), 3).costs is MIXED


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kind", KINDS)
def test_without_costs_they_are_measured_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = shared_model("mixtral", kind), offloader(shared_model("mixtral")).config
    one = offloader_module.ExpertOffloader(model, device="cpu", config=config)

    def fails(*_: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(measure_module, "_measure", fails)
    two = offloader_module.ExpertOffloader(model, device="cpu", config=config)
    assert one.costs == two.costs
    assert one.config.max_length == LENGTH
    with two:
        assert torch.equal(generated(model), plain_tokens("mixtral", kind))


def test_sums_of_costs_by_hand() -> None:
    costs = Costs(1.0, 0.5, 4.0, 2.0, 9.0, 3.0)
    assert costs.gpu([]) == 0
    assert costs.gpu([2, 4]) == 1 + 1 + 1 + 2
    assert costs.cpu([]) == 0  # Without an expert nothing travels.
    assert costs.cpu([2, 4]) == 3 + 4 + 4 + 4 + 8
    assert costs.layer([2], [1]) == 3 + 4 + 2
    assert costs.layer([100], [1]) == 51

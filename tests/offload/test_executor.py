"""The lanes: at work at the same time, by the clock to the tick; what a failure leaves behind."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from haq import Costs, ExpertOffloader
from haq.offload.executor import Lanes, Machine
from haq.offload.meter import Span
from haq.offload.module import OffloadedExperts
from tests.offload.offloading import (
    COPIES,
    KINDS,
    NO_COPIES,
    UNSEEN,
    assert_close,
    generated,
    logits_of,
    offloader,
    plain_logits,
    plain_tokens,
    shared_model,
)

# How long a lane waits for the other one before the test fails.
SECONDS = 10.0


def machine_of(given: ExpertOffloader) -> Machine:
    assert given._machine is not None
    return given._machine


def lanes_of(given: ExpertOffloader, layer: int) -> Lanes:
    stand = given.model.get_submodule(given.placement.layers[layer])
    assert isinstance(stand, OffloadedExperts)
    return stand._lanes


def on_cpu_lane() -> bool:
    return threading.current_thread().name.startswith("haq-cpu")


def around_rows(given: ExpertOffloader, layer: int, before: Callable[[bool], None]) -> None:
    """Call ``before`` with whether it is the CPU's lane that is about to compute."""
    weights: Any = lanes_of(given, layer).weights
    rows = weights.rows

    def watched(*arguments: Any) -> Any:
        before(on_cpu_lane())
        return rows(*arguments)

    weights.rows = watched


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture
def half(kind: str) -> Iterator[ExpertOffloader]:
    """A Mixtral that is attached; four of the experts are resident, two in each layer."""
    model = shared_model("mixtral", kind)
    with offloader(model, 4, costs=NO_COPIES, placement="uniform") as given:
        yield given


# --- At the same time -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_each_lane_can_wait_for_the_other(half: ExpertOffloader, kind: str, layer: int) -> None:
    # One after the other, whichever came first would wait for ever.
    both = threading.Barrier(2)
    arrived: list[bool] = []

    def meet(on_cpu: bool) -> None:
        arrived.append(on_cpu)
        both.wait(SECONDS)

    around_rows(half, layer, meet)
    assert_close(logits_of(half.model), plain_logits("mixtral", kind), kind)
    assert sorted(arrived) == [False, True]


def test_copies_run_beside_both_lanes(kind: str) -> None:
    model = shared_model("mixtral", kind)
    everybody = threading.Barrier(3)
    with offloader(model, 4, cold="cpu", placement="uniform", prefetch=False) as given:
        spare, weights = machine_of(given).spare, lanes_of(given, 0).weights
        assert spare is not None
        around_rows(given, 0, lambda on_cpu: (everybody.wait(SECONDS), None)[1])
        on_cpu = weights.on_cpu

        def copied(expert: int) -> Any:
            if threading.current_thread().name.startswith("haq-copy"):
                everybody.wait(SECONDS)
            return on_cpu(expert)

        weights.on_cpu = copied  # type: ignore[method-assign]
        cold = next(e for e in range(4) if e not in given.placement.resident[0])
        spare.load_early((0, cold))
        assert_close(logits_of(model), plain_logits("mixtral", kind), kind)
        spare._held[0, cold][1].result(SECONDS)
        assert not everybody.broken
        assert spare.ready((0, cold))


def test_one_lane_alone(kind: str) -> None:
    model = shared_model("mixtral", kind)
    for resident, lane in ((0, "cpu"), (8, "gpu")):
        with offloader(model, resident, costs=NO_COPIES) as given:
            logits_of(model)
            report = given.report()
        assert {span.lane for span in report.spans} == {lane}
        assert [c.round_trips for c in report.counts] == [lane == "cpu"] * 2
        assert report.overlap == 0


def test_only_routing_is_fetched_where_everything_is_resident(kind: str) -> None:
    model = shared_model("mixtral", kind)
    for resident, whole in ((8, True), (7, False)):
        with offloader(model, resident) as given:
            asked: list[bool] = []
            host: Any = machine_of(given).host
            fetch = host.fetch

            def watched(*arguments: Any, routing_only: bool) -> Any:
                asked.append(routing_only)  # noqa: B023
                return fetch(*arguments, routing_only=routing_only)  # noqa: B023

            host.fetch = watched
            logits_of(model)
        assert sorted(asked) == [whole, True]


def test_experts_with_the_most_tokens_are_copied(kind: str) -> None:
    # A token of the CPU costs 2, a copy 3.5. Of 1, 5 and 2 tokens there is time to bring the 5.
    costs = Costs(1e-6, 0.0, 1e-6, 2.0, 3.5, 0.0)
    model = shared_model("mixtral", kind)
    index = torch.tensor([[0, 2]] * 1 + [[0, 1]] * 2 + [[0, 3]] * 5)
    hidden, gates = torch.randn(8, 32), torch.rand(8, 2)
    given = offloader(model, 8, costs=costs, prefetch=False)
    given.placement = replace(given.placement, resident=((0,), (0,)))
    with torch.no_grad(), given:
        name = given.placement.layers[1]
        expected = given._modules[name](hidden, index, gates)
        assert_close(model.get_submodule(name)(hidden, index, gates), expected, kind)
        spare = machine_of(given).spare
        assert spare is not None
        assert [(1, expert) in spare for expert in range(4)] == [False, False, False, True]
        counts = given.report().counts[1]
    assert (counts.hits, counts.copied, counts.misses) == (8, 5, 3)


# --- By the clock ---------------------------------------------------------------------------------


class Clock:
    """Seconds pass when somebody says so, whoever reads it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Throttled:
    """A CPU that starts when it is told to, and whose experts take as long as it is told."""

    def __init__(self) -> None:
        self.started, self.gpu_ended = threading.Event(), threading.Event()
        self.jobs: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001
                future.set_exception(error)

        self.jobs.append(run)
        return future

    def shutdown(self, wait: bool) -> None:
        pass


def timed(
    kind: str,
    clock: Clock,
    pool: Any,
    rows: Callable[[bool], None],
    ended: Callable[[], None] = lambda: None,
) -> ExpertOffloader:
    """One call of the experts of the first layer; ``ended`` is called when the GPU's lane is."""
    model = shared_model("mixtral", kind)
    with offloader(model, 4, costs=NO_COPIES, placement="uniform") as given:
        machine = machine_of(given)
        machine.pool.shutdown()
        machine.pool, machine.meter.clock = pool, clock
        machine.meter.reset()
        around_rows(given, 0, rows)
        mark, marks = machine.meter.mark, []

        def marked() -> Any:
            marks.append(mark())
            if len(marks) == 2:
                ended()
            return marks[-1]

        machine.meter.mark = marked  # type: ignore[method-assign]
        # Two experts of each side.
        index = torch.tensor([[0, 1], [2, 3], [1, 2]])
        stand = model.get_submodule(given.placement.layers[0])
        hidden, gates = torch.randn(3, 32), torch.rand(3, 2)
        with torch.no_grad():
            expected = given._modules[given.placement.layers[0]](hidden, index, gates)
            assert_close(stand(hidden, index, gates), expected, kind)
    return given


def test_lanes_that_overlap_in_part(kind: str) -> None:
    # GPU: ==
    # CPU:  ====
    clock, pool = Clock(), Throttled()

    def rows(on_cpu: bool) -> None:
        if on_cpu:
            pool.started.set()
            assert pool.gpu_ended.wait(SECONDS)
            clock.now += 3
        else:
            clock.now += 1
            (job,) = pool.jobs
            threading.Thread(target=job, name="haq-cpu", daemon=True).start()
            assert pool.started.wait(SECONDS)
            clock.now += 1

    report = timed(kind, clock, pool, rows, pool.gpu_ended.set).report()
    assert report.spans == (Span(0, "gpu", 0.0, 2.0), Span(0, "cpu", 1.0, 5.0))
    (counts, _) = report.counts
    assert (counts.gpu_seconds, counts.cpu_seconds) == (2.0, 4.0)
    assert (counts.overlap_seconds, counts.shorter_seconds) == (1.0, 2.0)
    assert report.overlap == 0.5
    assert "50 % of the shorter one overlapped" in str(report)


def test_a_lane_inside_of_the_other(kind: str) -> None:
    # GPU: ======
    # CPU:  ==
    clock, pool = Clock(), Throttled()

    def rows(on_cpu: bool) -> None:
        if on_cpu:
            clock.now += 2
        else:
            clock.now += 1
            (job,) = pool.jobs
            thread = threading.Thread(target=job, name="haq-cpu", daemon=True)
            thread.start()
            thread.join(SECONDS)
            clock.now += 3

    report = timed(kind, clock, pool, rows).report()
    assert report.spans == (Span(0, "gpu", 0.0, 6.0), Span(0, "cpu", 1.0, 3.0))
    assert report.counts[0].overlap_seconds == report.counts[0].shorter_seconds == 2.0
    assert report.overlap == 1.0


def test_lanes_one_after_the_other(kind: str) -> None:
    # GPU:     =
    # CPU: ===
    clock = Clock()

    class AtOnce(Throttled):
        def submit(self, work: Callable[[], Any]) -> "Future[Any]":
            future = super().submit(work)
            thread = threading.Thread(target=self.jobs[0], name="haq-cpu")
            thread.start()
            thread.join(SECONDS)
            return future

    def rows(on_cpu: bool) -> None:
        clock.now += 3 if on_cpu else 1

    report = timed(kind, clock, AtOnce(), rows).report()
    assert report.spans == (Span(0, "gpu", 3.0, 4.0), Span(0, "cpu", 0.0, 3.0))
    (counts, _) = report.counts
    assert (counts.overlap_seconds, counts.shorter_seconds) == (0.0, 1.0)
    assert report.overlap == 0.0
    assert (counts.hits, counts.misses, counts.copied) == (3, 3, 0)
    assert (counts.calls, counts.tokens, counts.round_trips) == (1, 3, 1)


# --- Failures -------------------------------------------------------------------------------------


class Broken:
    """Fails the first time."""

    def __init__(self, on_cpu: bool, error: BaseException) -> None:
        self.on_cpu, self.error, self.times = on_cpu, error, 0

    def __call__(self, on_cpu: bool) -> None:
        if on_cpu == self.on_cpu:
            self.times += 1
            if self.times == 1:
                raise self.error


def right_again(model: PreTrainedModel, kind: str) -> None:
    assert_close(logits_of(model), plain_logits("mixtral", kind), kind)
    assert torch.equal(generated(model), plain_tokens("mixtral", kind))


@pytest.mark.parametrize("layer", [0, 1])
def test_an_expert_fails_on_the_cpu(half: ExpertOffloader, kind: str, layer: int) -> None:
    name = half.placement.layers[layer]
    at_work = threading.Event()
    broken = Broken(True, ArithmeticError("the CPU is on fire."))

    def rows(on_cpu: bool) -> None:
        if on_cpu:
            assert at_work.wait(SECONDS)  # While the GPU's lane runs.
        else:
            at_work.set()
        broken(on_cpu)

    around_rows(half, layer, rows)
    with pytest.raises(RuntimeError) as caught:
        logits_of(half.model)
    assert f"`{name}`" in str(caught.value)
    assert "the CPU is on fire" in str(caught.value)
    assert caught.value.__cause__ is broken.error
    right_again(half.model, kind)
    assert broken.times > 1


@pytest.mark.parametrize("layer", [0, 1])
def test_an_expert_fails_on_the_gpu(half: ExpertOffloader, kind: str, layer: int) -> None:
    gpu_failed, cpu_done = threading.Event(), threading.Event()
    broken = Broken(False, ArithmeticError("the GPU is on fire."))

    def rows(on_cpu: bool) -> None:
        if on_cpu:
            assert gpu_failed.wait(SECONDS)
            cpu_done.set()
        else:
            gpu_failed.set()
        broken(on_cpu)

    around_rows(half, layer, rows)
    with pytest.raises(ArithmeticError, match="the GPU is on fire") as caught:
        logits_of(half.model)
    # By then the CPU does not read the tokens any more.
    assert cpu_done.is_set()
    assert any(half.placement.layers[layer] in note for note in caught.value.__notes__)
    right_again(half.model, kind)


def test_both_lanes_fail(half: ExpertOffloader, kind: str) -> None:
    failing = [True]

    def rows(on_cpu: bool) -> None:
        if failing[0]:
            raise ArithmeticError("on the CPU" if on_cpu else "on the GPU")

    around_rows(half, 0, rows)
    with pytest.raises(ArithmeticError, match="on the GPU"):
        logits_of(half.model)
    failing[0] = False
    right_again(half.model, kind)


def test_failures_leave_no_slot_in_use(kind: str) -> None:
    model = shared_model("mixtral", kind)
    with offloader(model, 0, cold="gpu", spare_slots=2, prefetch=False) as given:
        spare = machine_of(given).spare
        assert spare is not None
        weights: Any = lanes_of(given, 0).weights
        rows, times = weights.rows, [0]

        def third(*arguments: Any) -> Any:
            times[0] += 1
            if times[0] % 3 == 0:
                raise ArithmeticError("on fire")
            return rows(*arguments)

        weights.rows = third
        for _ in range(5):
            with pytest.raises(ArithmeticError):
                logits_of(model)
            assert spare._busy == set()
        weights.rows = rows
        right_again(model, kind)


def test_a_copy_that_fails(kind: str) -> None:
    model = shared_model("mixtral", kind)
    with offloader(model, 0, cold="gpu", prefetch=False) as given:
        weights = lanes_of(given, 1).weights
        on_cpu, times = weights.on_cpu, [0]

        def second(expert: int) -> Any:
            times[0] += 1
            if times[0] == 2:
                raise torch.OutOfMemoryError("no room")
            return on_cpu(expert)

        weights.on_cpu = second  # type: ignore[method-assign]
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            logits_of(model)
        right_again(model, kind)


@pytest.mark.parametrize("cold", ["auto", "cpu", "gpu"])
def test_out_of_memory_while_prefetching(
    kind: str, cold: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = shared_model("mixtral", kind)
    with offloader(model, 0, costs=COPIES, cold=cold) as given:
        spare = machine_of(given).spare
        assert spare is not None
        load_early, failed = spare.load_early, []

        def out_of_memory(key: tuple[int, int]) -> None:
            failed.append(key)
            slot: Any = spare._free[-1] if spare._free else next(iter(spare._held.values()))[0]
            fill = slot.fill

            def fails(*arguments: Any) -> None:
                slot.fill = fill
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

            slot.fill = fails
            load_early(key)

        spare.load_early = out_of_memory  # type: ignore[method-assign]
        # Every expert of the second layer is asked for, with that one among them.
        assert torch.equal(generated(model), plain_tokens("mixtral", kind))
        assert len(failed) == 1
        right_again(model, kind)
        report = given.report()
    assert len(failed) == 1
    assert report.notes == ("prefetching stopped: CUDA out of memory.",)
    assert "note: prefetching stopped: CUDA out of memory." in str(report)
    assert report.prefetches_used == 0
    assert given.report().notes == report.notes


def test_a_call_that_failed_does_not_count(half: ExpertOffloader, kind: str) -> None:
    around_rows(half, 1, Broken(True, ArithmeticError("on fire")))
    with pytest.raises(RuntimeError):
        logits_of(half.model)
    first, second = half.report().counts
    assert (first.calls, second.calls) == (1, 0)
    logits_of(half.model)
    first, second = half.report().counts
    assert (first.calls, second.calls) == (2, 1)
    assert second.tokens == UNSEEN.numel()

"""Slots: the rules of what stays, goes and waits; and real ones, in the CPU's memory."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haq.nn import Int8Experts, Int8Linear
from haq.offload import slots as slots_module
from haq.offload.collect import experts_modules
from haq.offload.slots import DeviceSlot, SharedSlot, SpareSlots, make_slots
from haq.offload.weights import FloatWeights, Int8Weights, expert_weights, spare_slots
from tests.architectures import MIXTURES
from tests.offload.offloading import (
    COPIES,
    KINDS,
    MIXED,
    assert_close,
    build,
    experts_of,
    generated,
    logits_of,
    offloader,
    plain_logits,
    plain_tokens,
    shared_model,
    total,
)

CPU = torch.device("cpu")


# --- Real slots -----------------------------------------------------------------------------------


@pytest.fixture
def real_slots(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Experts are copied into buffers, as on a GPU; every copy that is made."""
    copies: list[tuple[Any, int]] = []
    fill = DeviceSlot.fill

    def filled(self: DeviceSlot, weights: Any, expert: int, parts: Any) -> None:
        copies.append((weights, expert))
        fill(self, weights, expert, parts)

    monkeypatch.setattr(slots_module, "_shares_memory", lambda device: False)
    monkeypatch.setattr(DeviceSlot, "fill", filled)
    return copies


@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["none", "half", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "nemotron-h"])
def test_answers_from_real_slots(real_slots: list[Any], name: str, kind: str, share: float) -> None:
    model = shared_model(name, kind)
    layers, experts = experts_of(model)
    resident = int(share * layers * experts)
    with offloader(model, resident) as given:
        assert len(real_slots) == resident
        assert_close(logits_of(model), plain_logits(name, kind), kind)
        assert torch.equal(generated(model), plain_tokens(name, kind))
        report = given.report()
    size = given._weights[0].expert_bytes
    # A prefetch that makes room before it began is never filled.
    assert report.copied_bytes >= (len(real_slots) - resident) * size
    assert (total(report, "copied") > 0) == (share < 1)


@pytest.mark.parametrize("spare", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_spare_slots_are_overwritten_again_and_again(
    real_slots: list[Any], kind: str, spare: int
) -> None:
    model = shared_model("mixtral", kind)
    with offloader(model, 0, cold="gpu", spare_slots=spare, prefetch=False) as given:
        assert_close(logits_of(model), plain_logits("mixtral", kind), kind)
        # All four experts of both layers were asked for, each once.
        assert len(real_slots) == len(set(real_slots)) == 8
        assert torch.equal(generated(model), plain_tokens("mixtral", kind))
        report = given.report()
    assert len(real_slots) > 5 * spare
    assert total(report, "misses") == 0
    assert report.copied_bytes == len(real_slots) * given._weights[0].expert_bytes


def test_int8_layers_of_which_some_have_zero_points(real_slots: list[Any]) -> None:
    model = build("hunyuan-moe", "int8")
    first, second = (m for m in model.modules() if isinstance(m, Int8Experts))
    for module, asymmetric in ((first, True), (second, False)):
        module.down = nn.ModuleList(
            Int8Linear(layer.weight, layer.weight_scale, layer.bias, asymmetric=asymmetric)
            for layer in module.down
            if isinstance(layer, Int8Linear)
        )
    logits, tokens = logits_of(model), generated(model)
    for resident, costs in ((0, COPIES), (3, MIXED), (8, MIXED)):
        for prefetch in (True, False):
            options: dict[str, Any] = {"prefetch": prefetch, "spare_slots": 1}
            with offloader(model, resident, costs=costs, cold="gpu", **options):
                assert torch.equal(logits_of(model), logits)
                assert torch.equal(generated(model), tokens)
    # The one slot went from one kind to the other and back, again and again.
    kinds = [weights.on_cpu(0)[1].asymmetric for weights, _ in real_slots]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 10


def test_the_model_does_not_share_memory_with_real_slots(real_slots: list[Any]) -> None:
    model = shared_model("mixtral")
    with offloader(model, 3) as given:
        logits_of(model)
        machine = given._machine
        assert machine is not None
        assert machine.spare is not None
        held = [slot for slot, _ in machine.spare._held.values()]
        stands: list[Any] = [model.get_submodule(name) for name in given.placement.layers]
        held += [slot for stand in stands for slot in stand._lanes.residents.values()]
        assert len(held) == 3 + machine.spare.capacity
        for slot in held:
            for tensor in slot.expert.tensors():
                tensor.fill_(7.0)
    assert_close(logits_of(model), plain_logits("mixtral"), "float")


def test_residents_of_a_layer_are_in_one_buffer(real_slots: list[Any]) -> None:
    for kind in KINDS:
        module = next(iter(experts_modules(shared_model("mixtral", kind)).values()))
        weights = expert_weights(module)
        made = make_slots(weights, 3, CPU, None)
        if isinstance(weights, FloatWeights):
            buffers = [slot.expert.up for slot in made]
        else:
            buffers = [slot.expert[0].weight for slot in made]
        assert len({tensor.untyped_storage().data_ptr() for tensor in buffers}) == 1
        step = buffers[0].nbytes
        starts = [tensor.data_ptr() for tensor in buffers]
        assert starts == [starts[0] + i * step for i in range(3)]


# --- What an expert is ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_of_every_family_in_a_slot(name: str, kind: str) -> None:
    """Where it is written to, rows are those of the model's own module, one expert at a time."""
    module = next(iter(experts_modules(shared_model(name, kind)).values()))
    weights: Any = expert_weights(module)
    known: dict[str, type[Any]] = {"int8": Int8Weights, "float": FloatWeights}
    assert isinstance(weights, known[kind])
    hidden = torch.randn(5, weights.hidden)
    slot = weights.slots(2, CPU)[1]
    for expert in range(weights.num_experts):
        weights.write(slot, weights.parts(expert))
        got = weights.rows([slot], [5], hidden, torch.arange(5))
        assert got.dtype == torch.float32
        expected = module(hidden, torch.full((5, 1), expert), torch.ones(5, 1)).detach()
        assert_close(got, expected, kind)
        assert_close(
            weights.rows([weights.on_cpu(expert)], [5], hidden, torch.arange(5)), expected, kind
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
def test_bytes_of_an_expert(name: str, kind: str) -> None:
    module = next(iter(experts_modules(shared_model(name, kind)).values()))
    weights = expert_weights(module)
    if kind == "float":
        everything = sum(p.nbytes for p in module.parameters())
    else:
        assert isinstance(module, Int8Experts)
        layers = [layer for e in range(module.num_experts) for layer in module.expert(e)]
        everything = 0
        for layer in layers:  # A byte for each weight; scale and sums of rows in float32.
            rows, columns = layer.weight.shape
            everything += rows * columns + 4 * rows * (2 + (layer.bias is not None))
    assert weights.expert_bytes * weights.num_experts == everything


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_experts(kind: str) -> None:
    module = next(iter(experts_modules(shared_model("mixtral", kind)).values()))
    weights, hidden = expert_weights(module), torch.randn(6, 32)
    tokens, counts = torch.tensor([4, 0, 5, 5, 1]), [1, 3, 1]
    experts = [2, 0, 3]
    got = weights.rows([weights.on_cpu(e) for e in experts], counts, hidden, tokens)
    owners = [e for e, count in zip(experts, counts, strict=True) for _ in range(count)]
    for row, token, expert in zip(got, tokens, owners, strict=True):
        alone = module(hidden[None, token], torch.tensor([[expert]]), torch.ones(1, 1)).detach()
        assert_close(row[None], alone, kind)


def test_spare_slots_need_layers_of_one_shape() -> None:
    weights = [
        expert_weights(next(iter(experts_modules(shared_model(name)).values())))
        for name in ("mixtral", "qwen3-moe")
    ]
    assert spare_slots([weights[0], weights[0]], 3) == 3
    assert spare_slots(weights, 3) == 0


def test_int8_experts_with_and_without_zero_points_share_slots() -> None:
    found = experts_modules(shared_model("hunyuan-moe", "int8"))
    weights = [expert_weights(module) for module in found.values()]
    assert spare_slots(weights, 2) == 2


# --- The rules ------------------------------------------------------------------------------------


class Weights:
    """Of a layer, for slots that only remember."""

    expert_bytes = 100

    def __init__(self, layer: int) -> None:
        self.layer = layer


class Room:
    """A slot that remembers, fills when it is let, and fails if it must."""

    def __init__(self, gate: threading.Event, failures: dict[Any, BaseException]) -> None:
        self.expert: Any = None
        self.filled = False
        self.parts: Any = None
        self.waits = self.dones = 0
        self._gate, self._failures = gate, failures

    def fill(self, weights: Any, expert: int, parts: Sequence[Tensor] | None) -> None:
        assert self._gate.wait(10)
        key = weights.layer, expert
        if key in self._failures:
            raise self._failures.pop(key)
        self.expert, self.parts, self.filled = key, parts, True

    def wait(self) -> None:
        self.waits += 1

    def done(self) -> None:
        self.dones += 1


Make = Callable[..., tuple[SpareSlots, list[Room]]]


@pytest.fixture
def gate() -> threading.Event:
    """Closed, nothing arrives."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def make(gate: threading.Event) -> Iterator[Make]:
    made: list[SpareSlots] = []

    def build(
        number: int, failures: dict[Any, BaseException] | None = None, copies: Any = None
    ) -> tuple[SpareSlots, list[Room]]:
        rooms = [Room(gate, {} if failures is None else failures) for _ in range(number)]
        layers: Any = [Weights(layer) for layer in range(3)]
        made.append(SpareSlots(rooms, layers, copies or {}))
        return made[-1], rooms

    yield build
    gate.set()
    for spare in made:
        spare.close()


def arrived(spare: SpareSlots, key: tuple[int, int]) -> None:
    with suppress(BaseException):
        spare._held[key][1].result(10)


def took(spare: SpareSlots, *keys: tuple[int, int]) -> None:
    """Asked for, used and given back."""
    for key in keys:
        spare.ask(key)
        assert spare.use(key) == key
        spare.release(key)


def test_the_least_recently_used_makes_room(make: Make) -> None:
    spare, _ = make(3)
    took(spare, (0, 0), (0, 1), (0, 2))
    took(spare, (0, 0))  # There already: 1 is the one that was used least recently now.
    assert spare.copied_bytes == 300
    took(spare, (1, 5))
    assert [key in spare for key in ((0, 0), (0, 1), (0, 2), (1, 5))] == [True, False, True, True]
    took(spare, (1, 6))
    assert [key in spare for key in ((0, 0), (0, 2), (1, 5), (1, 6))] == [True, False, True, True]
    assert spare.copied_bytes == 500


def test_what_is_asked_for_stays_until_it_was_used(make: Make) -> None:
    spare, _ = make(2)
    spare.ask((0, 0))
    spare.ask((0, 1))
    with pytest.raises(RuntimeError, match="All 2 spare slots are in use"):
        spare.ask((0, 2))
    assert spare.use((0, 0)) == (0, 0)
    spare.release((0, 0))
    spare.ask((0, 2))
    assert (0, 1) in spare
    assert (0, 2) in spare
    assert (0, 0) not in spare
    with pytest.raises(RuntimeError, match="in use"):
        spare.load_early((1, 0))
    assert (0, 1) in spare
    assert (0, 2) in spare


def test_what_is_in_use_stays(make: Make) -> None:
    # Nobody asked for it, for it was there.
    spare, _ = make(2)
    spare.load_early((0, 0))
    assert spare.use((0, 0)) == (0, 0)
    took(spare, (0, 1), (0, 2), (0, 3))
    assert (0, 0) in spare
    spare.release((0, 0))
    took(spare, (0, 4))
    assert (0, 0) not in spare


def test_ready_means_that_nobody_waits(make: Make, gate: threading.Event) -> None:
    spare, _ = make(1)
    gate.clear()
    assert not spare.ready((0, 0))
    spare.load_early((0, 0))
    assert (0, 0) in spare
    assert not spare.ready((0, 0))
    assert spare.on_their_way() == 1
    gate.set()
    arrived(spare, (0, 0))
    assert spare.ready((0, 0))
    assert spare.on_their_way() == 0


def test_the_products_wait_for_the_slot_and_the_slot_for_the_products(make: Make) -> None:
    spare, (room,) = make(1)
    spare.ask((0, 3))
    spare.use((0, 3))
    assert (room.waits, room.dones) == (1, 0)
    spare.release((0, 3))
    spare.release((0, 3))
    assert (room.waits, room.dones) == (1, 1)


def test_prefetches_used_and_wasted(make: Make) -> None:
    spare, _ = make(2)
    spare.load_early((1, 0))
    spare.load_early((1, 1))
    arrived(spare, (1, 0))
    arrived(spare, (1, 1))
    assert spare.use((1, 0)) == (1, 0)
    assert spare.use((1, 0)) == (1, 0)  # A second use is no second prefetch.
    spare.release((1, 0))
    assert (spare.early_used, spare.early_wasted) == (1, 0)
    took(spare, (2, 0))  # In the place of (1, 1), for which nobody has asked.
    assert (spare.early_used, spare.early_wasted) == (1, 1)
    took(spare, (2, 1))  # In the place of (1, 0), which was asked for.
    assert (spare.early_used, spare.early_wasted) == (1, 1)
    assert spare.copied_bytes == 400
    spare.forget_counts()
    assert (spare.early_used, spare.early_wasted, spare.copied_bytes) == (0, 0, 0)


def test_what_is_on_its_way_can_make_room(make: Make, gate: threading.Event) -> None:
    spare, (room,) = make(1)
    gate.clear()
    for key in ((0, 0), (0, 1), (0, 2)):
        spare.load_early(key)
    spare.ask((1, 1))
    gate.set()
    assert spare.use((1, 1)) == (1, 1) == room.expert
    assert spare.early_wasted == 3


def test_copies_in_pinned_memory_are_what_is_copied(make: Make) -> None:
    copy = (torch.ones(2),)
    spare, rooms = make(2, copies={(1, 3): copy})
    took(spare, (1, 3), (0, 3))
    parts = {room.expert: room.parts for room in rooms}
    assert parts[1, 3] is copy
    assert parts[0, 3] is None


def test_a_copy_that_fails_is_raised_once_and_its_slot_is_free(make: Make) -> None:
    spare, _ = make(1, {(0, 0): MemoryError("no room")})
    spare.ask((0, 0))
    with pytest.raises(MemoryError, match="no room"):
        spare.use((0, 0))
    assert (0, 0) not in spare
    took(spare, (0, 0))
    assert spare.forget_failures() == []


def test_prefetches_that_failed_are_forgotten(make: Make) -> None:
    error = MemoryError("no room")
    spare, _ = make(2, {(1, 0): error})
    spare.load_early((1, 0))
    spare.load_early((1, 1))
    arrived(spare, (1, 0))
    arrived(spare, (1, 1))
    assert not spare.ready((1, 0))
    assert spare.forget_failures() == [error]
    assert spare.forget_failures() == []
    assert (1, 0) not in spare
    assert spare.ready((1, 1))
    assert spare.early_wasted == 1
    took(spare, (0, 0))
    assert (1, 1) in spare  # The slot of the failure was free.


def test_a_slot_that_held_another_expert_is_not_ready_after_a_failure(make: Make) -> None:
    spare, (room,) = make(1, {(1, 0): MemoryError("no room")})
    took(spare, (0, 0))
    spare.load_early((1, 0))
    arrived(spare, (1, 0))
    assert room.filled
    assert room.expert == (0, 0)
    assert not spare.ready((1, 0))


def test_a_prefetch_that_failed_is_tried_again_for_who_asks(make: Make) -> None:
    error = MemoryError("no room")
    spare, _ = make(1, {(1, 0): error})
    spare.load_early((1, 0))
    took(spare, (1, 0))
    assert (spare.early_used, spare.early_wasted) == (0, 1)
    assert spare.copied_bytes == 200
    assert spare.forget_failures() == [error]  # Prefetching hears of it all the same.
    assert spare.forget_failures() == []


def test_closing_waits(make: Make, gate: threading.Event) -> None:
    spare, (room,) = make(1)
    gate.clear()
    spare.load_early((0, 1))
    threading.Timer(0.05, gate.set).start()
    spare.close()
    assert room.expert == (0, 1)


def test_a_slot_that_shares_the_memory_copies_nothing() -> None:
    weights = expert_weights(next(iter(experts_modules(shared_model("mixtral")).values())))
    (slot,) = make_slots(weights, 1, CPU, None)
    assert isinstance(slot, SharedSlot)
    assert not slot.filled
    slot.fill(weights, 2, None)
    assert slot.filled
    module = next(iter(experts_modules(shared_model("mixtral")).values()))
    own = module.get_parameter("gate_up_proj")[2]
    assert slot.expert.up.data_ptr() == own.data_ptr()
    assert make_slots(weights, 0, CPU, None) == []


def test_a_device_slot_is_filled_from_the_copy_if_there_is_one() -> None:
    weights = expert_weights(next(iter(experts_modules(shared_model("mixtral")).values())))
    slot = DeviceSlot(weights.slots(1, CPU)[0], None)
    assert not slot.filled
    other = tuple(torch.full_like(part, 3.0) for part in weights.parts(1))
    slot.fill(weights, 1, other)
    assert slot.filled
    assert all(bool((tensor == 3).all()) for tensor in slot.expert.tensors())
    slot.fill(weights, 1, None)
    for tensor, part in zip(slot.expert.tensors(), weights.parts(1), strict=True):
        assert torch.equal(tensor, part)

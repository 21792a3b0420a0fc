"""The lanes of a GPU by grouped products, under Triton's interpreter.

Run by `tests/int8/test_kernels.py`. Slots are buffers as on a GPU, multiplied by the kernels; the
model itself, and with it what the CPU's lane computes, stays as on a CPU. All bits are those of the
model that was never offloaded.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from haq.int8 import matmul
from haq.nn import Int8Experts, Int8Linear, grouped
from haq.offload import slots as slots_module
from haq.offload import weights as weights_module
from haq.offload.collect import experts_modules
from haq.offload.weights import Int8Slot, Int8Weights
from tests.interpreter import Launches, triton_on_cpu
from tests.nn.test_experts import HIDDEN, INNER, int8_layers, silu_gate
from tests.offload.offloading import (
    COPIES,
    NO_COPIES,
    experts_of,
    generated,
    logits_of,
    offloader,
    plain_logits,
    plain_tokens,
    shared_model,
    total,
)


@pytest.fixture(autouse=True)
def _slots_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slots are packed for the kernels; all else for the CPU, as it is before a model moves."""
    monkeypatch.setattr(slots_module, "_shares_memory", lambda device: False)
    monkeypatch.setattr(weights_module, "_PLAIN", "triton")
    with triton_on_cpu(monkeypatch), matmul.use_backend("reference"):
        yield


# --- A whole model --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["none", "half", "all"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_answers(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model(name, "int8")
    layers, experts = experts_of(model)
    expected = plain_logits(name, "int8"), plain_tokens(name, "int8")
    launches = Launches(monkeypatch)
    with offloader(model, int(share * layers * experts)) as given:
        # Zero points: torch may add what they stand for without rounding in between.
        torch.testing.assert_close(logits_of(model), expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(generated(model), expected[1])
        report = given.report()
    assert (total(report, "copied") > 0) == (share < 1)
    assert launches.counts()["grouped"] > 0


def test_residents_of_a_layer_are_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("mixtral", "int8")
    plain_logits("mixtral", "int8")
    with offloader(model, 8, costs=NO_COPIES):
        launches = Launches(monkeypatch)
        logits_of(model)
    # For each of two layers: tokens, both products, what is between them.
    assert launches.names == ["quantize", "grouped", "quantize", "grouped"] * 2


def test_guests_are_two_products_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("mixtral", "int8")
    layer = next(iter(experts_modules(model).values()))
    assert isinstance(layer, Int8Experts)
    options: dict[str, Any] = {"cold": "gpu", "spare_slots": 2, "prefetch": False}
    index = torch.tensor([[0, 1], [2, 3], [1, 3]])
    hidden, gates = torch.randn(3, 32), torch.rand(3, 2)
    with torch.no_grad():
        expected = layer(hidden, index, gates)
        with offloader(model, 4, costs=COPIES, placement="uniform", **options) as given:
            stand = model.get_submodule(given.placement.layers[0])
            first = stand(hidden, index, gates)
            launches = Launches(monkeypatch)
            again = stand(hidden, index, gates)  # Now those of the spare slots are there, too.
            counts = given.report().counts[0]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, first)
    assert (counts.hits, counts.copied) == (9, 3)
    assert launches.counts() == {"quantize": 2, "grouped": 4}


# --- Rows of slots --------------------------------------------------------------------------------


def layer(asymmetric: bool = False) -> Int8Experts:
    down = [
        Int8Linear(each.weight, each.weight_scale, each.bias, asymmetric=asymmetric)
        for each in int8_layers(HIDDEN, INNER)
    ]
    return Int8Experts(int8_layers(2 * INNER, HIDDEN), down, silu_gate)


def filled(weights: Int8Weights, *sizes: int) -> list[Int8Slot]:
    """A slot for each expert, in stacks of so many."""
    made = [slot for size in sizes for slot in weights.slots(size, torch.device("cpu"))]
    for expert, slot in enumerate(made):
        weights.write(slot, weights.parts(expert))
    return made


def rows_of(module: Int8Experts, counts: Sequence[int], hidden: Tensor, tokens: Tensor) -> Tensor:
    """Expert by expert, by its two layers."""
    results = []
    for expert, x in enumerate(hidden[tokens].split(list(counts))):
        first, second = module.expert(expert)
        results.append(second(silu_gate(first(x))))
    return torch.cat(results)


COUNTS = {
    "one each": (1, 1, 1, 1, 1),
    "some": (3, 1, 20, 2, 5),
    "one has most": (1, 2, 90, 1, 1),
}


@pytest.mark.parametrize("most", [1024, 16, 7, 1])
@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_of_slots(
    counts: tuple[int, ...], sizes: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_MOST_ROWS", most)
    module = layer()
    weights = Int8Weights(module)
    hidden, tokens = torch.randn(9, HIDDEN), torch.randint(9, (sum(counts),))
    expected = rows_of(module, counts, hidden, tokens)
    launches = Launches(monkeypatch)
    rows = weights.rows(filled(weights, *sizes), counts, hidden, tokens)
    assert torch.equal(rows, expected)
    if most == 1024:
        assert launches.counts() == {"quantize": 2, "grouped": 2 * len(sizes)}
    middles = [launch[2][0] for launch in launches.seen if launch[0] == "_grouped_kernel"]
    assert max(middles) <= most


def test_slots_take_experts_with_and_without_zero_points() -> None:
    """One after the other, in the same stacks."""
    counts, hidden, tokens = (2, 1, 3, 1, 1), torch.randn(4, HIDDEN), torch.arange(8) % 4
    kinds = [layer(True), layer(False), layer(True)]
    slots = filled(Int8Weights(kinds[0]), 5)
    for module in kinds:
        weights = Int8Weights(module)
        for expert, slot in enumerate(slots):
            weights.write(slot, weights.parts(expert))
        expected = rows_of(module, counts, hidden, tokens)
        result = weights.rows(slots, counts, hidden, tokens)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_hidden_states_in_16_bits() -> None:
    module = layer()
    weights = Int8Weights(module)
    counts, tokens = (2, 1, 3, 1, 1), torch.arange(8) % 4
    hidden = torch.randn(4, HIDDEN).half()
    expected = rows_of(module, counts, hidden.float(), tokens)
    assert torch.equal(weights.rows(filled(weights, 5), counts, hidden, tokens), expected)


def test_some_of_the_slots_in_another_order() -> None:
    module = layer()
    weights = Int8Weights(module)
    slots = filled(weights, 3, 2)
    hidden, tokens = torch.randn(4, HIDDEN), torch.tensor([3, 0, 1, 1])
    rows = weights.rows([slots[4], slots[1]], [3, 1], hidden, tokens)
    for expert, part in ((4, slice(0, 3)), (1, slice(3, 4))):
        first, second = module.expert(expert)
        assert torch.equal(rows[part], second(silu_gate(first(hidden[tokens[part]]))))


def test_a_slot_is_a_part_of_one_memory_and_its_layers() -> None:
    weights = Int8Weights(layer(True))
    slots = filled(weights, 3)
    up, down = slots[1]
    for i, stack in enumerate(slots[1].stacks):
        each = slots[1][i]
        assert each.backend == "triton"
        pairs = (
            (each.weight, stack.weight[1]),
            (each.weight_scale, stack.scale[1]),
            (each.bias, None if stack.bias is None else stack.bias[1]),
            (each._row_sums, None if stack.row_sums is None else stack.row_sums[1]),
        )
        for own, part in pairs:
            assert own is not None
            assert part is not None
            assert own.data_ptr() == part.data_ptr()
            assert torch.equal(own, part)
    assert (up, down) == tuple(slots[1])


def test_without_the_kernels_slots_are_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights_module, "_PLAIN", "int_mm")
    module = layer()
    weights = Int8Weights(module)
    counts, hidden, tokens = (2, 1, 3, 1, 1), torch.randn(4, HIDDEN), torch.arange(8) % 4
    launches = Launches(monkeypatch)
    rows = weights.rows(filled(weights, 5), counts, hidden, tokens)
    assert launches.names == []
    assert torch.equal(rows, rows_of(copy.deepcopy(module), counts, hidden, tokens))

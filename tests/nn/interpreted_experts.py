"""The experts of a layer by the kernels for groups, under Triton's interpreter.

Run by `tests/int8/test_kernels.py`. What they are compared with are the same experts with plain
products, one after the other, whose bits are those of every CPU backend.
"""

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haq.int8 import matmul
from haq.nn import Int8Experts, Int8Linear, experts, grouped
from tests.interpreter import Launches, nothing_waits, triton_on_cpu
from tests.model.test_experts import EXPERTS, FAMILIES, routed
from tests.nn.test_experts import (
    HIDDEN,
    INNER,
    SLOTS,
    TOKENS,
    Given,
    int8_layers,
    quantized,
    silu_gate,
)

# What stands in places without expert is whatever the memory held, and is rounded with the rest.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_on_cpu(monkeypatch):
        yield


def plain(module: Int8Experts) -> Int8Experts:
    """The same experts with products of plain torch."""
    with matmul.use_backend("reference"):
        return copy.deepcopy(module)


def build(**options: Any) -> Int8Experts:
    down = [
        Int8Linear(layer.weight, layer.weight_scale, layer.bias, **options)
        for layer in int8_layers(HIDDEN, INNER)
    ]
    return Int8Experts(int8_layers(2 * INNER, HIDDEN), down, silu_gate)


@pytest.fixture
def given() -> Given:
    """Hidden states, the experts of every token (none in some slots), and their weights."""
    index = torch.rand(TOKENS, EXPERTS + 1).argsort(-1)[:, :SLOTS]
    assert 0 < (index == EXPERTS).sum() < TOKENS
    return torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, SLOTS)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_the_plain_products_in_every_family(family: str) -> None:
    given = routed(quantized(family)[1], tokens=13)
    hidden, index, gates = given[0].float(), given[1], given[2].float()
    module = quantized(family)[0]
    # Elements at the end of a tensor may get another last bit of gpt-oss's interleaved sigmoid.
    tolerance = 2.0**-20 if family == "gpt-oss" else 0
    expected = plain(module)(hidden, index, gates)
    torch.testing.assert_close(
        module(hidden, index, gates), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_with_slots_without_expert(
    given: Given, dtype: torch.dtype, gate_dtype: torch.dtype
) -> None:
    hidden, index, gates = given[0].to(dtype), given[1], given[2].to(gate_dtype)
    gates[index == EXPERTS] = torch.nan  # Whatever stands there.
    module = build()
    result = module(hidden, index, gates)
    assert result.dtype == dtype
    assert_same_bits(result, plain(module)(hidden, index, gates))


def test_zero_points(given: Given) -> None:
    """torch may add what they stand for without rounding in between, the kernels do not."""
    module = build(asymmetric=True)
    expected = plain(module)(*given)
    torch.testing.assert_close(module(*given), expected, rtol=1e-6, atol=1e-6)
    symmetric = Int8Experts([*module.up], int8_layers(HIDDEN, INNER), silu_gate)
    assert not torch.allclose(symmetric(*given), expected, rtol=1e-2)


@pytest.mark.parametrize("value", [-1, EXPERTS, EXPERTS + 1, 10**9, -(10**9)], ids=str)
def test_an_index_without_expert_is_none_and_not_looked_for(given: Given, value: int) -> None:
    hidden, index, gates = given
    module = build()
    index[4, 1] = EXPERTS
    expected = plain(module)(hidden, index, gates)
    index[4, 1] = value
    assert_same_bits(module(hidden, index, gates), expected)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(given: Given, tokens: int) -> None:
    module = build()
    result = module(*(part[:tokens] for part in given))
    assert result.shape == (tokens, HIDDEN)
    assert_same_bits(result, plain(module)(*given)[:tokens])


def test_no_slot_has_an_expert(given: Given) -> None:
    hidden, index, gates = given
    result = build()(hidden, torch.full_like(index, EXPERTS), gates)
    assert_same_bits(result, torch.zeros(TOKENS, HIDDEN))


def test_arguments_need_not_be_contiguous_and_are_not_written_to(given: Given) -> None:
    module = build()
    expected = module(*given)
    strided = [part.t().contiguous().t() for part in given]
    before = [part.clone() for part in strided]
    assert_same_bits(module(*strided), expected)
    torch.testing.assert_close(strided, before, rtol=0, atol=0)


@pytest.mark.parametrize("most", [1, 4, TOKENS - 1, TOKENS])
def test_a_long_prompt_goes_in_pieces(
    given: Given, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    module = build()
    expected = module(*given)
    bytes_per_token = 4 * 2 * INNER * SLOTS
    monkeypatch.setattr(grouped, "_MIDDLE_BYTES", most * bytes_per_token + 5)
    launches = Launches(monkeypatch)
    assert_same_bits(module(*given), expected)
    assert launches.counts()["grouped"] == 2 * math.ceil(TOKENS / most)
    assert launches.counts()["sort"] == math.ceil(TOKENS / most)
    middles = [launch[2] for launch in launches.seen if launch[0] == "_grouped_kernel"][::2]
    assert max(rows for rows, _ in middles) == min(most, TOKENS) * SLOTS


# --- Launches -------------------------------------------------------------------------------------


def test_two_products_in_all_and_nothing_waits(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(asymmetric=True)
    module(*given)
    with nothing_waits(monkeypatch) as launches:
        module(*given)
    assert launches.names == ["quantize", "sort", "grouped", "quantize", "grouped", "add_experts"]


def test_tokens_are_shared_with_layers_that_read_the_same_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, linear = build(), Int8Linear.from_float(torch.randn(7, HIDDEN))
    x, index = torch.randn(2, 3, HIDDEN), torch.zeros(6, 1, dtype=torch.int64)
    expected = module(x.clone().view(6, HIDDEN), index, torch.ones(6, 1))
    launches = Launches(monkeypatch)
    linear(x)
    assert_same_bits(module(x.view(6, HIDDEN), index, torch.ones(6, 1)), expected)
    assert launches.counts()["quantize"] == 2  # Of `x`, and between the products.
    x[1] += 1
    linear(x)
    module(x[:1].view(3, HIDDEN), index[:3], torch.ones(3, 1))  # Not all of it.
    assert launches.counts()["quantize"] == 5


# --- One memory -----------------------------------------------------------------------------------


def storages(module: Int8Experts, part: str) -> set[int]:
    layers = getattr(module, part)
    return {layer.weight.untyped_storage().data_ptr() for layer in layers}


def test_all_experts_are_in_one_memory_and_what_they_had_is_free(given: Given) -> None:
    layers = int8_layers(2 * INNER, HIDDEN)
    module = Int8Experts(layers, int8_layers(HIDDEN, INNER), silu_gate)
    state = copy.deepcopy(module.state_dict())
    old = [weakref.ref(layer._packed) for layer in layers]
    assert len(storages(module, "up")) == EXPERTS
    module(*given)
    assert len(storages(module, "up")) == len(storages(module, "down")) == 1
    assert [ref() for ref in old] == [None] * EXPERTS
    assert module.up[0].weight.untyped_storage().nbytes() == EXPERTS * 2 * INNER * HIDDEN
    torch.testing.assert_close(dict(module.state_dict()), dict(state), rtol=0, atol=0)
    first, second = module.expert(2)
    assert first is layers[2]
    x = torch.randn(3, HIDDEN)
    index, gates = torch.full((3, 1), 2), torch.ones(3, 1)
    assert_same_bits(second(silu_gate(first(x))), module(x, index, gates))


def test_it_is_done_once(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    module(*given)
    monkeypatch.setattr(experts.Stack, "of", lambda layers: pytest.fail("again"))
    module(*given)


def test_moving_does_it_at_once() -> None:
    module = build()
    nn.Sequential(module).to("cpu")
    assert len(storages(module, "up")) == 1


def through_torch_save(module: Int8Experts) -> Int8Experts:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: Int8Experts = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_are_their_own(
    given: Given, duplicate: Callable[[Int8Experts], Int8Experts], called: bool
) -> None:
    module = build()
    if called:
        module(*given)
    twin = duplicate(module)
    expected = module(*given)
    assert_same_bits(twin(*given), expected)
    other = build()
    twin.load_state_dict(other.state_dict())
    assert_same_bits(twin(*given), other(*given))
    assert_same_bits(module(*given), expected)


def test_what_one_layer_loads_is_computed_with(given: Given) -> None:
    module, other = build(asymmetric=True), build(asymmetric=True)
    before = module(*given)
    for assign in (False, True):
        module.down[3].load_state_dict(other.down[3].state_dict(), assign=assign)
        module.up[1].load_state_dict(other.up[1].state_dict(), assign=assign)
    after = module(*given)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, plain(module)(*given), rtol=1e-6, atol=1e-6)
    assert len(storages(module, "down")) == 1


def test_what_is_written_to_a_layer_is_computed_with(given: Given) -> None:
    module, other = build(asymmetric=True), build(asymmetric=True)
    module(*given)
    for part in ("up", "down"):
        for layer, source in zip(getattr(module, part), getattr(other, part), strict=True):
            layer.write(source.parts())
    assert_same_bits(module(*given), other(*given))


def test_it_goes_away_and_comes_back(given: Given) -> None:
    module = build()
    expected = module(*given)
    state = copy.deepcopy(module.state_dict())
    module.to("meta")
    assert module._held is None
    module.to_empty(device="cpu").load_state_dict(state)
    assert_same_bits(module(*given), expected)


def test_a_first_call_in_inference_mode(given: Given) -> None:
    module = build()
    with torch.inference_mode():
        expected = module(*given).clone()
    assert not module.up[0].weight.is_inference()
    assert_same_bits(module(*given), expected)
    module.up[0].write(module.up[1].parts())  # Refused for a tensor of inference mode.


def test_a_first_call_must_not_be_captured(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    with monkeypatch.context() as patch:
        patch.setattr(experts, "is_captured", lambda x: True)
        with pytest.raises(RuntimeError, match="must be called once before a CUDA graph"):
            module(*given)
    expected = module(*given)
    monkeypatch.setattr(experts, "is_captured", lambda x: True)
    assert_same_bits(module(*given), expected)


def test_the_compiler_changes_no_bit(given: Given) -> None:
    module = build()
    torch._dynamo.reset()
    function = torch.compile(module, backend="eager", fullgraph=True)
    assert_same_bits(function(*given), module(*given))

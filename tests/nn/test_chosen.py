"""The experts of one token in one call, beside the kernels that are called one by one."""

import contextlib
import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from haq.int8 import matmul
from haq.nn import Int8Experts, Int8Linear
from haq.nn.chosen import ChosenExperts, is_gate
from haq.nn.rows import one_token

HIDDEN, INNER, EXPERTS = 33, 21, 5

pytestmark = pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")


@pytest.fixture(autouse=True)
def llvm() -> Iterator[None]:
    """Whatever was measured to be the fastest one."""
    with matmul.use_backend("llvm") if matmul.compiles() else contextlib.nullcontext():
        yield


def silu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


def neighbours(x: Tensor) -> Tensor:
    return F.silu(x[..., ::2]) * x[..., 1::2]


def build(activation: Any = silu_gate, bias: bool = True, asymmetric: bool = False) -> Int8Experts:
    torch.manual_seed(0)

    def layers(rows: int, columns: int, zero_points: bool) -> list[Int8Linear]:
        return [
            Int8Linear.from_float(
                torch.randn(rows, columns),
                torch.randn(rows) if bias else None,
                asymmetric=zero_points,
            )
            for _ in range(EXPERTS)
        ]

    up, down = layers(2 * INNER, HIDDEN, False), layers(HIDDEN, INNER, asymmetric)
    return Int8Experts(up, down, activation)


def token(slots: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, HIDDEN, generator=generator).to(dtype)
    index = torch.randperm(EXPERTS, generator=generator)[:slots][None]
    return x, index, torch.rand(1, slots, generator=generator)


def one_by_one(experts: Int8Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    pairs = [experts.expert(expert) for expert in index[0].tolist()]
    return one_token(pairs, experts.activation, x, weights).to(x.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the chain gave."""
    results: list[Any] = []
    run = ChosenExperts.run

    def note(self: ChosenExperts, *args: Any) -> Any:
        results.append(run(self, *args))
        return results[-1]

    monkeypatch.setattr(ChosenExperts, "run", note)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_the_sum_is_that_of_single_calls(
    asymmetric: bool, bias: bool, dtype: torch.dtype, calls: list[Any]
) -> None:
    experts = build(bias=bias, asymmetric=asymmetric)
    for number, slots in enumerate([2, 3, 1, 2, 2]):  # Not as many in each call.
        given = token(slots, dtype, seed=number)
        found, expected = experts(*given), one_by_one(experts, *given)
        assert found.dtype == dtype
        # A sigmoid's last bit may move an integer.
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        assert (found != expected).float().mean() < 0.2
    assert len(calls) == 5


def test_weights_may_be_of_another_dtype_and_tokens_lie_apart(calls: list[Any]) -> None:
    experts = build()
    x, index, weights = token(2, torch.bfloat16)
    apart = torch.zeros(1, 2 * HIDDEN, dtype=torch.bfloat16)[:, ::2].copy_(x)
    narrow = weights.bfloat16()
    expected = experts(x, index, narrow.float())
    assert torch.equal(experts(apart, index, narrow), expected)
    torch.testing.assert_close(
        expected, one_by_one(experts, x, index, narrow), rtol=2e-2, atol=2e-2
    )
    assert len(calls) == 2


@pytest.mark.parametrize("activation", [gelu_gate, neighbours])
def test_other_activations_are_called(activation: Any, calls: list[Any]) -> None:
    experts = build(activation)
    given = token(2)
    assert torch.equal(experts(*given), one_by_one(experts, *given))
    assert not calls
    assert not is_gate(activation, INNER)


def test_an_activation_that_is_replaced_is_called(calls: list[Any]) -> None:
    experts = build()
    given = token(2)
    experts(*given)
    experts.activation = gelu_gate
    assert torch.equal(experts(*given), one_by_one(experts, *given))
    assert len(calls) == 1


def test_experts_without_a_gate(calls: list[Any]) -> None:
    torch.manual_seed(0)
    up = [Int8Linear.from_float(torch.randn(INNER, HIDDEN)) for _ in range(EXPERTS)]
    down = [Int8Linear.from_float(torch.randn(HIDDEN, INNER)) for _ in range(EXPERTS)]
    experts = Int8Experts(up, down, torch.relu)
    given = token(2)
    assert torch.equal(experts(*given), one_by_one(experts, *given))
    assert not calls


def test_a_weight_that_lies_otherwise_is_read_one_by_one(calls: list[Any]) -> None:
    experts = build()
    given = token(2)
    expected = experts(*given)
    for layer in experts.up:
        packed: Any = layer._packed
        packed.weight = packed.weight.t().contiguous().t()
    torch.testing.assert_close(experts(*given), expected, rtol=2e-2, atol=2e-2)
    assert [result is None for result in calls] == [False, True]


def test_sees_weights_that_were_loaded(calls: list[Any]) -> None:
    experts = build()
    given = token(2)
    before = experts(*given)
    other = build()
    with torch.no_grad():
        for layer in [*other.up, *other.down]:
            layer.load_state_dict(layer.state_dict() | {"weight": layer.weight.flip(1)})
    experts.load_state_dict(other.state_dict())
    assert torch.equal(experts(*given), other(*given))
    assert not torch.equal(experts(*given), before)
    assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own_chain(copied: Any) -> None:
    experts = build()
    given = token(2)
    expected = experts(*given)
    twin = copied(experts)
    with torch.no_grad():
        for layer in experts.down:
            layer.weight_scale.mul_(2)
    assert torch.equal(twin(*given), expected)
    assert not torch.equal(experts(*given), expected)
    assert twin._chosen is not experts._chosen


def test_several_threads_at_once() -> None:
    experts = build()
    tokens = [token(2, seed=seed) for seed in range(4)]
    expected = [one_by_one(experts, *each) for each in tokens]
    results: list[bool] = []

    def work(number: int) -> None:
        for _ in range(50):
            found = experts(*tokens[number])
            results.append(torch.allclose(found, expected[number], rtol=2e-2, atol=2e-2))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [True] * 200


def test_a_slot_without_expert_goes_the_usual_way(calls: list[Any]) -> None:
    experts = build()
    x, index, weights = token(2)
    nobody = torch.tensor([[int(index[0, 0]), EXPERTS]])
    found = experts(x, nobody, weights)
    assert not calls
    expected = one_by_one(experts, x, index[:, :1], weights[:, :1])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)

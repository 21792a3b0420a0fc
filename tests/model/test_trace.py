"""Who read which tensor in a block's forward pass, and what watchers of its inputs are given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from haq.model.experts import unfuse
from haq.model.trace import (
    input_of,
    input_rows,
    is_norm,
    is_reader,
    observe_calls,
    observe_inputs,
    readers_of_one_tensor,
    trace_block,
)
from tests.model.toys import EXPERTS, HIDDEN, Mixture, Residual, batch_of, fused_experts


class Readers(nn.Module):
    """Three linears on one tensor, one of them called twice; two on equal copies; one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.second = Conv1D(nf=HIDDEN, nx=HIDDEN)
        self.flat = nn.Linear(HIDDEN, HIDDEN)
        self.copy = nn.Linear(HIDDEN, HIDDEN)
        self.other_copy = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        output = self.first(normed) + self.second(normed) + self.first(normed)
        output = output + self.flat(normed.view(-1, HIDDEN)).view_as(output)
        return output + self.copy(normed.clone()) + self.other_copy(normed.clone())


def test_events_come_in_the_order_of_the_calls() -> None:
    trace = trace_block(Readers(), batch_of(torch.randn(2, 3, HIDDEN)))
    assert [event.name for event in trace] == [
        "norm",
        "first",
        "second",
        "first",
        "flat",
        "copy",
        "other_copy",
    ]


def test_an_event_holds_what_the_module_read_and_returned() -> None:
    block = Residual()
    hidden = torch.randn(2, 3, HIDDEN)
    trace = trace_block(block, batch_of(hidden))
    assert torch.equal(trace.output, block(hidden))
    norm, fc1, fc2 = trace
    assert norm.module is block.norm
    assert torch.equal(norm.input, hidden)
    assert torch.equal(norm.output, block.norm(hidden))
    assert torch.equal(fc1.input, norm.output)
    assert torch.equal(fc2.input, torch.relu(fc1.output))
    assert not any(module._forward_hooks for module in block.modules())


def test_linears_that_read_one_tensor_are_together_whatever_its_shape() -> None:
    trace = trace_block(Readers(), batch_of(torch.randn(2, 3, HIDDEN)))
    # Copies hold the same numbers and are other tensors.
    assert readers_of_one_tensor(trace) == [("first", "second", "flat"), ("copy",), ("other_copy",)]


class LinearRouter(nn.Linear):
    """Some families have a plain linear that gives a score to each expert."""


class Mixed(Mixture):
    """With a linear router, and a linear that gives one number."""

    def __init__(self, form: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(form)
        self.router = LinearRouter(HIDDEN, EXPERTS)
        self.shared_gate = nn.Linear(HIDDEN, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states).view(-1, HIDDEN)
        weights, index = self.router(x).softmax(-1).topk(2)
        shared = self.shared(x) * self.shared_gate(x)
        return hidden_states + (self.experts(x, index, weights) + shared).view_as(hidden_states)


@pytest.mark.parametrize("form", [lambda experts: experts, unfuse], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", [Mixture, Mixed], ids=["module", "linear"])
def test_experts_are_one_reader_and_their_routers_are_none(
    kind: type[Mixture], form: Callable[[nn.Module], nn.Module]
) -> None:
    block = kind(form)
    trace = trace_block(block, batch_of(torch.randn(2, 3, HIDDEN)))
    names = ["norm", "experts", "shared"]
    assert sorted(event.name for event in trace) == sorted(names)
    event = next(event for event in trace if event.name == "experts")
    assert event.module is block.experts
    assert torch.equal(event.input, block.norm(trace[0].input).view(-1, HIDDEN))
    assert event.output.shape == (6, HIDDEN)
    assert [set(readers) for readers in readers_of_one_tensor(trace)] == [{"experts", "shared"}]


def test_linears_and_experts_read() -> None:
    experts = fused_experts()
    for module in (nn.Linear(2, 2), Conv1D(2, 2), experts, unfuse(experts)):
        assert is_reader(module)
    for module in (nn.LayerNorm(2), nn.Embedding(2, 2), nn.Module(), unfuse(experts).expert(0)):
        assert not is_reader(module)


def test_a_norm_is_one_vector_that_trains() -> None:
    nested = nn.LayerNorm(2)
    nested.inside = nn.Linear(2, 2)
    with_buffer = nn.Module()
    with_buffer.register_buffer("weight", torch.ones(2))
    assert is_norm(nn.LayerNorm(2))
    assert is_norm(nn.RMSNorm(2))
    assert not is_norm(nn.LayerNorm(2, elementwise_affine=False))
    assert not is_norm(nn.Linear(2, 2))
    assert not is_norm(nested)
    assert not is_norm(with_buffer)


def test_watchers_get_the_tokens_of_every_batch_without_padding() -> None:
    block = Residual()
    hidden = [torch.randn(2, 3, HIDDEN), torch.randn(1, 4, HIDDEN)]
    mask = torch.tensor([[False, True, True], [True, True, False]])
    seen: dict[str, list[Tensor]] = {"fc1": [], "fc2": []}
    watchers = {name: rows.append for name, rows in seen.items()}
    observe_inputs(block, watchers, [batch_of(hidden[0], mask), batch_of(hidden[1])])

    expected = [block.norm(hidden[0])[mask], block.norm(hidden[1]).reshape(-1, HIDDEN)]
    torch.testing.assert_close(seen["fc1"], expected)
    torch.testing.assert_close(seen["fc2"], [torch.relu(block.fc1(x)) for x in expected])
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_what_comes_after_the_last_watched_module_runs_for_the_first_batch_only() -> None:
    block = Residual()
    hidden = [torch.randn(1, count, HIDDEN) for count in (2, 3, 4)]
    seen: list[Tensor] = []
    later: list[int] = []
    block.fc2.register_forward_hook(lambda _, args, output: later.append(output.shape[1]))
    observe_inputs(block, {"fc1": seen.append}, map(batch_of, hidden))
    torch.testing.assert_close(seen, [block.norm(h)[0] for h in hidden])
    assert later == [2]


class Sometimes(nn.Module):
    """Calls its layers as it is told by the number of tokens."""

    def __init__(self, calls: dict[int, str]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(HIDDEN, HIDDEN) for _ in "abc")
        self.calls = calls

    def forward(self, hidden_states: Tensor) -> Tensor:
        for name in self.calls[hidden_states.shape[1]]:
            hidden_states = getattr(self, name)(hidden_states)
        return hidden_states


@pytest.mark.parametrize(
    "calls",
    [
        {1: "abc", 2: "abc"},
        {1: "abc", 2: "bca", 3: "cab"},
        {1: "ab", 2: "abc"},
        {1: "aba", 2: "abca"},
        {1: "abc", 2: "ab", 3: "bca"},
        {1: "bac", 2: "abc", 3: "c", 4: "abc"},
        {1: "", 2: "cba"},
    ],
    ids=lambda calls: ",".join(calls.values()),
)
def test_no_call_is_missed_where_batches_differ(calls: dict[int, str]) -> None:
    block, seen = Sometimes(calls), []

    def watch(name: str) -> Callable[[Tensor], None]:
        return lambda rows: seen.append((len(rows), name))

    batches = [batch_of(torch.randn(1, count, HIDDEN)) for count in calls]
    observe_inputs(block, {name: watch(name) for name in "abc"}, batches)
    expected = [(count, name) for count, names in calls.items() for name in names]
    assert seen == expected


def test_the_input_of_one_layer_ends_the_pass() -> None:
    block = Residual()
    hidden = torch.randn(2, 3, HIDDEN)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    later: list[object] = []
    block.fc2.register_forward_hook(lambda *call: later.append(call))
    found = input_of(block, "fc1", batch_of(hidden, mask))
    torch.testing.assert_close(found, block.norm(hidden)[mask])
    assert later == []
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_a_layer_that_does_not_run_again_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="`unused` ran before, but not in this pass"):
        input_of(Readers(), "unused", batch_of(torch.randn(1, 2, HIDDEN)))


def test_watchers_of_calls_get_every_positional_argument_and_the_mask() -> None:
    block = Mixture()
    hidden = [torch.randn(2, 3, HIDDEN), torch.randn(1, 4, HIDDEN)]
    masks = [torch.rand(batch.shape[:2]) > 0.3 for batch in hidden]
    seen: list[tuple[tuple[Any, ...], Tensor]] = []
    batches = [batch_of(*pair) for pair in zip(hidden, masks, strict=True)]
    observe_calls(block, {"experts": lambda *call: seen.append(call)}, batches)
    assert len(seen) == 2
    for batch, mask, (args, given) in zip(hidden, masks, seen, strict=True):
        x = block.norm(batch).view(-1, HIDDEN)
        weights, index = block.router(x)
        torch.testing.assert_close(args, (x, index, weights))
        assert torch.equal(given, mask)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_watchers_of_calls_are_taken_off_when_one_fails() -> None:
    def interrupt(*call: object) -> None:
        raise KeyboardInterrupt

    block = Residual()
    with pytest.raises(KeyboardInterrupt):
        observe_calls(block, {"fc1": interrupt}, [batch_of(torch.randn(1, 4, HIDDEN))])
    assert not any(module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("shape", [(2, 3, HIDDEN), (6, HIDDEN)], ids=["by row", "flat"])
def test_input_rows_are_those_of_the_first_argument_without_padding(shape: tuple[int, ...]) -> None:
    hidden, other = torch.randn(2, 3, HIDDEN), torch.randn(2, 3, HIDDEN)
    mask = torch.tensor([[False, True, True], [True, True, False]])
    rows: list[Tensor] = []
    input_rows(rows.append)((hidden.view(shape), other), mask)
    torch.testing.assert_close(rows, [hidden[mask]])

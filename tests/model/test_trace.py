"""Who read which tensor in a block's forward pass, and what watchers of its inputs are given."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from haq.model.trace import is_norm, observe_inputs, readers_of_one_tensor, trace_block
from tests.model.toys import HIDDEN, Residual, batch_of


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
    norm, fc1, fc2 = trace_block(block, batch_of(hidden))
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

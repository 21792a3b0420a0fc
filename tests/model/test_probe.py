"""The beginnings of sequences, in the place of the whole ones, wherever that is right."""

import pytest
import torch
from torch import Tensor, nn

from haq.model import probe
from haq.model.blocks import BlockBatch, BlockCall, capture_block_inputs, find_blocks, run_block
from haq.model.groups import find_groups
from haq.model.probe import shortened
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids
from tests.model.toys import HIDDEN, Residual, batch_of

LENGTH, TOKENS = 20, 10


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TOKENS", TOKENS)


def hidden(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES | MIXTURES)
def test_every_family_can_be_asked_with_a_few_tokens(name: str) -> None:
    model = (ARCHITECTURES | MIXTURES)[name]()
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": token_ids(2, LENGTH)}])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for index, block in enumerate(blocks):
        whole = inputs.of_block(index)[0].float()
        short = shortened(block.float(), whole)
        assert short.hidden.shape == (2, TOKENS, whole.hidden.shape[2])
        assert short.mask.shape == (2, TOKENS)
        torch.testing.assert_close(
            run_block(block, short), run_block(block, whole)[:, :TOKENS], rtol=1e-4, atol=1e-4
        )
        assert whole.hidden.shape[1] == LENGTH
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_they_tell_the_same_groups(name: str) -> None:
    model = ARCHITECTURES[name]()
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": token_ids(2, LENGTH)}])
    block, whole = blocks[0], inputs.of_block(0)[0]
    told, known = (find_groups(block, b) for b in (shortened(block, whole), whole))
    assert [(g.consumers, g.scope, g.routers) for g in told] == [
        (g.consumers, g.scope, g.routers) for g in known
    ]
    for ours, theirs in zip(told, known, strict=True):
        assert (ours.producer is None) == (theirs.producer is None)
        if ours.producer is not None and theirs.producer is not None:
            assert ours.producer.name == theirs.producer.name
            assert torch.equal(ours.producer.rows, theirs.producer.rows)


class Mean(Residual):
    """What a token becomes depends on those after it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states.mean(1, keepdim=True)


class Table(Residual):
    """Takes a table with as many columns as there are tokens, by chance."""

    def forward(self, hidden_states: Tensor, table: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states @ table.view(HIDDEN, LENGTH) @ (
            table.view(LENGTH, HIDDEN)
        )


def test_a_block_that_looks_ahead_is_given_all() -> None:
    batch = batch_of(hidden())
    assert shortened(Mean(), batch) is batch
    assert shortened(Residual(), batch) is not batch


def test_what_cannot_be_cut_is_given_whole() -> None:
    call = BlockCall((torch.randn(HIDDEN, LENGTH),), {})
    batch = BlockBatch(hidden(), call, torch.ones(2, LENGTH, dtype=torch.bool))
    assert shortened(Table(), batch) is batch


def test_padding_first_is_given_whole() -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, TOKENS:] = False
    after = batch_of(hidden(), mask)
    short = shortened(Residual(), after)
    assert short.hidden.shape[1] == TOKENS
    assert bool(short.mask.all())
    mask = mask.clone()
    mask[0, 0] = False
    before = batch_of(hidden(), mask)
    assert shortened(Residual(), before) is before


def test_short_sequences_are_given_whole() -> None:
    batch = batch_of(hidden()[:, : 2 * TOKENS - 1])
    assert shortened(Residual(), batch) is batch


def test_a_block_that_fails_is_given_whole_and_fails_again() -> None:
    class Broken(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            raise RuntimeError("broken")

    batch = batch_of(hidden())
    assert shortened(Broken(), batch) is batch


def test_twice_as_many_tokens_are_enough_to_tell() -> None:
    lengths: list[int] = []

    class Counting(Residual):
        def forward(self, hidden_states: Tensor) -> Tensor:
            lengths.append(hidden_states.shape[1])
            return super().forward(hidden_states)

    long = torch.randn(1, 5 * TOKENS, HIDDEN)
    assert shortened(Counting(), batch_of(long)).hidden.shape[1] == TOKENS
    assert sorted(lengths) == [TOKENS, 2 * TOKENS]

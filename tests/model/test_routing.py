"""What enters a layer's experts, token by token, against loops over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haq.model.routing import RoutedInputs, share_changed

EXPERTS, HIDDEN, SLOTS = 4, 6, 2
CHUNK = 4096

# Hidden states [B, T, D], experts of every token [B, T, A], and which tokens are real.
Call = tuple[Tensor, Tensor, Tensor]


def call(rows: int, columns: int, padding: int = 0) -> Call:
    """Random routing, where expert 3 is never chosen, and `padding` tokens at the left of row 0."""
    hidden = torch.randn(rows, columns, HIDDEN)
    index = torch.rand(rows, columns, EXPERTS - 1).argsort(-1)[..., :SLOTS]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[0, :padding] = False
    return hidden, index, mask


def watched(calls: list[Call], dtype: torch.dtype = torch.float32) -> RoutedInputs:
    """As `transformers` calls experts: with the tokens of all rows of the batch in one."""
    inputs = RoutedInputs(EXPERTS, dtype)
    for hidden, index, mask in calls:
        weights = torch.rand(hidden.shape[0] * hidden.shape[1], SLOTS)
        inputs.watch((hidden.flatten(0, 1), index.flatten(0, 1), weights), mask)
    return inputs


def tokens_of(calls: list[Call]) -> list[tuple[Tensor, list[int]]]:
    """Every real token in order, its hidden state and its experts."""
    return [
        (hidden[row, column], index[row, column].tolist())
        for hidden, index, mask in calls
        for row in range(len(hidden))
        for column in range(hidden.shape[1])
        if mask[row, column]
    ]


def rows_of(calls: list[Call], expert: int | None) -> Tensor:
    """The hidden states of the tokens that chose ``expert``; of all tokens if None."""
    rows = [row for row, chosen in tokens_of(calls) if expert is None or expert in chosen]
    return torch.stack(rows) if rows else torch.zeros(0, HIDDEN)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(params=[0, 3], ids=["no padding", "padding"])
def calls(request: pytest.FixtureRequest) -> list[Call]:
    return [call(2, 7, request.param), call(1, 5), call(3, 4, request.param)]


# --- Everything -----------------------------------------------------------------------------------


def test_index_is_that_of_every_real_token(calls: list[Call]) -> None:
    expected = torch.tensor([chosen for _, chosen in tokens_of(calls)])
    assert_equal(watched(calls).index, expected)


def test_tokens_are_counted_by_expert(calls: list[Call]) -> None:
    chosen = [expert for _, experts in tokens_of(calls) for expert in experts]
    counts = watched(calls).tokens_per_expert()
    assert counts == [chosen.count(expert) for expert in range(EXPERTS)]
    assert counts[3] == 0


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_inputs_of_an_expert(calls: list[Call], expert: int) -> None:
    chunks = list(watched(calls).of_expert(expert))
    assert all(len(chunk) for chunk in chunks)
    assert_equal(torch.cat([*chunks, torch.zeros(0, HIDDEN)]), rows_of(calls, expert))


def test_inputs_can_be_read_again(calls: list[Call]) -> None:
    inputs = watched(calls)
    first, second = (torch.cat(list(inputs.of_expert(1))) for _ in range(2))
    assert_equal(first, second)


def test_batches_that_are_not_flat(calls: list[Call]) -> None:
    """Some families keep batch and sequence apart."""
    inputs = RoutedInputs(EXPERTS)
    for hidden, index, mask in calls:
        inputs.watch((hidden, index), mask)
    assert_equal(inputs.of_any(1000), rows_of(calls, None))
    assert_equal(inputs.index, watched(calls).index)


def test_a_call_of_nothing_but_padding(calls: list[Call]) -> None:
    with_empty = [calls[0], call(1, 4, padding=4), *calls[1:]]
    inputs = watched(with_empty)
    assert_equal(inputs.index, watched(calls).index)
    assert_equal(inputs.of_any(1000), rows_of(calls, None))


def test_a_slot_without_expert_belongs_to_none() -> None:
    hidden, index, mask = call(2, 5)
    index[0, :, 0] = EXPERTS
    index[1, 2] = EXPERTS
    inputs = watched([(hidden, index, mask)])
    chosen = [e for _, experts in tokens_of([(hidden, index, mask)]) for e in experts]
    assert chosen.count(EXPERTS) == 7
    assert inputs.tokens_per_expert() == [chosen.count(expert) for expert in range(EXPERTS)]
    assert sum(inputs.tokens_per_expert()) == 2 * 5 * SLOTS - 7
    read = [len(torch.cat(list(inputs.of_expert(expert)))) for expert in range(3)]
    assert read == inputs.tokens_per_expert()[:3]
    # It is a token of the layer all the same.
    assert len(inputs.of_any(1000)) == 10


# --- In pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (CHUNK - 1, [CHUNK - 1]),
        (CHUNK, [CHUNK]),
        (CHUNK + 1, [CHUNK, 1]),
        (2 * CHUNK + 3, [CHUNK, CHUNK, 3]),
    ],
)
def test_inputs_come_in_chunks(tokens: int, sizes: list[int]) -> None:
    hidden = torch.randn(1, tokens, 2)
    index = torch.tensor([0, 2]).expand(1, tokens, 2)
    inputs = watched([(hidden, index, torch.ones(1, tokens, dtype=torch.bool))])
    chunks = list(inputs.of_expert(2))
    assert [len(chunk) for chunk in chunks] == sizes
    assert_equal(torch.cat(chunks), hidden[0])
    assert list(inputs.of_expert(1)) == []


def test_chunks_do_not_cross_calls() -> None:
    given = [call(1, 9), call(1, 5)]
    chunks = list(watched(given).of_expert(0))
    assert [len(chunk) for chunk in chunks] == [len(rows_of([one], 0)) for one in given]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("entered", [torch.bfloat16, torch.float32], ids=str)
def test_kept_in_one_dtype_and_given_in_float32(dtype: torch.dtype, entered: torch.dtype) -> None:
    given = [call(2, 7, padding=2)]
    hidden, index, mask = given[0]
    inputs = watched([(hidden.to(entered), index, mask)], dtype)
    assert {kept.dtype for kept in inputs._hidden} == {dtype}
    assert_equal(inputs.of_any(1000), rows_of(given, None).to(entered).to(dtype).float())
    (chunk,) = inputs.of_expert(0)
    assert_equal(chunk, rows_of(given, 0).to(entered).to(dtype).float())
    assert_equal(inputs.some_of(0, 1000), chunk)


# --- A sample -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
@pytest.mark.parametrize("expert", [None, 0, 2])
def test_a_sample_is_evenly_spread(calls: list[Call], expert: int | None, limit: int) -> None:
    inputs, rows = watched(calls), rows_of(calls, expert)
    sample = inputs.of_any(limit) if expert is None else inputs.some_of(expert, limit)
    count = min(limit, len(rows))
    # The first token of each of `count` equal parts.
    expected = [rows[int(part * len(rows) / count)] for part in range(count)]
    assert_equal(sample, torch.stack(expected))


def test_a_sample_of_an_expert_that_nobody_chose(calls: list[Call]) -> None:
    assert watched(calls).some_of(3, 10).shape == (0, HIDDEN)


@given(tokens=st.integers(1, 60), limit=st.integers(1, 70))
def test_laws_of_a_sample(tokens: int, limit: int) -> None:
    hidden = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    inputs = watched([(hidden, torch.zeros(1, tokens, 2).long(), mask)])
    sample = inputs.of_any(limit).view(-1)
    steps = sample.diff()
    assert len(sample) == min(limit, tokens)
    assert sample[0] == 0
    # No token twice; the distances differ by one at most, and so does what is left at the end.
    shortest = tokens // len(sample)
    assert all(shortest <= step <= shortest + 1 for step in steps)
    assert shortest <= tokens - sample[-1] <= shortest + 1


# --- What changed ---------------------------------------------------------------------------------


def test_share_changed_is_that_of_sets() -> None:
    before = torch.randint(0, EXPERTS, (200, SLOTS))
    after = torch.where(torch.rand(200, 1) < 0.5, before.flip(-1), torch.randint(0, 4, (200, 2)))
    pairs = zip(before.tolist(), after.tolist(), strict=True)
    changed = [sorted(one) != sorted(other) for one, other in pairs]
    assert 0 < sum(changed) < 150
    assert share_changed(before, after) == pytest.approx(sum(changed) / 200, rel=1e-6)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([[0, 1], [2, 3], [1, 2], [0, 3]], 0.0),
        ([[1, 0], [3, 2], [2, 1], [3, 0]], 0.0),
        ([[0, 1], [2, 3], [1, 2], [0, 2]], 0.25),
        ([[0, 2], [1, 3], [1, 3], [1, 3]], 1.0),
        ([[0, 4], [2, 3], [1, 2], [0, 3]], 0.25),
    ],
    ids=["same", "order", "one", "all", "none in place of one"],
)
def test_share_changed(after: list[list[int]], expected: float) -> None:
    before = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3]])
    share = share_changed(before, torch.tensor(after))
    assert isinstance(share, float)
    assert share == expected
    assert share_changed(torch.tensor(after), before) == expected


def test_share_changed_writes_to_neither() -> None:
    before, after = torch.tensor([[1, 0]]), torch.tensor([[3, 2]])
    share_changed(before, after)
    assert (before.tolist(), after.tolist()) == ([[1, 0]], [[3, 2]])

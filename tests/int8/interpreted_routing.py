"""A router's choice on the device, under Triton's interpreter: see `interpreted_kernels.py`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from haq.int8 import kernels
from haq.int8.kernels import Plan, Tiles, add_experts, expert_tiles, plans, tiles
from tests.int8.interpreted_groups import numpy_grouped
from tests.int8.interpreted_kernels import not_finite, random_tokens, random_weight

# --- Sorting --------------------------------------------------------------------------------------


def assert_sorted(index: Tensor, experts: int, made: Tiles, order: Tensor) -> None:
    """Every choice is in one tile of its expert, in the order of the tokens."""
    flat = index.flatten().numpy()
    expected = [(e, place) for e in range(experts) for place in np.flatnonzero(flat == e)]
    found = []
    for slot, first, count in made.table.tolist():
        assert 0 <= count <= made.block_m
        assert 0 <= slot < experts
        assert 0 <= first <= first + count <= len(flat)
        found += [(slot, int(place)) for place in order[first : first + count]]
    assert found == expected
    assert (made.rows, made.slots, made.covered) == (len(flat), experts, None)


CHOICES = [(1, 1, 1), (1, 2, 8), (5, 3, 5), (16, 2, 3), (33, 2, 3), (300, 8, 7), (3, 4, 130)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("tokens", "slots", "experts"), CHOICES)
def test_choices_by_expert(
    tokens: int, slots: int, experts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for comparisons in (8192, 1):
        monkeypatch.setattr(tiles, "_COMPARISONS", comparisons)
        index = torch.randint(experts, (tokens, slots)).to(dtype)
        assert_sorted(index, experts, *expert_tiles(index, experts))


def test_what_is_no_expert_is_in_no_tile() -> None:
    index = torch.tensor([[0, 3, -1], [2, 2, 2**40], [-(2**40), 1, 4]])
    assert_sorted(index, 3, *expert_tiles(index, 3))
    nobody = torch.full((7, 2), 3)
    made, order = expert_tiles(nobody, 3)
    assert_sorted(nobody, 3, made, order)
    assert made.table[:, 2].tolist() == [0] * len(made.table)


def test_no_tokens() -> None:
    made, order = expert_tiles(torch.empty(0, 2, dtype=torch.int64), 3)
    assert (made.table.shape, order.shape) == ((0, 3), (0,))


@pytest.mark.parametrize(
    ("rows", "experts"), [(5, 8), (8, 8), (9, 8), (16, 1), (32, 2), (40, 3), (700, 5)]
)
def test_there_are_tiles_for_the_worst_choice_and_no_more(rows: int, experts: int) -> None:
    """One row more than full tiles for as many experts as possible."""
    made, _ = expert_tiles(torch.zeros(rows, 1, dtype=torch.int64), experts)
    counts = [1] * min(rows, experts)
    left = rows - len(counts)
    while left:
        taken = min(left, made.block_m)
        counts[0] += taken
        left -= taken
    needed = sum(-(-count // made.block_m) for count in counts)
    worst = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]
    again, order = expert_tiles(worst, experts)
    assert len(again.table) == len(made.table) == needed
    assert_sorted(worst, experts, again, order)


def test_the_height_of_tiles_follows_the_shape() -> None:
    heights = [
        expert_tiles(torch.zeros(tokens, 2, dtype=torch.int64), 8)[0].block_m
        for tokens in (1, 16, 64, 65, 256, 257)
    ]
    assert heights == [16, 16, 16, 64, 64, 128]


# --- Products -------------------------------------------------------------------------------------


def groups_of(index: Tensor, experts: int) -> list[tuple[int, int, int]]:
    """A group for each choice, for the reference."""
    flat = index.flatten().tolist()
    return [(e, row, 1) for row, e in enumerate(flat) if 0 <= e < experts]


@not_finite
@pytest.mark.parametrize("shifted", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(1, 2, 4), (9, 3, 4), (40, 2, 3)])
def test_products_of_choices(tokens: int, slots: int, experts: int, shifted: bool) -> None:
    index = torch.randint(experts + 1, (tokens, slots))
    rows = tokens * slots
    rounded, (weight, scale) = random_tokens(tokens, 35, shifted), random_weight(experts, 19, 35)
    sums = weight.sum(-1, dtype=torch.int32).float() * scale[..., 0] if shifted else None
    bias, gates = torch.randn(experts, 19), torch.rand(rows)
    made, places = expert_tiles(index, experts)
    out = torch.full((rows, 19), 7.0)
    result = kernels.grouped_linear(
        rounded, weight, scale, made, per_token=slots, places=places, gates=gates, bias=bias,
        row_sums=sums, out=out,
    )  # fmt: skip
    assert result is out
    token = torch.arange(rows) // slots
    expected = numpy_grouped(
        rounded, weight, scale, groups_of(index, experts), token, gates, sums, bias
    )
    chosen = index.flatten().numpy() < experts
    np.testing.assert_array_equal(result.numpy()[chosen], expected[chosen])
    assert (result.numpy()[~chosen] == 7).all()


def test_rows_that_are_in_no_tile_are_left_as_they_are_in_out() -> None:
    rounded, (weight, scale) = random_tokens(9, 6), random_weight(2, 5, 6)
    made = kernels.row_tiles([(1, 2, 3), (0, 6, 2)], "cpu")
    out = torch.full((9, 5), 7.0)
    kernels.grouped_linear(rounded, weight, scale, made, out=out)
    expected = kernels.grouped_linear(rounded, weight, scale, made)
    covered = torch.tensor([2, 3, 4, 6, 7])
    others = torch.tensor([0, 1, 5, 8])
    assert torch.equal(out[covered], expected[covered])
    assert bool((out[others] == 7).all())
    assert not expected[others].any()


def test_measuring_plans_does_not_write_to_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what is compared a memory that all plans write to."""
    first, second = Plan(16, 16, 32), Plan(16, 32, 32)
    monkeypatch.setattr(plans, "_WORTH_TUNING", 1)
    monkeypatch.setattr(plans, "_can_measure", lambda: True)
    monkeypatch.setattr(plans, "_fastest_plans", {})
    monkeypatch.setattr(kernels.grouped, "_PLANS", {16: (first, second)})
    written: list[tuple[Plan, int]] = []
    grouped = kernels.grouped._grouped

    def noted(operands: Any, made: Tiles, rows: Any, out: Tensor, plan: Plan) -> Tensor:
        written.append((plan, out.data_ptr()))
        result = grouped(operands, made, rows, out, plan)
        return result.add_(1) if plan == second else result  # It is wrong.

    monkeypatch.setattr(kernels.grouped, "_grouped", noted)
    monkeypatch.setattr(plans, "_seconds", lambda run: 1.0)
    rounded, (weight, scale) = random_tokens(3, 40), random_weight(1, 33, 40)
    index = torch.tensor([[0], [1], [0]])  # The second row is in no tile.
    made, places = expert_tiles(index, 1)
    out = torch.zeros(3, 33)
    kernels.grouped_linear(rounded, weight, scale, made, places=places, out=out)
    expected = numpy_grouped(rounded, weight, scale, groups_of(index, 1), torch.arange(3))
    np.testing.assert_array_equal(out.numpy(), expected)
    assert {plan for plan, _ in written} == {first, second}
    assert [plan for plan, memory in written if memory == out.data_ptr()] == [first]


# --- Sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_sums_in_the_routers_order(
    slots: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.combine, "_COLUMNS_AT_ONCE", 32)
    index = torch.randint(-1, 4, (6, slots))
    rows = torch.randn(6 * slots, 75) * 10 ** torch.randint(-3, 4, (6 * slots, 1)).float()
    expected = np.zeros((6, 75), dtype=np.float32)
    for token in range(6):
        for slot in range(slots):
            if 0 <= index[token, slot] < 3:
                expected[token] += rows[token * slots + slot].numpy()
    rows[((index < 0) | (index >= 3)).flatten()] = torch.nan
    result = add_experts(rows, index, 3, dtype)
    torch.testing.assert_close(result, torch.from_numpy(expected).to(dtype), rtol=0, atol=0)


def test_a_single_negative_zero_stays_one() -> None:
    result = add_experts(torch.full((1, 3), -0.0), torch.zeros(1, 1).long(), 1, torch.float32)
    assert bool(result.signbit().all())


def test_no_sums() -> None:
    result = add_experts(torch.empty(0, 5), torch.empty(0, 2).long(), 3, torch.float16)
    assert (result.shape, result.dtype) == ((0, 5), torch.float16)


# --- Bad input ------------------------------------------------------------------------------------


def product_with(**changes: Any) -> Callable[[], object]:
    made, places = expert_tiles(torch.zeros(2, 2).long(), 3)
    arguments = {"per_token": 2, "places": places, **changes}
    weight, scale = torch.ones(3, 5, 6).char(), torch.ones(3, 5)
    return lambda: kernels.grouped_linear(random_tokens(2, 6), weight, scale, made, **arguments)


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "choices of floats": (
        lambda: expert_tiles(torch.zeros(2, 2), 3),
        TypeError,
        "`index` must be int32 or int64, got torch.float32",
    ),
    "a vector of choices": (
        lambda: expert_tiles(torch.zeros(2).long(), 3),
        ValueError,
        r"`index` must be a matrix \[T, A\], got shape \[2\]",
    ),
    "no choices per token": (
        product_with(per_token=0),
        ValueError,
        "`per_token` must be positive, and 1 where there is an `index`, got 0",
    ),
    "two ways to find the token": (
        product_with(index=torch.zeros(4).long()),
        ValueError,
        "and 1 where there is an `index`, got 2",
    ),
    "places of floats": (
        product_with(places=torch.zeros(4)),
        TypeError,
        "`places` must be int32 or int64, got torch.float32",
    ),
    "other places": (
        product_with(places=torch.zeros(3).long()),
        ValueError,
        r"`places` must be a contiguous tensor \[4\], got shape \[3\]",
    ),
    "too few rows": (
        product_with(per_token=1),
        ValueError,
        "at most 2 rows and 3 slots, which is what there is, got 4 and 3",
    ),
    "another dtype to write to": (
        product_with(out=torch.zeros(4, 5).half()),
        TypeError,
        "`out` must be torch.float32, got torch.float16",
    ),
    "another shape to write to": (
        product_with(out=torch.zeros(5, 4).t()),
        ValueError,
        r"`out` must be a contiguous tensor \[4, 5\], got shape \[4, 5\] and strides \[1, 4\]",
    ),
    "half rows": (
        lambda: add_experts(torch.zeros(4, 5).half(), torch.zeros(2, 2).long(), 3, torch.float32),
        TypeError,
        "`rows` must be float32, got torch.float16",
    ),
    "rows of other tokens": (
        lambda: add_experts(torch.zeros(5, 5), torch.zeros(2, 2).long(), 3, torch.float32),
        ValueError,
        r"`rows` must be a contiguous matrix \[4, D\], got shape \[5, 5\] and strides \[5, 1\]",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

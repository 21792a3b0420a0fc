"""Which rows of an expert's first matrix absorb scales of what its second one reads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from haq.model.experts import Activation
from haq.model.producers import rescalable_rows
from tests.model.test_experts import FAMILIES, INNER, fused

Function = Callable[[Tensor], Tensor]

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)


def halves(gate: Function, *, up_first: bool = False) -> Function:
    """The usual gate: two blocks of rows."""

    def activation(x: Tensor) -> Tensor:
        first, last = x.chunk(2, dim=-1)
        return gate(last) * first if up_first else gate(first) * last

    return activation


def interleaved(gate: Function, *, up_first: bool = False) -> Function:
    """Gate and up in turns."""
    gates, ups = (ODD, EVEN) if up_first else (EVEN, ODD)
    return lambda x: gate(x[..., gates]) * x[..., ups]


def clamped(limit: float, offset: float) -> Function:
    """gpt-oss's, with or without the 1 that it adds to up."""

    def activation(x: Tensor) -> Tensor:
        gate, up = x[..., EVEN].clamp(max=limit), x[..., ODD].clamp(-limit, limit)
        return (up + offset) * gate * torch.sigmoid(1.702 * gate)

    return activation


def reversed_up(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up.flip(-1)


def mixed_up(x: Tensor) -> Tensor:
    """What of up reaches a channel is not one row, but two."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * (up + up.roll(1, -1))


def both_squared(x: Tensor) -> Tensor:
    first, last = x.chunk(2, dim=-1)
    return (first * last).square()


def expected_rows(kind: str, channels: int) -> list[int]:
    return {
        "all": list(range(channels)),
        "first": list(range(channels)),
        "last": list(range(channels, 2 * channels)),
        "even": list(range(0, 2 * channels, 2)),
        "odd": list(range(1, 2 * channels, 2)),
    }[kind]


@pytest.mark.parametrize("channels", [1, 3, 8, 50])
@pytest.mark.parametrize(
    ("activation", "gated", "kind"),
    [
        (halves(functional.silu), True, "last"),
        (halves(functional.silu, up_first=True), True, "first"),
        (halves(functional.gelu), True, "last"),
        (interleaved(functional.silu), True, "odd"),
        (interleaved(functional.silu, up_first=True), True, "even"),
        (torch.relu, False, "all"),
        (functional.leaky_relu, False, "all"),
        (lambda x: x, False, "all"),
    ],
    ids=[
        "silu gate",
        "up first",
        "gelu gate",
        "interleaved",
        "interleaved, up first",
        "relu",
        "leaky relu",
        "nothing",
    ],
)
def test_rows_that_are_found(activation: Function, gated: bool, kind: str, channels: int) -> None:
    found = rescalable_rows(activation, rows=channels * (1 + gated), channels=channels)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.int64
    # Of one channel, the last row is the odd one, too.
    assert found.tolist() == expected_rows(kind, channels)


@pytest.mark.parametrize("channels", [3, 8, 50])
@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        (functional.gelu, False),
        (functional.silu, False),
        (lambda x: x.relu().square(), False),
        (lambda x: x + 1, False),
        (lambda x: x.clamp(-6, 6), False),
        (functional.relu6, False),
        (lambda x: x.flip(-1), False),
        (lambda x: torch.zeros_like(x), False),
        (clamped(7.0, offset=1.0), True),
        (clamped(1e9, offset=1.0), True),
        (clamped(10.0, offset=0.0), True),
        (reversed_up, True),
        (mixed_up, True),
        (both_squared, True),
        (halves(torch.zeros_like), True),
    ],
    ids=[
        "gelu",
        "silu",
        "relu2",
        "an offset",
        "cut off",
        "relu6",
        "another order",
        "zero",
        "gpt-oss",
        "gpt-oss, never cut off",
        "cut off, without the 1",
        "up in another order",
        "up mixed",
        "square of both",
        "a gate that is closed",
    ],
)
def test_where_there_are_none(activation: Function, gated: bool, channels: int) -> None:
    assert rescalable_rows(activation, rows=channels * (1 + gated), channels=channels) is None


@pytest.mark.parametrize(
    "activation",
    [
        halves(lambda gate: gate),
        halves(torch.relu),
        # Scales are positive, and a ReLU lets them through: gate rows do as well.
        halves(torch.relu, up_first=True),
    ],
    ids=["product", "relu gate", "relu gate, up first"],
)
def test_where_both_halves_would_do_it_is_the_last(activation: Function) -> None:
    found = rescalable_rows(activation, rows=12, channels=6)
    assert isinstance(found, Tensor)
    assert found.tolist() == list(range(6, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_real_families_absorb_a_scale(family: str) -> None:
    activation = Activation(fused(family))
    gated = not family.startswith("nemotron")
    found = rescalable_rows(activation, rows=INNER * (1 + gated), channels=INNER)
    if family == "gpt-oss" or not gated:  # (up + 1) gate, and the square of a ReLU
        assert found is None
        return
    assert isinstance(found, Tensor)
    x = torch.randn(40, 2 * INNER, dtype=torch.float64)
    scale = torch.rand(INNER, dtype=torch.float64) + 0.5
    divided = x.clone()
    divided[:, found] /= scale
    torch.testing.assert_close(activation(divided) * scale, activation(x), rtol=1e-12, atol=1e-12)


def test_nothing_of_the_caller_changes() -> None:
    """The same rows in every process, and a seed of the caller's goes on where it was."""
    state = torch.get_rng_state()
    rescalable_rows(halves(functional.silu), rows=12, channels=6)
    assert torch.equal(torch.get_rng_state(), state)

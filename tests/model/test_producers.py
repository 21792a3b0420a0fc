"""What may absorb a scale, and what must not: on blocks small enough to say why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from haq.model.experts import unfuse
from haq.model.folding import Producer
from haq.model.groups import find_groups
from tests.model.toys import (
    EXPERTS,
    HIDDEN,
    INNER,
    Fused,
    Mixture,
    Normed,
    OnePlusNorm,
    Residual,
    batch_of,
)


def producers(block: nn.Module, tokens: int = 30) -> dict[str, Producer | None]:
    """The producer of each group, by its first consumer."""
    groups = find_groups(block, batch_of(torch.randn(1, tokens, HIDDEN)))
    return {group.consumers[0]: group.producer for group in groups}


# --- What is between the linears ------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation",
    [torch.relu, functional.leaky_relu, torch.abs, lambda x: x],
    ids=["relu", "leaky relu", "abs", "nothing"],
)
def test_a_homogeneous_activation_lets_a_scale_through(
    activation: Callable[[Tensor], Tensor],
) -> None:
    found = producers(Residual(activation))["fc2"]
    assert (found.name, found.rows.tolist(), found.offset) == ("fc1", list(range(INNER)), 0.0)


@pytest.mark.parametrize(
    "activation",
    [
        functional.gelu,
        functional.silu,
        torch.tanh,
        lambda x: torch.relu(x).square(),
        lambda x: torch.relu(x).clamp(max=1.0),
        # Every channel sees all others.
        lambda x: x.softmax(-1),
        # Linear where the calibration tokens are, but for a small bend.
        lambda x: x + 1e-3 * x.square(),
    ],
    ids=["gelu", "silu", "tanh", "squared relu", "clamped relu", "softmax", "slightly bent"],
)
@pytest.mark.parametrize("tokens", [1, 30], ids=["one token", "many tokens"])
def test_any_other_activation_does_not(activation: Callable[[Tensor], Tensor], tokens: int) -> None:
    assert producers(Residual(activation), tokens)["fc2"] is None


def test_relu_channels_that_are_dead_are_folded_like_their_neighbours() -> None:
    block = Residual()
    with torch.no_grad():
        block.fc1.bias[[2, 7]] = -1000.0
    assert producers(block)["fc2"].rows.tolist() == list(range(INNER))


def test_relu_channels_that_hardly_fire_are_folded_like_their_neighbours() -> None:
    """What is left of a sum after its terms cancel is mostly rounding, and must scale too."""
    block, batch = Residual(), batch_of(torch.randn(1, 30, HIDDEN))
    with torch.no_grad():
        sums = block.fc1(block.norm(batch.hidden)) - block.fc1.bias
        block.fc1.bias[:4] = (1e-7 - sums.amax((0, 1)))[:4]
        largest = torch.relu(block.fc1(block.norm(batch.hidden))).amax((0, 1))
    assert (largest[:4] < 1e-6).all()
    _, group = find_groups(block, batch)
    assert group.producer.rows.tolist() == list(range(INNER))


def test_an_input_that_is_always_zero_has_no_producer() -> None:
    """Any factor fits: what this batch cannot show must not be folded."""
    block = Residual()
    with torch.no_grad():
        block.fc1.bias[:] = -1000.0
    assert producers(block)["fc2"] is None


@pytest.mark.parametrize("inner", [4096, 30_000])
def test_rows_of_wide_layers_are_told_apart(inner: int) -> None:
    """The factors of the probe lie closer the more rows there are."""
    block = Residual()
    block.fc1, block.fc2 = nn.Linear(HIDDEN, inner), nn.Linear(inner, HIDDEN)
    assert torch.equal(producers(block)["fc2"].rows, torch.arange(inner))


# --- Fused projections ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        (lambda x: (x[..., :INNER], x[..., INNER:]), range(INNER, 2 * INNER)),
        (lambda x: (x[..., INNER:], x[..., :INNER]), range(INNER)),
        (lambda x: (x[..., ::2], x[..., 1::2]), range(1, 2 * INNER, 2)),
        (lambda x: (x[..., 1::2], x[..., ::2]), range(0, 2 * INNER, 2)),
    ],
    ids=["gate then up", "up then gate", "gate and up in turn", "up and gate in turn"],
)
def test_the_up_half_is_found_wherever_it_is(
    split: Callable[[Tensor], tuple[Tensor, Tensor]], rows: range
) -> None:
    found = producers(Fused(split))["down"]
    assert (found.name, found.rows.tolist()) == ("gate_up", list(rows))


def test_a_split_that_mixes_rows_has_no_producer() -> None:
    assert producers(Fused(lambda x: (x[..., :INNER], x[..., INNER:].cumsum(-1))))["down"] is None


class SharedValues(nn.Module):
    """Two value heads of four channels, each read by two heads; summed over tokens.

    ``tile`` lines the heads up as 0 1 0 1, else as 0 0 1 1.
    """

    def __init__(self, *, tile: bool) -> None:
        super().__init__()
        self.tile = tile
        self.v = nn.Linear(HIDDEN, 8)
        self.o = nn.Linear(16, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        values = self.v(hidden_states).unflatten(-1, (2, 4)).cumsum(1)
        values = values.repeat(1, 1, 2, 1) if self.tile else values.repeat_interleave(2, dim=2)
        return hidden_states + self.o(values.flatten(2))


@pytest.mark.parametrize("dead", [False, True], ids=["all alive", "some rows dead"])
@pytest.mark.parametrize(
    ("tile", "rows"),
    [
        (False, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]),
        (True, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=["0 0 1 1", "0 1 0 1"],
)
def test_shared_values_share_their_row(tile: bool, rows: list[int], dead: bool) -> None:
    block = SharedValues(tile=tile)
    if dead:
        with torch.no_grad():
            block.v.weight[[1, 6]] = 0.0
            block.v.bias[[1, 6]] = 0.0
    found = producers(block)["o"]
    assert (found.name, found.rows.tolist()) == ("v", rows)


# --- Norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (nn.LayerNorm(HIDDEN), 0.0),
        (nn.LayerNorm(HIDDEN, bias=False), 0.0),
        (nn.RMSNorm(HIDDEN), 0.0),
        (OnePlusNorm(HIDDEN), 1.0),
    ],
    ids=["layer norm", "layer norm without bias", "rms norm", "one plus norm"],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["as initialized", "random"])
def test_norms_and_their_offset_are_found(norm: nn.Module, offset: float, fresh: bool) -> None:
    if not fresh:
        norm.weight.data.normal_()
    found = producers(Normed(norm))["fc"]
    assert (found.name, found.rows.tolist(), found.offset) == ("norm", list(range(HIDDEN)), offset)


def test_a_norm_weight_of_zero_hides_nothing() -> None:
    norm = nn.RMSNorm(HIDDEN)
    norm.weight.data[3] = 0.0
    assert producers(Normed(norm))["fc"].rows.tolist() == list(range(HIDDEN))


class AlsoResidual(Normed):
    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        return normed + self.fc(normed)


class AlsoGate(Normed):
    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        return hidden_states + self.fc(normed) * torch.sigmoid(normed)


class AlsoSlice(Normed):
    """A second linear reads half of the channels: another group, with the same producer."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.part = nn.Linear(HIDDEN // 2, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        return hidden_states + self.fc(normed) + self.part(normed[..., : HIDDEN // 2])


@pytest.mark.parametrize("block", [AlsoResidual, AlsoGate, AlsoSlice])
def test_a_norm_that_feeds_more_than_the_group_is_refused(block: type[Normed]) -> None:
    assert set(producers(block(nn.RMSNorm(HIDDEN))).values()) == {None}


def test_a_norm_without_a_weight_is_no_producer() -> None:
    assert producers(Normed(nn.LayerNorm(HIDDEN, elementwise_affine=False)))["fc"] is None


def test_only_what_ran_before_the_group_is_asked() -> None:
    class After(Normed):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.norm(hidden_states + self.fc(hidden_states))

    assert producers(After(nn.RMSNorm(HIDDEN)))["fc"] is None


# --- Mixtures of experts --------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda experts: experts, unfuse], ids=["fused", "unfused"])
def test_the_norm_before_experts_and_their_router_is_their_producer(
    form: Callable[[nn.Module], nn.Module],
) -> None:
    block = Mixture(form)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    found = producers(block)["experts"]
    assert (found.name, found.rows.tolist(), found.offset) == ("norm", list(range(HIDDEN)), 0.0)
    # Experts are not copied to be restored, and come back to the bit all the same.
    torch.testing.assert_close(block.state_dict(), state, rtol=0, atol=0)


def test_experts_whose_norm_feeds_something_else_have_no_producer() -> None:
    """A matrix with five rows beside four experts is no router: a scale would not reach it."""
    block = Mixture()
    block.router.other = nn.Parameter(torch.randn(EXPERTS + 1, EXPERTS))
    block.router.forward = lambda x: (x[:, :2].sigmoid(), torch.ones(len(x), 2).long())
    assert producers(block)["experts"] is None


def test_experts_themselves_absorb_nothing() -> None:
    """All of their second matrices would have to, and each token is multiplied by its weights."""

    class After(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.after = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, hidden_states: Tensor) -> Tensor:
            x = self.norm(hidden_states).view(-1, HIDDEN)
            weights, index = self.router(x)
            return hidden_states + self.after(self.experts(x, index, weights)).view_as(
                hidden_states
            )

    found = producers(After())
    assert found["after"] is None
    assert found["experts"].name == "norm"

"""What may absorb a scale, and what must not: on blocks small enough to say why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from haq.model.groups import find_groups
from haq.model.producers import Producer, fold, keep_parameters, same_function
from tests.model.toys import HIDDEN, INNER, Residual, batch_of


class OnePlusNorm(nn.Module):
    """Gemma's norm: multiplies by 1 + w."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


class Normed(nn.Module):
    """``hidden + fc(norm(hidden))``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.fc = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.fc(self.norm(hidden_states))


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


class Fused(nn.Module):
    """A gated MLP with gate and up in one matrix; ``split`` takes them apart."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.split = split
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.split(self.gate_up(hidden_states))
        return hidden_states + self.down(functional.silu(gate) * up)


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


# --- Folding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("norm", "offset"),
    [(nn.LayerNorm(HIDDEN), 0.0), (nn.RMSNorm(HIDDEN), 0.0), (OnePlusNorm(HIDDEN), 1.0)],
    ids=["layer norm", "rms norm", "one plus norm"],
)
def test_folding_into_a_16_bit_norm_is_as_exact_as_into_a_32_bit_one(
    norm: nn.Module, offset: float, dtype: torch.dtype
) -> None:
    block = Normed(norm)
    for parameter in norm.parameters():
        parameter.data.uniform_(0.5, 1.5).sub_(offset)
    # A weight of zero, and for LayerNorm a bias beside it that must be rescaled all the same.
    norm.weight.data[3] = -offset
    norm.weight.data.copy_(norm.weight.to(dtype))
    hidden = torch.randn(1, 50, HIDDEN)
    with torch.no_grad():
        expected = block(hidden)
    scale = torch.linspace(0.3, 7.0, HIDDEN)

    producer = Producer("norm", torch.arange(HIDDEN), offset)
    applied = fold(block, producer, ("fc",), scale, dtype)

    # Stored in 16 bits, the weight is the one that was folded.
    assert torch.equal(norm.weight, norm.weight.to(dtype).float())
    # The scale is the one asked for, to the precision of the stored weight: an ulp of w is several
    # of a small 1 + w.
    torch.testing.assert_close(applied, scale, rtol=10 * torch.finfo(dtype).eps, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-5)


def test_folding_divides_rows_and_multiplies_columns() -> None:
    block = Residual()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    scale = torch.arange(1.0, INNER + 1)
    fold(block, Producer("fc1", torch.arange(INNER)), ("fc2",), scale, torch.float32)
    after = block.state_dict()
    torch.testing.assert_close(after["fc1.weight"], before["fc1.weight"] / scale[:, None])
    torch.testing.assert_close(after["fc1.bias"], before["fc1.bias"] / scale)
    torch.testing.assert_close(after["fc2.weight"], before["fc2.weight"] * scale)
    for untouched in ("fc2.bias", "norm.weight", "norm.bias"):
        assert torch.equal(after[untouched], before[untouched])


def test_rows_that_nothing_reads_keep_their_numbers() -> None:
    block = Fused(lambda x: (x[..., :INNER], x[..., INNER:]))
    gate = block.gate_up.weight[:INNER].clone()
    producer = Producer("gate_up", torch.arange(INNER, 2 * INNER))
    fold(block, producer, ("down",), torch.full((INNER,), 2.0), torch.float32)
    assert torch.equal(block.gate_up.weight[:INNER], gate)


def test_kept_parameters_come_back() -> None:
    block = Residual()
    before = {key: value.clone() for key, value in block.state_dict().items()}
    restore = keep_parameters(block.norm, block.fc1)
    for parameter in block.parameters():
        parameter.data.add_(1.0)
    restore()
    after = block.state_dict()
    for key in ("norm.weight", "norm.bias", "fc1.weight", "fc1.bias"):
        assert torch.equal(after[key], before[key])
    torch.testing.assert_close(after["fc2.weight"], before["fc2.weight"] + 1)


@pytest.mark.parametrize(
    ("error", "same"),
    [(0.0, True), (1e-4, True), (1e-2, False), (float("nan"), False)],
    ids=["none", "rounding", "one percent", "nan"],
)
def test_an_error_is_measured_against_what_the_block_adds(error: float, same: bool) -> None:
    """A residual stream a hundred times larger would hide it."""
    hidden, added = 100 * torch.randn(1, 5, HIDDEN), torch.randn(1, 5, HIDDEN)
    assert same_function(hidden, hidden + added, hidden + added * (1 + error)) is same

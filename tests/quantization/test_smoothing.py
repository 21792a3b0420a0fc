"""Scales: the formulas in numpy, the laws they keep, and that the search finds the best of them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from haq.int8 import matmul
from haq.model.blocks import BlockBatch, BlockCall, run_block
from haq.model.experts import unfuse
from haq.model.folding import Producer
from haq.model.groups import Group, find_groups
from haq.quantization import smoothing
from haq.quantization.sample import Sample, ScopeCall, record_scope
from haq.quantization.scales import (
    Candidate,
    ChannelStatistics,
    candidate_scale,
    choices,
    search_candidates,
)
from haq.quantization.simulation import Simulated, simulated
from haq.quantization.smoothing import choose_scale, choose_scale_of_layer

CHANNELS = 12


def inputs_with_outliers(tokens: int = 200, seed: int = 0) -> Tensor:
    """Float32 ``[tokens, CHANNELS]``: channel 3 is always large, channel 8 once."""
    inputs = torch.randn(tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))
    inputs[:, 3] *= 40
    inputs[tokens // 2, 8] = 60
    return inputs


def statistics_of(*batches: Tensor) -> ChannelStatistics:
    statistics = ChannelStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_those_of_numpy(dtype: torch.dtype) -> None:
    inputs = inputs_with_outliers().to(dtype)
    statistics = statistics_of(inputs)
    x = np.abs(inputs.float().numpy().astype(np.float64))
    assert statistics.tokens == len(x)
    np.testing.assert_array_equal(statistics.maximum.numpy(), x.max(axis=0))
    np.testing.assert_allclose(statistics.p4.numpy(), np.mean(x**4, axis=0) ** 0.25, rtol=1e-5)


@settings(deadline=None)
@given(edges=st.lists(st.integers(1, 49), max_size=4, unique=True))
def test_statistics_do_not_depend_on_the_batches(edges: list[int]) -> None:
    inputs = inputs_with_outliers(50)
    parts = [part for part in inputs.tensor_split(sorted(edges)) if len(part)]
    whole, split = statistics_of(inputs), statistics_of(*parts)
    assert torch.equal(split.maximum, whole.maximum)
    torch.testing.assert_close(split.p4, whole.p4)


# --- Candidates -----------------------------------------------------------------------------------


def numpy_scale(candidate: Candidate, maximum: Tensor, p4: Tensor, weight: Tensor) -> np.ndarray:
    """s, for channels of which none is zero."""
    a = (p4 if candidate.family == "p4" else maximum).numpy().astype(np.float64)
    w = weight.numpy().astype(np.float64)
    if candidate.family == "none":
        return np.ones_like(a)
    if candidate.family == "p4":
        # The lower of the two middle values, as torch has it.
        floor = 0.1 * np.sort(a * w)[(len(a) - 1) // 2]
        a = np.maximum(a, floor / w)
    scale = a**candidate.strength / w ** (1 - candidate.strength)
    return scale / np.exp(np.log(scale).mean())


@pytest.mark.parametrize(
    "candidate",
    [*search_candidates(), Candidate("smoothquant", 0.5), Candidate("smoothquant", 0.8)],
    ids=str,
)
def test_scales_are_those_of_numpy(candidate: Candidate) -> None:
    statistics = statistics_of(inputs_with_outliers())
    weight = torch.rand(CHANNELS) + 0.1
    weight[5] = 1e-4  # Small enough for the floor to hold it up.
    scale = candidate_scale(candidate, statistics, weight)
    expected = numpy_scale(candidate, statistics.maximum, statistics.p4, weight)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-5)


def test_fixed_smoothing_is_smoothquants_up_to_one_factor() -> None:
    """Equation 4 of arXiv 2211.10438; a factor common to all channels changes no integer."""
    statistics = statistics_of(inputs_with_outliers())
    weight = torch.rand(CHANNELS) + 0.1
    scale = candidate_scale(Candidate("smoothquant", 0.8), statistics, weight)
    equation_4 = statistics.maximum**0.8 / weight**0.2
    ratio = scale / equation_4
    torch.testing.assert_close(ratio, ratio.mean().expand(CHANNELS))


def test_the_search_tries_nothing_first() -> None:
    candidates = search_candidates()
    assert candidates[0] == Candidate("none")
    assert len(set(candidates)) == len(candidates) > 1
    assert {candidate.family for candidate in candidates[1:]} == {"p4"}


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        (Candidate("none"), "none"),
        (Candidate("p4", 0.6), "p4 0.6"),
        (Candidate("smoothquant", 0.75), "smoothquant 0.75"),
        (Candidate("p4", 1.0), "p4 1"),
    ],
)
def test_candidates_have_short_names(candidate: Candidate, name: str) -> None:
    assert str(candidate) == name


@settings(deadline=None)
@given(
    candidate=st.sampled_from([*search_candidates(), Candidate("smoothquant", 0.5)]),
    dead_inputs=st.lists(st.booleans(), min_size=CHANNELS, max_size=CHANNELS),
    dead_weights=st.lists(st.booleans(), min_size=CHANNELS, max_size=CHANNELS),
    exponent=st.integers(-20, 20),
)
def test_scales_are_positive_and_finite_and_one_for_dead_inputs(
    candidate: Candidate, dead_inputs: list[bool], dead_weights: list[bool], exponent: int
) -> None:
    dead_input, dead_weight = torch.tensor(dead_inputs), torch.tensor(dead_weights)
    inputs = inputs_with_outliers().masked_fill(dead_input, 0.0) * 2.0**exponent
    weight = (torch.arange(CHANNELS) + 1.0).masked_fill(dead_weight, 0.0)
    scale = candidate_scale(candidate, statistics_of(inputs), weight)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (scale[dead_input | dead_weight] == 1).all()


# --- The search -----------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Gate and up on one norm, and down; takes its hidden states by name, as attentions do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(CHANNELS, 20)
        self.up = nn.Linear(CHANNELS, 20, bias=False)
        self.down = nn.Linear(20, CHANNELS)

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        gate = torch.relu(self.gate(hidden_states))
        return self.down(gate * self.up(hidden_states)), None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.mlp = Mlp()
        # What planted outliers look like: large in the norm, small in what reads it.
        self.norm.weight.data[3] = 60.0
        for linear in (self.mlp.gate, self.mlp.up):
            linear.weight.data[:, 3] /= 60

    def forward(self, hidden_states: Tensor) -> Tensor:
        output, _ = self.mlp(hidden_states=self.norm(hidden_states))
        return hidden_states + output


def sample_of(tokens: int = 40) -> list[BlockBatch]:
    hidden = torch.randn(3, 2, tokens, CHANNELS)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, :5] = False
    return [BlockBatch(rows, BlockCall((), {}), mask) for rows in hidden]


def quantized(values: np.ndarray) -> np.ndarray:
    """On the grid, every row with its own scale."""
    scale = np.abs(values).max(axis=-1, keepdims=True) / 127
    return np.rint(values / scale) * scale


def naive_error(block: Block, sample: list[BlockBatch], scale: Tensor, targets: list[str]) -> float:
    """Squared error of the MLP's output over real tokens, in float64."""

    def mlp(x: np.ndarray, *, simulate: bool) -> np.ndarray:
        outputs = {}
        for name in ("gate", "up"):
            linear = getattr(block.mlp, name)
            weight, inputs = linear.weight.detach().double().numpy(), x
            if simulate and f"mlp.{name}" in targets:
                s = scale.double().numpy()
                weight, inputs = quantized(weight * s), quantized(x / s)
            bias = 0 if linear.bias is None else linear.bias.detach().double().numpy()
            outputs[name] = inputs @ weight.T + bias
        hidden = np.maximum(outputs["gate"], 0) * outputs["up"]
        return hidden @ block.mlp.down.weight.detach().double().numpy().T

    error = 0.0
    for batch in sample:
        x = block.norm(batch.hidden)[batch.mask].detach().double().numpy()
        error += np.square(mlp(x, simulate=True) - mlp(x, simulate=False)).sum()
    return error


def group_of(block: Block, sample: list[BlockBatch]) -> tuple[Group, ChannelStatistics]:
    group = find_groups(block, sample[0])[0]
    assert group.consumers == ("mlp.gate", "mlp.up")
    assert group.scope == "mlp"
    assert group.producer.name == "norm"
    inputs = torch.cat([block.norm(batch.hidden)[batch.mask] for batch in sample]).detach()
    return group, statistics_of(inputs)


def calls_of(block: nn.Module, sample: list[BlockBatch]) -> list[ScopeCall]:
    return record_scope(block, "mlp", sample)


@pytest.mark.parametrize("targets", [["mlp.gate", "mlp.up"], ["mlp.up"]], ids=["both", "only up"])
def test_the_candidate_with_the_smallest_error_is_chosen(targets: list[str]) -> None:
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    state = copy.deepcopy(block.state_dict())
    modules = dict(block.named_modules())

    choice = choose_scale(
        block, group, targets, statistics, calls_of(block, sample), search_candidates()
    )

    weight = torch.cat([block.mlp.gate.weight, block.mlp.up.weight]).detach().abs().amax(0)
    scales = {c: candidate_scale(c, statistics, weight) for c in search_candidates()}
    errors = {c: naive_error(block, sample, scale, targets) for c, scale in scales.items()}
    assert choice.candidate == min(errors, key=errors.get)
    torch.testing.assert_close(choice.scale, scales[choice.candidate], rtol=0, atol=0)
    # The outlier channel costs most of the error, and the best scale takes most of it back.
    assert errors[choice.candidate] < 0.1 * errors[Candidate("none")]
    # Nothing is left of the trials.
    assert dict(block.named_modules()) == modules
    torch.testing.assert_close(block.state_dict(), state, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in block.modules())


def test_the_first_of_equals_wins() -> None:
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    candidates = [Candidate("none", 0.1), Candidate("none", 0.2)]
    choice = choose_scale(
        block, group, group.consumers, statistics, calls_of(block, sample), candidates
    )
    assert choice.candidate == candidates[0]


def test_a_single_candidate_is_taken_without_a_trial() -> None:
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    candidate = Candidate("smoothquant", 0.5)
    choice = choose_scale(block, group, group.consumers, statistics, [], [candidate])
    assert choice.candidate == candidate
    weight = torch.cat([block.mlp.gate.weight, block.mlp.up.weight]).abs().amax(0)
    torch.testing.assert_close(choice.scale, candidate_scale(candidate, statistics, weight))


def test_channels_of_one_row_get_the_largest_of_their_scales() -> None:
    """Two heads read each value row: what is folded into the row reaches both."""
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 4, 5, 6, 4, 5, 6])
    shared = Group(group.consumers, Producer("norm", rows), group.scope)
    candidate = Candidate("p4", 0.5)
    choice = choose_scale(block, shared, group.consumers, statistics, [], [candidate])
    own = choose_scale(block, group, group.consumers, statistics, [], [candidate]).scale
    expected = [max(own[rows == row]) for row in rows]
    assert choice.scale.tolist() == [value.item() for value in expected]


def test_padding_has_no_say() -> None:
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    noisy = [
        BlockBatch(
            torch.where(batch.mask[..., None], batch.hidden, 1e3 * torch.randn_like(batch.hidden)),
            batch.call,
            batch.mask,
        )
        for batch in sample
    ]
    arguments = (block, group, group.consumers, statistics)
    choice = choose_scale(*arguments, calls_of(block, sample), search_candidates())
    assert (
        choose_scale(*arguments, calls_of(block, noisy), search_candidates()).candidate
        == choice.candidate
    )


def test_a_trial_that_fails_leaves_the_block() -> None:
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    modules = dict(block.named_modules())

    def interrupt(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not isinstance(block.mlp.gate, nn.Linear):
            raise KeyboardInterrupt

    block.mlp.down.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        choose_scale(
            block, group, group.consumers, statistics, calls_of(block, sample), search_candidates()
        )
    assert dict(block.named_modules()) == modules


def rounded_to_powers_of_two(scale: Tensor) -> Tensor:
    return torch.from_numpy(2.0 ** np.rint(np.log2(scale.double().numpy()))).float()


@pytest.mark.parametrize(
    "candidates",
    [search_candidates(), [Candidate("smoothquant", 0.7)]],
    ids=["search", "a single one"],
)
def test_scales_can_be_powers_of_two_and_are_judged_as_such(candidates: list[Candidate]) -> None:
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    targets = list(group.consumers)
    choice = choose_scale(
        block, group, targets, statistics, calls_of(block, sample), candidates, powers_of_two=True
    )
    weight = torch.cat([block.mlp.gate.weight, block.mlp.up.weight]).detach().abs().amax(0)
    scales = {
        c: rounded_to_powers_of_two(candidate_scale(c, statistics, weight)) for c in candidates
    }
    errors = {c: naive_error(block, sample, scale, targets) for c, scale in scales.items()}
    assert choice.candidate == min(errors, key=errors.get)
    assert torch.equal(choice.scale, scales[choice.candidate])


def test_rounded_scales_may_be_best_with_another_candidate() -> None:
    """Or a test that they are judged as rounded would show nothing."""
    block, sample = Block(), sample_of()
    group, statistics = group_of(block, sample)
    arguments = (
        block,
        group,
        group.consumers,
        statistics,
        calls_of(block, sample),
        search_candidates(),
    )
    assert (
        choose_scale(*arguments).candidate != choose_scale(*arguments, powers_of_two=True).candidate
    )


# --- One linear by itself -------------------------------------------------------------------------


def layer_error(linear: nn.Module, inputs: Tensor, scale: Tensor) -> float:
    """Squared error of a linear's output in float64."""
    weight = linear.weight.detach().double().numpy()
    weight = weight.T if isinstance(linear, Conv1D) else weight
    x, s = inputs.double().numpy(), scale.double().numpy()
    return np.square(quantized(x / s) @ quantized(weight * s).T - x @ weight.T).sum()


@pytest.mark.parametrize("linear", [nn.Linear(CHANNELS, 20), Conv1D(20, CHANNELS)], ids=type)
def test_the_best_candidate_of_one_linear(linear: nn.Module) -> None:
    inputs = inputs_with_outliers()
    sample, statistics = inputs[::4], statistics_of(inputs)
    state = copy.deepcopy(linear.state_dict())
    with torch.no_grad():
        choice = choose_scale_of_layer([linear], statistics, sample, search_candidates())
    # Input channels are the rows of a `Conv1D` and the columns of a linear.
    weight = linear.weight.detach().abs().amax(1 if isinstance(linear, Conv1D) else 0)
    scales = {c: candidate_scale(c, statistics, weight) for c in search_candidates()}
    errors = {c: layer_error(linear, sample, scale) for c, scale in scales.items()}
    assert choice.candidate == min(errors, key=errors.get)
    assert errors[choice.candidate] < 0.5 * errors[Candidate("none")]
    torch.testing.assert_close(choice.scale, scales[choice.candidate], rtol=0, atol=0)
    torch.testing.assert_close(linear.state_dict(), state, rtol=0, atol=0)


def test_a_single_candidate_of_one_linear_needs_no_sample() -> None:
    linear, statistics = nn.Linear(CHANNELS, 20), statistics_of(inputs_with_outliers())
    candidate = Candidate("smoothquant", 0.5)
    choice = choose_scale_of_layer([linear], statistics, torch.empty(0, CHANNELS), [candidate])
    assert choice.candidate == candidate
    expected = candidate_scale(candidate, statistics, linear.weight.detach().abs().amax(0))
    torch.testing.assert_close(choice.scale, expected, rtol=0, atol=0)


def test_the_first_of_equals_wins_for_one_linear_too() -> None:
    linear, inputs = nn.Linear(CHANNELS, 20), inputs_with_outliers()
    candidates = [Candidate("none", 0.1), Candidate("none", 0.2)]
    with torch.no_grad():
        choice = choose_scale_of_layer([linear], statistics_of(inputs), inputs, candidates)
    assert choice.candidate == candidates[0]


# --- Experts --------------------------------------------------------------------------------------

EXPERTS, INNER = 3, 20


class MixtureOfExperts(nn.Module):
    """Two of three experts for each token, by a router that reads what they do."""

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=CHANNELS, intermediate_size=INNER, num_local_experts=EXPERTS
        )
        experts = MixtralExperts(config)
        for index, parameter in enumerate(experts.parameters()):
            nn.init.normal_(parameter, std=(1 + index) / 4)
        self.router = nn.Linear(CHANNELS, EXPERTS, bias=False)
        self.router.weight.data[:, 3] /= 60
        # Larger than what the experts have there, but it has no say in a scale.
        self.router.weight.data[:, 0] = torch.tensor([1.5, -2.0, 2.0])
        self.experts = unfuse(experts)
        for expert in self.experts.experts:
            expert.up.weight.data[:, 3] /= 60

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, CHANNELS)
        weights, index = self.router(flat).softmax(-1).topk(2)
        return self.experts(flat, index, weights).view_as(x)


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.norm.weight.data[3] = 60.0
        self.mlp = MixtureOfExperts()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.norm(hidden_states))


def silu_gate(gate_and_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_and_up, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def experts_error(block: MixtureBlock, sample: list[BlockBatch], scale: Tensor) -> float:
    """Squared error of the experts' sum in float64, with their first matrices and input int8."""
    s, error = scale.double().numpy(), 0.0
    for batch in sample:
        total = np.zeros((int(batch.mask.sum()), CHANNELS))
        x = block.norm(batch.hidden)[batch.mask].detach()
        gate, chosen = (t.detach() for t in block.mlp.router(x).softmax(-1).topk(2))
        x = x.double().numpy()
        for e, expert in enumerate(block.mlp.experts.experts):
            up, down = (m.weight.detach().double().numpy() for m in (expert.up, expert.down))
            middle = silu_gate(quantized(x / s) @ quantized(up * s).T) - silu_gate(x @ up.T)
            share = (gate * (chosen == e)).sum(-1, keepdim=True).double().numpy()
            total += middle @ down.T * share
        error += np.square(total).sum()
    return error


def test_one_scale_for_all_experts_is_judged_by_their_sum() -> None:
    block, sample = MixtureBlock(), sample_of()
    group = find_groups(block, sample[0])[0]
    assert (group.consumers, group.routers) == (("mlp.experts",), ("mlp.router",))
    inputs = torch.cat([block.norm(batch.hidden)[batch.mask] for batch in sample]).detach()
    statistics = statistics_of(inputs)
    calls = record_scope(block, group.scope, sample)
    state, modules = copy.deepcopy(block.state_dict()), dict(block.named_modules())

    choice = choose_scale(block, group, group.consumers, statistics, calls, search_candidates())

    ups = torch.cat([expert.up.weight for expert in block.mlp.experts.experts])
    weight = ups.detach().abs().amax(0)
    scales = {c: candidate_scale(c, statistics, weight) for c in search_candidates()}
    torch.testing.assert_close(choice.scale, scales[choice.candidate], rtol=0, atol=0)
    errors = {c: experts_error(block, sample, scale) for c, scale in scales.items()}
    assert choice.candidate == min(errors, key=errors.get)
    assert errors[choice.candidate] < 0.1 * errors[Candidate("none")]
    assert dict(block.named_modules()) == modules
    torch.testing.assert_close(block.state_dict(), state, rtol=0, atol=0)


def test_most_candidates_are_told_from_the_best_by_a_part_of_the_sample() -> None:
    """The finalists, all the rest; and the same choice as if all had been judged on all."""
    block, sample = Block(), [sample_of()[0]] * 2 + sample_of()
    calls = calls_of(block, sample)
    enough = int(calls[0].mask.sum()) + int(calls[1].mask.sum())
    group, statistics = group_of(block, sample)
    weight = torch.cat([block.mlp.gate.weight, block.mlp.up.weight]).detach().abs().amax(0)
    options = choices(search_candidates(), statistics, weight)

    class Trial(smoothing._Trial):
        judged: ClassVar[list[tuple[int, int]]] = []

        def error(self, scale: Tensor, calls: Sequence[Any]) -> float:
            index = next(i for i, o in enumerate(options) if o.scale is scale)
            self.judged.append((index, len(calls)))
            return super().error(scale, calls)

    trial = Trial(block, group.scope, group.consumers, calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothing, "_TOKENS_FOR_ALL", enough)
        best = smoothing._best(trial, options, calls)
    assert [count for _, count in trial.judged[: len(options)]] == [2] * len(options)
    finalists = trial.judged[len(options) :]
    assert [count for _, count in finalists] == [len(calls) - 2] * 3
    errors = [smoothing._Trial.error(trial, o.scale, calls) for o in options]
    part = [smoothing._Trial.error(trial, o.scale, calls[:2]) for o in options]
    assert [i for i, _ in finalists] == sorted(np.argsort(part)[:3])
    assert best is options[int(np.argmin(errors))]


class Wide(Block):
    """The last linear of its MLP gives many more channels, of which the block takes some."""

    def __init__(self, bias: bool, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.mlp = WideMlp(after)
        self.mlp.down = nn.Linear(20, 700, bias=bias)
        for linear in (self.mlp.gate, self.mlp.up):
            linear.weight.data[:, 3] /= 60

    def forward(self, hidden_states: Tensor) -> Tensor:
        output, _ = self.mlp(hidden_states=self.norm(hidden_states))
        return hidden_states + output[..., :CHANNELS]


class WideMlp(Mlp):
    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.after = after

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None]:
        output, _ = super().forward(hidden_states=hidden_states)
        return self.after(output), None


@pytest.mark.parametrize("bias", [True, False])
def test_errors_of_a_wide_output_are_told_by_some_directions(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last linear gives what the scope gives, which the calls say."""
    monkeypatch.setattr(smoothing, "_DIRECTIONS", 150)
    block, batches = Wide(bias), sample_of()
    group, statistics = group_of(block, batches)
    sample = Sample(block, batches, ["mlp.gate", "mlp.up", "mlp.down"], ["mlp"])
    for batch in batches:
        with sample.watching(batch.mask):
            run_block(block, batch)
    calls = sample.calls_of("mlp")
    assert {call.tail for call in calls} == {"mlp.down"}
    weight = torch.cat([block.mlp.gate.weight, block.mlp.up.weight]).detach().abs().amax(0)
    options = choices(search_candidates(), statistics, weight)
    outputs: list[Tensor] = []
    block.mlp.register_forward_hook(lambda _, args, output: outputs.append(output[0]))

    def errors_of(calls: list[ScopeCall]) -> list[float]:
        outputs.clear()
        trial = smoothing._Trial(block, "mlp", group.consumers, calls)
        return [trial.error(option.scale, calls) for option in options]

    modules = dict(block.named_modules())
    few = np.array(errors_of(calls))
    assert {output.shape[-1] for output in outputs} == {150}
    exact = np.array(errors_of([replace(call, tail="") for call in calls]))
    # 150 random directions tell the squared length of errors that lie in r dimensions, in effect,
    # with a relative standard deviation of sqrt(2 / (150 r)).
    off = np.array(
        [
            4 * (2 / 150 / dimensions_of(of_option, calls)) ** 0.5
            for of_option in zip(*[iter(outputs)] * len(calls), strict=True)
        ]
    )
    assert off.min() < 0.2
    assert (np.abs(few / exact - 1) < off).all()
    best = int(few.argmin())
    assert exact[best] * (1 - off[best]) <= (exact * (1 + off)).min()
    assert dict(block.named_modules()) == modules


def dimensions_of(outputs: Sequence[Tensor], calls: list[ScopeCall]) -> float:
    """Of the errors of some calls, in effect: 1 if all of them are parallel."""
    errors = torch.cat([(o - c.output)[c.mask] for o, c in zip(outputs, calls, strict=True)])
    energies = torch.linalg.svdvals(errors.double()).square()
    return float(energies.sum().square() / energies.square().sum())


def test_a_linear_that_is_searched_for_is_seen_whole() -> None:
    block, batches = Wide(bias=True), sample_of()
    calls = [replace(call, tail="mlp.down") for call in calls_of(block, batches)]
    trial = smoothing._Trial(block, "mlp", ["mlp.down"], calls)
    assert trial._directions is None
    assert isinstance(trial._stand_ins["mlp.down"], Simulated)


@pytest.mark.parametrize("after", [lambda x: 2 * x, lambda x: x[..., :300]], ids=["twice", "part"])
def test_what_comes_after_the_last_linear_is_not_left_out(after: Callable) -> None:
    block, batches = Wide(True, after), sample_of()
    sample = Sample(block, batches, ["mlp.gate", "mlp.up", "mlp.down"], ["mlp"])
    for batch in batches:
        with sample.watching(batch.mask):
            run_block(block, batch)
    assert {call.tail for call in sample.calls_of("mlp")} == {""}


# --- Simulated layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["llvm", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_simulated_layer_takes_one_scale_after_the_other(bias: bool, backend: str) -> None:
    linear, inputs = nn.Linear(CHANNELS, 20, bias=bias), inputs_with_outliers()
    with matmul.use_backend(backend), torch.no_grad():
        layer = simulated(linear)
        for seed in range(3):
            scale = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(seed)) + 0.5
            layer.take(scale)
            x, w = (numpy_of(t) for t in (inputs * (1 / scale), linear.weight * scale))
            expected = quantized(x) @ quantized(w).T + (numpy_of(linear.bias) if bias else 0)
            np.testing.assert_allclose(layer(inputs).numpy(), expected, rtol=1e-4, atol=1e-3)


def test_simulated_experts_keep_no_weights() -> None:
    """All of them would be half as large as the layer."""
    block = MixtureBlock()
    layer = simulated(block.mlp.experts)
    parts = [part for part in layer.modules() if isinstance(part, Simulated)]
    assert len(parts) == EXPERTS
    for part in parts:
        part.take(torch.ones(CHANNELS))
        with torch.no_grad():
            part(torch.randn(3, CHANNELS))
        held = [value for name, value in vars(part).items() if name in ("_multiply", "_room")]
        assert held == [None, None]


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()

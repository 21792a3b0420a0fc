"""Experts one after the other, and linears together, from float to int8: against float64."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from haq import QuantizationConfig
from haq.int8 import grid
from haq.model.experts import Expert, ExpertList, unfuse
from haq.model.routing import RoutedInputs
from haq.nn import Int8Experts, Int8Linear
from haq.quantization import experts as experts_module
from haq.quantization import layers as layers_module
from haq.quantization.experts import MIN_TOKENS, ExpertLayer, nearest_errors, quantize_experts
from haq.quantization.hessian import Root, SecondMoment, triangular_root
from haq.quantization.layers import (
    InputErrors,
    OutputError,
    nearest,
    output_error,
    round_together,
    update_quantized,
    zero_point_pays,
)
from haq.quantization.scales import Candidate, search_candidates
from tests.quantization.moments import mean_of
from tests.quantization.test_rounding import correlated_inputs, damped, optimal_brain_surgeon

HIDDEN, INNER, EXPERTS, SLOTS = 16, 12, 4, 2
DAMPING = 0.01
PLAIN = [Candidate("none")]


def mixtral() -> nn.Module:
    return MixtralExperts(
        MixtralConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_local_experts=EXPERTS,
            num_experts_per_tok=SLOTS,
        )
    )


def gpt_oss() -> nn.Module:
    return GptOssExperts(
        GptOssConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_local_experts=EXPERTS,
            num_experts_per_tok=SLOTS,
        )
    )


def nemotron_h() -> nn.Module:
    return NemotronHExperts(
        NemotronHConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=SLOTS,
        )
    )


def silu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def with_biases() -> ExpertList:
    """No family has all of it: biases, and an output proportional to the up rows."""
    return ExpertList(
        [
            Expert("gate_up_proj", nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN))
            for _ in range(EXPERTS)
        ],
        silu_gate,
    )


FAMILIES: dict[str, Callable[[], ExpertList]] = {
    "mixtral": lambda: unfuse(mixtral()),
    "gpt-oss": lambda: unfuse(gpt_oss()),
    "nemotron-h": lambda: unfuse(nemotron_h()),
    "with biases": with_biases,
}
# Whose outputs are proportional to the up rows.
SMOOTHED = ["mixtral", "with biases"]


def experts_of(family: str) -> ExpertList:
    """The same random weights in every call."""
    experts = FAMILIES[family]()
    torch.manual_seed(5)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.4)
    return experts.requires_grad_(False)


def indifferent_to_channel_3(family: str) -> ExpertList:
    """Which may then be large without deciding everything."""
    experts = experts_of(family)
    for expert in experts.experts:
        expert.up.weight[:, 3] /= 64
    return experts


def tokens_of(count: int = 600) -> tuple[Tensor, Tensor]:
    """Inputs ``[T, D]`` that share directions, other ones for every expert, and who chose whom."""
    index = torch.stack([torch.randperm(EXPERTS)[:SLOTS] for _ in range(count)])
    hidden = np.stack([correlated_inputs(count, HIDDEN, seed=e) for e in range(EXPERTS)])
    return torch.from_numpy(hidden[index[:, 0], np.arange(count)]).float(), index


def routed(hidden: Tensor, index: Tensor) -> RoutedInputs:
    """In two batches, each with padding that anything but the mask would take for tokens."""
    inputs = RoutedInputs(EXPERTS)
    half = len(hidden) // 2
    for part in (slice(0, half), slice(half, None)):
        padding = 50 * torch.randn(7, HIDDEN)
        rows = torch.cat([padding, hidden[part]])
        chosen = torch.cat([torch.zeros(7, index.shape[1], dtype=torch.int64), index[part]])
        mask = torch.ones(1, len(rows), dtype=torch.bool)
        mask[0, :7] = False
        inputs.watch((rows, chosen), mask)
    return inputs


def config(**options: object) -> QuantizationConfig:
    options = {"damping": DAMPING, "search_tokens": 10_000} | options
    return QuantizationConfig(**options)


# --- The reference --------------------------------------------------------------------------------


def double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def grid_scale(weight: np.ndarray) -> np.ndarray:
    return np.abs(weight).max(axis=1, keepdims=True) / 127


def on_the_grid(values: np.ndarray, asymmetric: bool = False) -> np.ndarray:
    """Every token with a scale of its own, and with a zero point."""
    if not asymmetric:
        largest = np.abs(values).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, largest, 1.0) / 127
        return np.rint(values / scale) * scale
    low = np.minimum(values.min(axis=1, keepdims=True), 0)
    high = np.maximum(values.max(axis=1, keepdims=True), 0)
    scale = np.where(high > low, high - low, 1.0) / 255
    zero = np.rint(low / scale)
    return np.clip(np.rint(values / scale), zero, zero + 255) * scale


def compensated(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    hessian = damped(inputs.T @ inputs / len(inputs), DAMPING)
    return optimal_brain_surgeon(weight, grid_scale(weight)[:, 0], hessian)


def activated(experts: ExpertList, values: np.ndarray) -> np.ndarray:
    return experts.activation(torch.from_numpy(values)).numpy()


def bias_of(linear: nn.Module) -> np.ndarray | float:
    return 0.0 if linear.bias is None else double(linear.bias)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.square(got - expected).sum() / np.square(expected).sum())


# --- Experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("asymmetric_inputs", [True, False], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_rounded_with_the_hessian_of_its_own_tokens(
    family: str, asymmetric_inputs: bool
) -> None:
    hidden, index = tokens_of()
    hidden[:, 3] *= 64  # An outlier: it takes digits from the other channels.
    options = config(asymmetric_inputs=asymmetric_inputs)
    module, done = quantize_experts(
        indifferent_to_channel_3(family), routed(hidden, index), options, PLAIN
    )
    reference = indifferent_to_channel_3(family)

    # One decision for all experts of the layer; with as few channels it is the same everywhere.
    asymmetric = asymmetric_inputs
    assert [layer.asymmetric for layer in module.down] == [asymmetric] * EXPERTS
    assert not any(layer.asymmetric for layer in module.up)
    of_all_tokens = of_float = 0
    for e, expert in enumerate(reference.experts):
        up, down = double(expert.up.weight), double(expert.down.weight)
        own = double(hidden)[(index == e).any(1).numpy()]
        x = on_the_grid(own)
        integers = compensated(up, x)
        # A weight halfway between two integers may go the other way in float32.
        assert np.sum(module.up[e].weight.numpy() != integers) <= 2
        of_all_tokens += np.sum(compensated(up, on_the_grid(double(hidden))) != integers)

        # The second reads what the first, in int8, makes of its int8 input.
        made = double(module.up[e].weight) * double(module.up[e].weight_scale)
        middle = activated(reference, x @ made.T + bias_of(expert.up))
        integers = compensated(down, on_the_grid(middle, asymmetric))
        assert np.sum(module.down[e].weight.numpy() != integers) <= 2
        exact = activated(reference, own @ up.T + bias_of(expert.up))
        of_float += np.sum(compensated(down, on_the_grid(exact, asymmetric)) != integers)

        for layer, linear in ((module.up[e], expert.up), (module.down[e], expert.down)):
            scale = grid_scale(double(linear.weight))
            np.testing.assert_allclose(layer.weight_scale.numpy(), scale, rtol=1e-6)
            assert (layer.bias is None) == (linear.bias is None)
            if linear.bias is not None:
                assert torch.equal(layer.bias, linear.bias)
        assert [layer.tokens for layer in done[e]] == [len(own)] * 2
        assert [(layer.rounding, layer.remark) for layer in done[e]] == [("hessian", "")] * 2
    # With simpler Hessians more integers are others than the ones allowed for.
    assert of_all_tokens > 10 * EXPERTS
    assert of_float > 2 * EXPERTS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_back(family: str) -> None:
    hidden, index = tokens_of()
    experts = experts_of(family)
    module, done = quantize_experts(experts, routed(hidden, index), config(), PLAIN)
    assert type(module) is Int8Experts
    assert [type(expert) for expert in experts] == [nn.Identity] * EXPERTS
    up_name = "up_proj" if family == "nemotron-h" else "gate_up_proj"
    for e, layers in enumerate(done):
        assert [layer.name for layer in layers] == [up_name, "down_proj"]
        assert layers[0].module is module.up[e]
        assert layers[1].module is module.down[e]
        second = "none" if family in SMOOTHED else "-"
        assert [layer.smoothing for layer in layers] == [None, second]

    weights = torch.rand(index.shape)
    expected = experts_of(family)(hidden, index, weights)
    error = (module(hidden, index, weights) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_nearest_rounding_is_nothing_but_the_grid(family: str) -> None:
    module, done = quantize_experts(
        experts_of(family), routed(*tokens_of()), config(rounding="nearest"), PLAIN
    )
    for e, expert in enumerate(experts_of(family).experts):
        for layer, linear in ((module.up[e], expert.up), (module.down[e], expert.down)):
            weight = double(linear.weight)
            integers = np.rint(weight / grid_scale(weight))
            np.testing.assert_array_equal(layer.weight.numpy(), integers)
        assert [(r.rounding, r.remark) for r in done[e]] == [("nearest", "")] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_each_linear_on_its_exact_input(family: str) -> None:
    hidden, index = tokens_of()
    inputs = routed(hidden, index)
    before = nearest_errors(experts_of(family), inputs, config())
    module, done = quantize_experts(experts_of(family), inputs, config(), PLAIN)
    reference = experts_of(family)
    for e, expert in enumerate(reference.experts):
        x = double(hidden)[(index == e).any(1).numpy()]
        exact = x @ double(expert.up.weight).T + bias_of(expert.up)
        middle = activated(reference, exact)
        pairs = ((expert.up, x, module.up[e]), (expert.down, middle, module.down[e]))
        for k, (linear, read, layer) in enumerate(pairs):
            weight, bias = double(linear.weight), bias_of(linear)
            output = read @ weight.T + bias
            nearest_weight = np.rint(weight / grid_scale(weight)) * grid_scale(weight)
            plain = on_the_grid(read) @ nearest_weight.T + bias
            # An input between two integers may go the other way in float32.
            assert before[e][k] == pytest.approx(relative(plain, output), rel=2e-2)
            int8_weight = double(layer.weight) * double(layer.weight_scale)
            rounded = on_the_grid(read, layer.asymmetric) @ int8_weight.T + bias
            assert done[e][k].error == pytest.approx(relative(rounded, output), rel=2e-2)


def smoothed(
    experts: ExpertList,
    inputs: RoutedInputs,
    candidates: Sequence[Candidate],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[Expert], list[list[ExpertLayer]]]:
    """The float experts right before they are rounded, and what was done to them."""
    finished: list[Expert] = []
    original = experts_module._Work.finish

    def finish(work: Any, *arguments: Any) -> list[ExpertLayer]:
        finished.append(copy.deepcopy(work.expert))  # It is used up.
        return original(work, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experts_module._Work, "finish", finish)
        _, done = quantize_experts(experts, inputs, config(), candidates)
    return finished, done


def with_outlier(family: str) -> ExpertList:
    """Channel 3 of what the second linears read is large: gate and up rows are."""
    experts = experts_of(family)
    for expert in experts.experts:
        rows = [3, INNER + 3] if family != "gpt-oss" else [6, 7]
        expert.up.weight[[row for row in rows if row < len(expert.up.weight)]] *= 8
        expert.down.weight[:, 3] /= 64
    return experts


@pytest.mark.parametrize("candidates", [search_candidates(), [Candidate("smoothquant", 0.5)]])
@pytest.mark.parametrize("family", SMOOTHED)
def test_scales_are_folded_into_the_up_rows_exactly(
    family: str, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, index = tokens_of()
    new, done = smoothed(with_outlier(family), routed(hidden, index), candidates, monkeypatch)
    old = with_outlier(family)
    scales = []
    for e, (expert, before) in enumerate(zip(new, old.experts, strict=True)):
        assert str(done[e][1].smoothing) in {str(c) for c in candidates if c.family != "none"}
        # The gate keeps its numbers, the up rows are divided by what the columns are multiplied.
        assert torch.equal(expert.up.weight[:INNER], before.up.weight[:INNER])
        scale = (expert.down.weight / before.down.weight).median(0).values
        torch.testing.assert_close(expert.down.weight, before.down.weight * scale)
        torch.testing.assert_close(
            expert.up.weight[INNER:], before.up.weight[INNER:] / scale[:, None]
        )
        assert scale[3] > 3 * scale.median()
        if family == "with biases":
            assert torch.equal(expert.up.bias[:INNER], before.up.bias[:INNER])
            torch.testing.assert_close(expert.up.bias[INNER:], before.up.bias[INNER:] / scale)
            assert torch.equal(expert.down.bias, before.down.bias)
        torch.testing.assert_close(
            expert.down(silu_gate(expert.up(hidden))),
            before.down(silu_gate(before.up(hidden))),
            rtol=1e-4,
            atol=1e-4,
        )
        scales.append(scale)
    # Every expert has its own.
    assert not torch.allclose(scales[0], scales[1], rtol=0.01)


@pytest.mark.parametrize("family", ["gpt-oss", "nemotron-h"])
def test_an_activation_that_is_not_proportional_gets_no_scale(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = routed(*tokens_of())
    new, done = smoothed(with_outlier(family), inputs, search_candidates(), monkeypatch)
    for expert, before, layers in zip(new, with_outlier(family).experts, done, strict=True):
        assert layers[1].smoothing == "-"
        for old, parameter in zip(before.parameters(), expert.parameters(), strict=True):
            assert torch.equal(parameter, old)


def test_smoothing_pays_where_there_is_an_outlier() -> None:
    inputs = routed(*tokens_of())
    costs = [
        [layers[1].error for layers in quantize_experts(e, inputs, config(), candidates)[1]]
        for e, candidates in (
            (with_outlier("mixtral"), PLAIN),
            (with_outlier("mixtral"), search_candidates()),
        )
    ]
    assert all(after < 0.2 * before for before, after in zip(*costs, strict=True))


COUNTS = (0, MIN_TOKENS - 1, MIN_TOKENS, MIN_TOKENS + 1)


def chosen_so_often(counts: Sequence[int]) -> Tensor:
    """One expert for each of the first tokens; no expert for the others."""
    index = torch.full((600, 1), EXPERTS)
    order = torch.cat([torch.full((count,), e) for e, count in enumerate(counts)])
    index[: len(order), 0] = order[torch.randperm(len(order))]
    return index


@pytest.mark.parametrize("family", FAMILIES)
def test_with_too_few_tokens_an_expert_is_rounded_to_nearest(family: str) -> None:
    hidden, _ = tokens_of()
    inputs = routed(hidden, chosen_so_often(COUNTS))
    assert inputs.tokens_per_expert() == list(COUNTS)
    module, done = quantize_experts(experts_of(family), inputs, config(), PLAIN)
    assert [[layer.tokens for layer in layers] for layers in done] == [[c, c] for c in COUNTS]
    few = [f"{count} calibration tokens chose this expert: rounded to nearest" for count in (0, 63)]
    assert [[layer.remark for layer in layers] for layers in done] == [
        [few[0]] * 2,
        [few[1]] * 2,
        ["", ""],
        ["", ""],
    ]
    assert [[layer.rounding for layer in layers] for layers in done] == [
        ["nearest"] * 2,
        ["nearest"] * 2,
        ["hessian"] * 2,
        ["hessian"] * 2,
    ]
    for e, expert in enumerate(experts_of(family).experts):
        for layer, linear in ((module.up[e], expert.up), (module.down[e], expert.down)):
            weight = double(linear.weight)
            same = layer.weight.numpy() == np.rint(weight / grid_scale(weight))
            assert same.all() == (e < 2)
            assert np.isfinite(layer.weight_scale.numpy()).all()
        assert all(1e-7 < layer.error < 1e-2 for layer in done[e])


@pytest.mark.parametrize("count", [0, 10])
def test_an_expert_with_too_few_tokens_is_smoothed_by_what_all_read(count: int) -> None:
    """As if every token had chosen it."""
    hidden, _ = tokens_of()
    inputs = routed(hidden, chosen_so_often((count, 590, 0, 0)))
    everyone = routed(hidden, torch.zeros(len(hidden), 1, dtype=torch.int64))
    few, few_done = quantize_experts(with_outlier("mixtral"), inputs, config(), search_candidates())
    all_tokens, all_done = quantize_experts(
        with_outlier("mixtral"), everyone, config(rounding="nearest"), search_candidates()
    )
    assert few_done[0][1].smoothing == all_done[0][1].smoothing
    assert few_done[0][1].smoothing.startswith("p4")
    for layers in (few.up, few.down):
        other = all_tokens.up if layers is few.up else all_tokens.down
        assert torch.equal(layers[0].weight, other[0].weight)
        torch.testing.assert_close(layers[0].weight_scale, other[0].weight_scale)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda hidden, patch: hidden.zero_(),
            "its input was zero for every token: rounded to nearest",
        ),
        (
            lambda _, patch: patch.setattr(layers_module, "triangular_root", lambda *_, **__: None),
            "its Hessian could not be factored: rounded to nearest",
        ),
    ],
    ids=["zeros", "not factored"],
)
def test_a_hessian_that_is_of_no_use_is_noted(
    spoil: Callable[[Tensor, pytest.MonkeyPatch], None],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, index = tokens_of()
    spoil(hidden, monkeypatch)
    module, done = quantize_experts(experts_of("mixtral"), routed(hidden, index), config(), PLAIN)
    assert {(r.rounding, r.remark) for layers in done for r in layers} == {("nearest", expected)}
    weight = double(experts_of("mixtral").expert(1).up.weight)
    np.testing.assert_array_equal(module.up[1].weight, np.rint(weight / grid_scale(weight)))


# --- Linears that are rounded together ------------------------------------------------------------


def moment_of(inputs: np.ndarray) -> SecondMoment:
    moment = SecondMoment(inputs.shape[1])
    moment.update(torch.from_numpy(inputs))
    return moment


def linears_of() -> dict[str, nn.Linear]:
    return {
        "q": nn.Linear(HIDDEN, 10),
        "k": nn.Linear(HIDDEN, 6, bias=False),
        "v": nn.Linear(HIDDEN, 7),
    }


@pytest.mark.parametrize("asymmetric", [True, False])
def test_linears_that_share_an_input_are_rounded_as_by_themselves(asymmetric: bool) -> None:
    inputs = correlated_inputs(500, HIDDEN, seed=1)
    linears = linears_of()
    rounded = round_together(linears, moment_of(inputs), DAMPING, asymmetric)
    assert rounded.remark == ""
    assert list(rounded.modules) == list(linears)
    for name, linear in linears.items():
        layer = rounded.modules[name]
        weight = double(linear.weight)
        integers = compensated(weight, inputs)
        assert np.sum(layer.weight.numpy() != integers) <= 2
        assert np.sum(np.rint(weight / grid_scale(weight)) != integers) > 10
        np.testing.assert_allclose(layer.weight_scale.numpy(), grid_scale(weight), rtol=1e-6)
        assert layer.asymmetric is asymmetric
        assert (layer.bias is None) == (name == "k")
        if name != "k":
            assert torch.equal(layer.bias, linear.bias)
        alone = round_together({name: linear}, moment_of(inputs), DAMPING).modules[name]
        assert torch.equal(alone.weight, layer.weight)


def test_a_moment_is_used_up() -> None:
    moment = moment_of(correlated_inputs(100, HIDDEN, seed=1))
    round_together(linears_of(), moment, DAMPING)
    with pytest.raises(RuntimeError, match="The second moment was taken already"):
        round_together(linears_of(), moment, DAMPING)


def test_inputs_of_zero_leave_nothing_to_round_with() -> None:
    rounded = round_together(linears_of(), moment_of(np.zeros((5, HIDDEN))), DAMPING)
    assert rounded.modules == {}
    assert rounded.remark == "its input was zero for every token: rounded to nearest"


def test_a_hessian_without_root_leaves_nothing_to_round_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers_module, "triangular_root", lambda *_, **__: None)
    rounded = round_together(linears_of(), moment_of(correlated_inputs(50, HIDDEN, 1)), DAMPING)
    assert rounded.modules == {}
    assert rounded.remark == "its Hessian could not be factored: rounded to nearest"


@pytest.mark.parametrize(
    ("damping", "floor", "remark"),
    [
        (DAMPING, 0.0, ""),
        (0.1, 0.0, "damping raised to 0.1, diagonal floor 0"),
        (1.0, 1e-6, "damping raised to 1, diagonal floor 1e-06"),
    ],
)
def test_more_damping_than_asked_for_is_noted(
    damping: float, floor: float, remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def root(hessian: Tensor, asked: float, *, use_up: bool) -> Root:
        assert use_up
        assert asked == DAMPING
        return Root(triangular_root(hessian, damping).upper, damping, floor)

    inputs = correlated_inputs(500, HIDDEN, seed=1)
    monkeypatch.setattr(layers_module, "triangular_root", root)
    rounded = round_together(linears_of(), moment_of(inputs), DAMPING)
    assert rounded.remark == remark
    assert len(rounded.modules) == 3


def test_a_hessian_that_needs_more_damping_says_how_much() -> None:
    """Two directions in sixteen channels: with next to no damping, float32 cannot factor it."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 2)) @ rng.normal(size=(2, HIDDEN))
    needed = triangular_root(mean_of(moment_of(inputs)), 1e-12).damping
    assert needed > 1e-12
    rounded = round_together(linears_of(), moment_of(inputs), 1e-12)
    assert rounded.remark == f"damping raised to {needed:g}, diagonal floor 0"


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_by_itself(bias: bool, asymmetric: bool) -> None:
    linear = nn.Linear(HIDDEN, 5, bias=bias)
    layer = nearest(linear, asymmetric)
    weight = double(linear.weight)
    np.testing.assert_array_equal(layer.weight, np.rint(weight / grid_scale(weight)))
    assert layer.asymmetric is asymmetric
    assert (layer.bias is None) == (not bias)
    if bias:
        assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_moments_are_those_of_inputs_as_the_product_sees_them(asymmetric: bool) -> None:
    parts = [correlated_inputs(40, HIDDEN, seed=s) + 1.0 for s in range(2)]
    moment = SecondMoment(HIDDEN)
    for part in parts:
        update_quantized(moment, torch.from_numpy(part).float(), asymmetric)
    seen = on_the_grid(np.concatenate(parts), asymmetric)
    expected = seen.T @ seen / len(seen)
    # An input between two integers may go the other way in float32: one step of 80 tokens.
    np.testing.assert_allclose(mean_of(moment).numpy(), expected, rtol=1e-3, atol=1e-3)
    assert moment.tokens == 80


# --- Errors ---------------------------------------------------------------------------------------


def test_output_error_adds_up_over_batches() -> None:
    linear = nn.Linear(HIDDEN, 5)
    layer = nearest(linear)
    parts = [correlated_inputs(count, HIDDEN, seed=count) for count in (30, 50)]
    error = OutputError(linear, layer)
    for part in parts:
        error.update(torch.from_numpy(part).float())
    inputs = np.concatenate(parts)
    weight, bias = double(linear.weight), double(linear.bias)
    rounded = on_the_grid(inputs) @ (double(layer.weight) * double(layer.weight_scale)).T + bias
    expected = relative(rounded, inputs @ weight.T + bias)
    assert 1e-6 < expected < 1e-3
    assert error.relative() == pytest.approx(expected, rel=1e-2)
    together = output_error(linear, layer, torch.from_numpy(inputs).float())
    assert together == pytest.approx(error.relative(), rel=1e-5)


def test_output_error_in_numbers() -> None:
    linear = nn.Linear(2, 1, bias=False)
    linear.weight = nn.Parameter(torch.tensor([[1.0, 0.5]]))
    layer = Int8Linear(torch.tensor([[127, 127]], dtype=torch.int8), torch.tensor([[1 / 127]]))
    # 127 + 63.5 is what it should be, 254 is what it is.
    error = output_error(linear, layer, torch.tensor([[127.0, 127.0]]))
    assert error == pytest.approx((63.5 / 190.5) ** 2, rel=1e-5)


@pytest.mark.parametrize("tokens", [0, 3])
def test_output_error_where_nothing_came_out_is_zero(tokens: int) -> None:
    linear = nn.Linear(HIDDEN, 5, bias=False)
    assert output_error(linear, nearest(linear), torch.zeros(tokens, HIDDEN)) == 0.0


def test_input_errors_are_those_of_all_linears_that_read_it() -> None:
    linears = list(linears_of().values())
    inputs = np.abs(correlated_inputs(60, HIDDEN, seed=1))
    errors = InputErrors(linears)
    for part in (inputs[:20], inputs[20:]):
        errors.update(torch.from_numpy(part).float())
    weight = np.concatenate([double(linear.weight) for linear in linears])

    def expected(asymmetric: bool) -> float:
        return float(np.square((on_the_grid(inputs, asymmetric) - inputs) @ weight.T).sum())

    assert errors.symmetric == pytest.approx(expected(False), rel=2e-2)
    assert errors.asymmetric == pytest.approx(expected(True), rel=2e-2)
    assert errors.asymmetric < 0.5 * errors.symmetric
    assert zero_point_pays([errors])


def test_of_a_large_batch_some_tokens_stand_for_all() -> None:
    linears = list(linears_of().values())
    inputs = np.abs(correlated_inputs(2000, HIDDEN, seed=1))
    errors = InputErrors(linears)
    errors.update(torch.from_numpy(inputs).float())
    some = inputs[:: 2000 // 128]  # Every 15th, each for 15.
    weight = np.concatenate([double(linear.weight) for linear in linears])
    for asymmetric, found in ((False, errors.symmetric), (True, errors.asymmetric)):
        difference = (on_the_grid(some, asymmetric) - some) @ weight.T
        assert found == pytest.approx(15 * float(np.square(difference).sum()), rel=2e-2)


def test_of_a_large_weight_some_rows_stand_for_all() -> None:
    large = nn.Linear(HIDDEN, 3 * 1024 + 5, bias=False)
    inputs = np.abs(correlated_inputs(20, HIDDEN, seed=1))
    errors = InputErrors([large])
    errors.update(torch.from_numpy(inputs).float())
    some = double(large.weight)[::3]  # Each for three.
    for asymmetric, found in ((False, errors.symmetric), (True, errors.asymmetric)):
        difference = (on_the_grid(inputs, asymmetric) - inputs) @ some.T
        assert found == pytest.approx(3 * float(np.square(difference).sum()), rel=2e-2)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(10.0, 7.9)], True),
        ([(10.0, 8.1)], False),
        ([(10.0, 9.9), (100.0, 70.0)], True),  # What counts is the sum.
        ([(100.0, 99.0), (10.0, 1.0)], False),
        ([(0.0, 0.0)], False),
    ],
)
def test_zero_points_must_take_a_fifth_of_the_error_away(
    pairs: list[tuple[float, float]], expected: bool
) -> None:
    errors = []
    for symmetric, asymmetric in pairs:
        error = InputErrors(linears_of().values())
        error.symmetric, error.asymmetric = symmetric, asymmetric
        errors.append(error)
    assert zero_point_pays(errors) is expected


def test_the_grid_of_the_reference_is_haqs() -> None:
    weight = torch.randn(4, 9)
    np.testing.assert_allclose(grid.row_scale(weight), grid_scale(double(weight)), rtol=1e-6)

"""One block from float to int8: the whole method against numpy, and what must not change."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from haq import QuantizationConfig
from haq.model.blocks import BlockBatch, BlockCall, evenly_spread
from haq.nn import Int8Linear
from haq.quantization import block as block_module
from haq.quantization import layers as layers_module
from haq.quantization import work as work_module
from haq.quantization.hessian import Root
from haq.quantization.report import LayerReport
from haq.quantization.scales import ChannelStatistics
from haq.quantization.work import BlockWork, Statistics

HIDDEN, INNER = 16, 64
PLAIN = QuantizationConfig(smoothing="none")
NEAREST = QuantizationConfig(smoothing="none", rounding="nearest")
CONFIGS = {"default": QuantizationConfig(), "unsmoothed": PLAIN, "nearest": NEAREST}


class Block(nn.Module):
    """``hidden + down(relu(gate(x)) * up(x))`` with ``x = norm(hidden)``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate = nn.Linear(HIDDEN, INNER)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN)
        self.register_buffer("positions", torch.arange(3))
        self.register_buffer("factor", torch.tensor(1.0))
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states)
        return hidden_states + self.down(torch.relu(self.gate(x)) * self.up(x)) * self.factor


def quantize_block(block: nn.Module, *arguments: object) -> tuple[nn.Module, list[LayerReport]]:
    """The int8 block and the lines of its layers: nothing in here has experts."""
    result, report = block_module.quantize_block(block, *arguments)
    assert report.routing == []
    assert {layer.expert for layer in report.layers} <= {None}
    for layer in report.layers:
        module = result.get_submodule(layer.name.removeprefix("blocks.").partition(".")[2])
        assert layer.asymmetric == module.asymmetric
    return result, report.layers


def batches_of(count: int = 3, tokens: int = 40, dtype: torch.dtype = torch.float32) -> list:
    """Batches of two rows, one of them padded; channels that share a few directions."""
    mix = torch.randn(HIDDEN // 4, HIDDEN)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, :4] = False

    def hidden() -> Tensor:
        noise = 0.1 * torch.randn(2, tokens, HIDDEN)
        return (torch.randn(2, tokens, HIDDEN // 4) @ mix + noise).to(dtype)

    return [BlockBatch(hidden(), BlockCall((), {}), mask) for _ in range(count)]


def real_tokens(batches: list[BlockBatch]) -> Tensor:
    """Float32 ``[tokens, HIDDEN]``."""
    return torch.cat([batch.hidden.float()[batch.mask] for batch in batches])


def snapshot(block: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in block.state_dict().items()}


def assert_untouched(block: nn.Module, state: dict[str, Tensor]) -> None:
    assert not any(isinstance(module, Int8Linear) for module in block.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    torch.testing.assert_close(block.state_dict(), state, rtol=0, atol=0)


# --- The method, against numpy --------------------------------------------------------------------


def grid_scale(values: np.ndarray) -> np.ndarray:
    return np.abs(values).max(axis=-1, keepdims=True) / 127


def quantized(values: np.ndarray) -> np.ndarray:
    """On the grid, every row with its own scale."""
    scale = grid_scale(values)
    return np.rint(values / scale) * scale


def with_zero_point(values: np.ndarray) -> np.ndarray:
    """On 256 integers from each row's smallest value, or zero, to its largest."""
    low = np.minimum(values.min(axis=-1, keepdims=True), 0)
    high = np.maximum(values.max(axis=-1, keepdims=True), 0)
    step = (high - low) / 255
    first = np.rint(low / step)
    return np.clip(np.rint(values / step), first, first + 255) * step


def error_of(inputs: np.ndarray, rounded: np.ndarray, weight: np.ndarray) -> float:
    return np.square((rounded - inputs) @ weight.T).sum()


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def compensated(weight: np.ndarray, inputs: np.ndarray, damping: float) -> np.ndarray:
    """Integers, column by column, with the inverse of what is left of H computed anew."""
    hessian = inputs.T @ inputs / len(inputs)
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    weight, scale = weight.copy(), grid_scale(weight)[:, 0]
    integers = np.zeros_like(weight)
    for k in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[k:, k:])
        integers[:, k] = np.clip(np.rint(weight[:, k] / scale), -127, 127)
        error = weight[:, k] - integers[:, k] * scale
        weight[:, k:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return integers


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("damping", [0.001, 0.003])
def test_hessians_are_those_of_quantized_inputs_of_the_quantized_block(
    damping: float, asymmetric: bool
) -> None:
    block, batches = Block(), batches_of()
    with torch.no_grad():
        block.norm.weight[3] *= 30  # An outlier: it takes digits from the other channels.
    config = QuantizationConfig(smoothing="none", damping=damping, asymmetric_inputs=asymmetric)
    result, _ = quantize_block(block, batches, config, "blocks.0")

    gate, up, down = (numpy_of(module.weight) for module in (block.gate, block.up, block.down))
    float_x = numpy_of(block.norm(real_tokens(batches)))
    # With an outlier on one side of zero, a zero point takes far more than a fifth of the error.
    round_x = with_zero_point if asymmetric else quantized
    x = round_x(float_x)

    def inner(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.maximum(x @ gate.T + numpy_of(block.gate.bias), 0) * (x @ up.T)

    float_inner = inner(float_x, gate, up)
    ratio = error_of(float_inner, with_zero_point(float_inner), down) / error_of(
        float_inner, quantized(float_inner), down
    )
    round_inner = with_zero_point if asymmetric and ratio < 0.8 else quantized
    assert result.gate.asymmetric == result.up.asymmetric == asymmetric
    assert result.down.asymmetric == (round_inner is with_zero_point)
    # `down` reads what `gate` and `up` make when they are rounded to nearest.
    inner_of_nearest = inner(x, quantized(gate), quantized(up))
    expected = {
        "gate": compensated(gate, x, damping),
        "up": compensated(up, x, damping),
        "down": compensated(down, round_inner(inner_of_nearest), damping),
    }
    # With a simpler Hessian many integers are others.
    assert np.sum(compensated(gate, float_x, damping) != expected["gate"]) > 10
    assert np.sum(compensated(down, inner_of_nearest, damping) != expected["down"]) > 10
    of_float = compensated(down, round_inner(inner(x, gate, up)), damping)
    assert np.sum(of_float != expected["down"]) > 10
    for name, integers in expected.items():
        layer = result.get_submodule(name)
        # A weight halfway between two of them may go the other way in float32.
        assert np.sum(layer.weight.numpy() != integers) <= 2
        weight = numpy_of(block.get_submodule(name).weight)
        np.testing.assert_allclose(layer.weight_scale.numpy(), grid_scale(weight), rtol=1e-6)
    assert torch.equal(result.gate.bias, block.gate.bias)
    assert result.up.bias is None


@pytest.mark.parametrize(
    ("outlier", "config", "in_int8"),
    [
        (1, QuantizationConfig(search_tokens=50), True),
        (300, QuantizationConfig(search_tokens=50), False),
        (1, QuantizationConfig(smoothing="fixed", search_tokens=50), False),
    ],
    ids=["close to float", "outlier", "SmoothQuant"],
)
def test_statistics_of_most_batches_are_those_of_int8_where_that_is_close(
    outlier: float, config: QuantizationConfig, in_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with a fixed strength exact, for then the maxima are all there is."""
    block, batches = Block(), batches_of(5)
    with torch.no_grad():  # As trained models have it: it takes digits, and says little.
        block.norm.weight[3] *= outlier
        block.norm.bias[3] *= outlier
        block.gate.weight[:, 3] /= outlier
        block.up.weight[:, 3] /= outlier
    found: dict[tuple[str, ...], tuple[ChannelStatistics, bool]] = {}
    original = BlockWork.observe_rest

    def observe(work: BlockWork, modules: object, statistics: Statistics, *rest: object) -> None:
        original(work, modules, statistics, *rest)
        found.update({names: (seen, bool(modules)) for names, seen in statistics.items()})

    monkeypatch.setattr(BlockWork, "observe_rest", observe)
    quantize_block(block, batches, config, "blocks.0")

    assert {by_int8 for _, by_int8 in found.values()} == {in_int8}
    x = block.norm(real_tokens(batches))
    inner = torch.relu(block.gate(x)) * block.up(x)
    for names, inputs in {("gate", "up"): x, ("down",): inner}.items():
        statistics, _ = found[names]
        assert statistics.tokens == len(inputs)
        exact = numpy_of(inputs)
        expected = np.mean(exact**4, axis=0) ** 0.25
        rtol = 0.05 if in_int8 and names == ("down",) else 1e-5
        np.testing.assert_allclose(statistics.p4.numpy(), expected, rtol=rtol, atol=1e-3)
        np.testing.assert_allclose(
            statistics.maximum.numpy(), np.abs(exact).max(axis=0), rtol=rtol, atol=1e-3
        )


def test_nearest_rounding_without_smoothing_is_nothing_but_the_grid() -> None:
    block = Block()
    result, layers = quantize_block(block, batches_of(), NEAREST, "blocks.0")
    for name in ("gate", "up", "down"):
        weight = numpy_of(block.get_submodule(name).weight)
        integers = np.rint(weight / grid_scale(weight))
        np.testing.assert_array_equal(result.get_submodule(name).weight.numpy(), integers)
    assert torch.equal(result.norm.weight, block.norm.weight)
    assert [(layer.smoothing, layer.rounding) for layer in layers] == [("none", "nearest")] * 3


def test_fixed_smoothing_is_folded_into_norm_and_weights() -> None:
    block, batches = Block(), batches_of()
    config = QuantizationConfig(smoothing="fixed", smoothing_strength=0.7, rounding="nearest")
    result, layers = quantize_block(block, batches, config, "blocks.0")

    x = numpy_of(block.norm(real_tokens(batches)))
    weight = np.concatenate([numpy_of(block.gate.weight), numpy_of(block.up.weight)])
    scale = np.abs(x).max(axis=0) ** 0.7 / np.abs(weight).max(axis=0) ** 0.3
    scale /= np.exp(np.log(scale).mean())
    np.testing.assert_allclose(
        numpy_of(result.norm.weight), numpy_of(block.norm.weight) / scale, rtol=1e-5
    )
    np.testing.assert_allclose(
        numpy_of(result.norm.bias), numpy_of(block.norm.bias) / scale, rtol=1e-5
    )
    smoothed = numpy_of(block.gate.weight) * scale
    np.testing.assert_allclose(result.gate.weight_scale.numpy(), grid_scale(smoothed), rtol=1e-5)
    np.testing.assert_array_equal(
        result.gate.weight.numpy(), np.rint(smoothed / grid_scale(smoothed))
    )
    assert {layer.smoothing for layer in layers} == {"smoothquant 0.7"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_errors_of_the_report(config: QuantizationConfig) -> None:
    """|Y' - Y|^2 / |Y|^2 of one layer on what the float block gives it to read."""
    block, batches = Block(), batches_of()
    result, layers = quantize_block(block, batches, config, "blocks.0")

    tokens = real_tokens(batches)
    x, weight = numpy_of(block.norm(tokens)), numpy_of(block.gate.weight)
    exact = x @ weight.T + numpy_of(block.gate.bias)
    nearest = quantized(x) @ quantized(weight).T + numpy_of(block.gate.bias)
    now = numpy_of(result.gate(result.norm(tokens)))

    report = next(layer for layer in layers if layer.name == "blocks.0.gate")
    energy = np.square(exact).sum()
    assert report.error_before == pytest.approx(np.square(nearest - exact).sum() / energy, rel=1e-3)
    assert report.error_after == pytest.approx(np.square(now - exact).sum() / energy, rel=1e-3)


def test_the_int8_block_computes_what_the_float_block_does() -> None:
    block, batches = Block(), batches_of()
    result, _ = quantize_block(block, batches, QuantizationConfig(), "blocks.0")
    hidden = real_tokens(batches)
    with torch.no_grad():
        expected, got = block(hidden) - hidden, result(hidden) - hidden
    # 8 bits for weights and inputs of two layers in a row: about 1 % of noise.
    noise = (got - expected).norm() / expected.norm()
    assert 1e-4 < noise < 0.03


# --- The report -----------------------------------------------------------------------------------


def test_every_layer_has_its_line() -> None:
    batches = batches_of()
    _, layers = quantize_block(Block(), batches, PLAIN, "blocks.7")
    assert [
        dataclasses.replace(layer, error_before=0.0, error_after=0.0, asymmetric=False)
        for layer in layers
    ] == [
        LayerReport(name, rows, columns, "none", "hessian", 3 * (2 * 40 - 4), 0.0, 0.0)
        for name, rows, columns in [
            ("blocks.7.gate", INNER, HIDDEN),
            ("blocks.7.up", INNER, HIDDEN),
            ("blocks.7.down", HIDDEN, INNER),
        ]
    ]


def test_the_search_names_the_family_it_chose() -> None:
    _, layers = quantize_block(Block(), batches_of(), QuantizationConfig(), "blocks.0")
    families = {layer.name: layer.smoothing for layer in layers}
    assert families["blocks.0.gate"] == families["blocks.0.up"]
    assert all(family == "none" or family.startswith("p4 ") for family in families.values())


def test_a_layer_without_a_producer_has_no_smoothing() -> None:
    block = Block()
    block.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
    _, layers = quantize_block(block, batches_of(), QuantizationConfig(), "blocks.0")
    gate, up, down = layers
    assert (gate.smoothing, up.smoothing) == ("-", "-")
    assert down.smoothing != "-"
    assert {layer.note for layer in layers} == {""}


def test_a_layer_that_no_token_reached_is_rounded_to_nearest_and_named() -> None:
    block = Block()
    block.spare = nn.Linear(HIDDEN, INNER)
    result, layers = quantize_block(block, batches_of(), QuantizationConfig(), "blocks.0")
    spare = layers[-1]
    assert (spare.name, spare.tokens, spare.smoothing) == ("blocks.0.spare", 0, "-")
    assert (spare.rounding, spare.note) == ("nearest", "no calibration token reached it")
    assert (spare.error_before, spare.error_after) == (0.0, 0.0)
    weight = numpy_of(block.spare.weight)
    np.testing.assert_array_equal(result.spare.weight.numpy(), np.rint(weight / grid_scale(weight)))


def test_a_layer_whose_input_is_always_zero_works_and_is_named() -> None:
    block, batches = Block(), batches_of()
    with torch.no_grad():
        block.gate.bias.fill_(-1e4)  # Nothing passes the ReLU.
    result, layers = quantize_block(block, batches, QuantizationConfig(), "blocks.0")
    gate, _, down = layers
    assert gate.note == ""
    assert down.note == "its input was zero for every token: rounded to nearest"
    assert (down.smoothing, down.rounding) == ("-", "nearest")
    assert (down.error_before, down.error_after) == (0.0, 0.0)
    hidden = batches[0].hidden
    torch.testing.assert_close(result(hidden), hidden + block.down.bias)


@pytest.mark.parametrize(
    ("factor", "rounding", "note"),
    [
        (None, "nearest", "its Hessian could not be factored: rounded to nearest"),
        ((0.1, 0.0), "hessian", "damping raised to 0.1, diagonal floor 0"),
        ((1.0, 1e-5), "hessian", "damping raised to 1, diagonal floor 1e-05"),
    ],
    ids=["hopeless", "more damping", "diagonal floor"],
)
def test_what_became_of_a_difficult_hessian_is_noted(
    factor: tuple[float, float] | None,
    rounding: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def difficult(hessian: Tensor, damping: float, **_: bool) -> Root | None:
        # Only the Hessian of `down` is.
        if len(hessian) == HIDDEN:
            return Root(torch.eye(HIDDEN), damping, 0.0)
        return None if factor is None else Root(torch.eye(INNER), *factor)

    monkeypatch.setattr(layers_module, "triangular_root", difficult)
    block = Block()
    result, layers = quantize_block(block, batches_of(), PLAIN, "blocks.0")
    assert [layer.note for layer in layers] == ["", "", note]
    assert [layer.rounding for layer in layers] == ["hessian", "hessian", rounding]
    # Without correlations, and as the last resort, every weight goes to its nearest integer.
    weight = numpy_of(block.down.weight)
    np.testing.assert_array_equal(result.down.weight.numpy(), np.rint(weight / grid_scale(weight)))


def test_a_fold_that_changes_the_block_is_undone_and_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work_module, "same_in_block", lambda *outputs: False)
    block, batches = Block(), batches_of()
    result, layers = quantize_block(block, batches, QuantizationConfig(), "blocks.0")
    assert {layer.note for layer in layers} == {"folding changed the block: not smoothed"}
    assert {layer.smoothing for layer in layers} == {"-"}
    assert torch.equal(result.norm.weight, block.norm.weight)
    unsmoothed, _ = quantize_block(block, batches, PLAIN, "blocks.0")
    torch.testing.assert_close(result.state_dict(), unsmoothed.state_dict(), rtol=0, atol=0)


# --- What must not change -------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_float_block_is_left_alone(config: QuantizationConfig) -> None:
    block = Block()
    state = snapshot(block)
    result, _ = quantize_block(block, batches_of(), config, "blocks.0")
    assert_untouched(block, state)
    for tensor, other in itertools.product(
        block.state_dict().values(), result.state_dict().values()
    ):
        assert tensor.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (block_module, "find_groups"),
        (work_module, "choose_scale"),
        (work_module, "fold"),
        (work_module, "same_in_block"),
        (work_module, "zero_point_pays"),
        (work_module, "update_quantized"),
        (layers_module, "triangular_root"),
        (layers_module, "round_with_compensation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupt_at_any_step_leaves_the_float_block_alone(
    module: ModuleType, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupt)
    block = Block()
    state = snapshot(block)
    with pytest.raises(KeyboardInterrupt):
        quantize_block(block, batches_of(), QuantizationConfig(), "blocks.0")
    assert_untouched(block, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_stay_what_they_were(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    block.factor.data = block.factor.data.float()
    excluded = frozenset({"down"})
    batches = batches_of(dtype=dtype)
    result, _ = quantize_block(block, batches, QuantizationConfig(), "blocks.0", excluded)
    before, after = block.state_dict(), result.state_dict()
    for key in ("norm.weight", "norm.bias", "down.weight", "down.bias", "factor", "positions"):
        assert after[key].dtype == before[key].dtype, key
    # Scale and bias of an int8 layer are float32 in every model.
    assert after["gate.weight"].dtype == torch.int8
    assert after["gate.weight_scale"].dtype == after["gate.bias"].dtype == torch.float32
    assert result(batches[0].hidden).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_kept_in_32_bits_in_a_16_bit_block_keeps_its_precision(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    block.norm.float()
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 2.0)

    class Cast(nn.LayerNorm):
        """As such models do it: the norm in float32, its output in the model's dtype."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    block.norm.__class__ = Cast
    result, layers = quantize_block(
        block, batches_of(dtype=dtype), QuantizationConfig(smoothing="fixed"), "blocks.0"
    )
    assert layers[0].smoothing == "smoothquant 0.5"
    assert result.norm.weight.dtype == torch.float32
    assert not torch.equal(result.norm.weight, result.norm.weight.to(dtype).float())


def test_a_block_without_vectors_works() -> None:
    """No biases, and norms that have no weight."""
    block = Block()
    block.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
    block.gate, block.down = (
        nn.Linear(HIDDEN, INNER, bias=False),
        nn.Linear(INNER, HIDDEN, bias=False),
    )
    _, layers = quantize_block(block, batches_of(), QuantizationConfig(), "blocks.0")
    assert layers[2].smoothing != "-"


# --- Exclusions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("excluded", "notes"),
    [
        ("gate", {"up": "not smoothed: `gate` is excluded", "down": ""}),
        (
            "up",
            {"gate": "not smoothed: `up` is excluded", "down": "not smoothed: `up` is excluded"},
        ),
        ("down", {"gate": "", "up": ""}),
        (
            "norm",
            {
                "gate": "not smoothed: `norm` is excluded",
                "up": "not smoothed: `norm` is excluded",
                "down": "",
            },
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_excluded_module_keeps_its_bits(
    excluded: str, notes: dict[str, str], dtype: torch.dtype
) -> None:
    """Smoothing would fold a scale into it, whether it makes the input or reads it."""
    block = Block().to(dtype)
    result, layers = quantize_block(
        block, batches_of(dtype=dtype), QuantizationConfig(), "blocks.0", frozenset({excluded})
    )
    module = result.get_submodule(excluded)
    assert type(module) is type(block.get_submodule(excluded))
    torch.testing.assert_close(
        module.state_dict(), block.get_submodule(excluded).state_dict(), rtol=0, atol=0
    )
    assert {layer.name.removeprefix("blocks.0."): layer.note for layer in layers} == notes
    assert all(layer.smoothing == "-" for layer in layers if layer.note)


def test_without_smoothing_there_is_nothing_to_note_about_it() -> None:
    excluded = frozenset({"up"})
    _, layers = quantize_block(Block(), batches_of(), PLAIN, "blocks.0", excluded)
    assert {layer.note for layer in layers} == {""}


def test_all_excluded_is_a_copy() -> None:
    block = Block()
    excluded = frozenset({"gate", "up", "down"})
    result, layers = quantize_block(block, batches_of(), PLAIN, "blocks.0", excluded)
    assert layers == []
    torch.testing.assert_close(result.state_dict(), block.state_dict(), rtol=0, atol=0)


# --- What comes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    ("where", "layer"), [("norm", "gate"), ("relu", "down")], ids=["after norm", "after relu"]
)
def test_nan_and_infinity_name_the_layer_that_reads_them(
    value: float, where: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: function(*arguments).index_fill(
            -1, torch.tensor(3), torch.tensor(value)
        )

    block = Block()
    state = snapshot(block)
    if where == "norm":
        monkeypatch.setattr(nn.LayerNorm, "forward", broken(nn.LayerNorm.forward))
    else:
        monkeypatch.setattr(torch, "relu", broken(torch.relu))
    with pytest.raises(RuntimeError, match=rf"input of `blocks\.3\.{layer}` is NaN or infinite"):
        quantize_block(block, batches_of(), QuantizationConfig(), "blocks.3")
    assert_untouched(block, state)


def test_nan_is_not_blamed_on_a_linear_that_is_not_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs of NaN are equal to none, though the weight of ``spare`` has no say in them."""
    block = Block()
    block.spare = nn.Linear(HIDDEN, INNER)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda norm, x: torch.full_like(x, torch.nan))
    with pytest.raises(RuntimeError, match=r"input of `blocks\.3\.gate` is NaN or infinite"):
        quantize_block(block, batches_of(), QuantizationConfig(), "blocks.3")


def test_what_stands_at_padding_has_no_influence() -> None:
    """Not a bit of it."""
    block, batches = Block(), batches_of()
    result, layers = quantize_block(block, batches, QuantizationConfig(), "blocks.0")
    noisy = copy.deepcopy(batches)
    for batch in noisy:
        batch.hidden[~batch.mask] = 1e6 * torch.randn(int((~batch.mask).sum()), HIDDEN)
    same, same_layers = quantize_block(block, noisy, QuantizationConfig(), "blocks.0")
    torch.testing.assert_close(same.state_dict(), result.state_dict(), rtol=0, atol=0)
    assert same_layers == layers


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, [0]),
        (14, [0]),
        (20, [0, 5]),
        (30, [0, 3, 6]),
        (50, [0, 2, 4, 6, 8]),
        (1000, [*range(10)]),
    ],
)
def test_the_search_looks_at_batches_from_all_over(tokens: int, expected: list[int]) -> None:
    batches = [
        BlockBatch(torch.full((1, 10, 1), float(i)), BlockCall((), {}), torch.ones(1, 10).bool())
        for i in range(10)
    ]
    sample = evenly_spread(batches, tokens)
    assert [int(batch.hidden[0, 0, 0]) for batch in sample] == expected


# --- Weights that are read without a call ---------------------------------------------------------


class Reader(Block):
    """Computes what its linear ``spare`` would, without calling it: an int8 layer has no such
    weight."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.linear(super().forward(hidden_states), self.spare.weight)


def test_a_linear_whose_weight_is_read_without_a_call_is_refused() -> None:
    block = Reader()
    state = snapshot(block)
    match = (
        r"^`blocks\.3\.spare` must be called as a module to become int8, but its block reads its "
        r'weight by itself\. Add "\*\.spare" to `exclude` to keep it float\.$'
    )
    with pytest.raises(ValueError, match=match):
        quantize_block(block, batches_of(), QuantizationConfig(), "blocks.3")
    assert_untouched(block, state)


def test_and_works_when_it_is_excluded() -> None:
    block, batches = Reader(), batches_of()
    result, layers = quantize_block(
        block, batches, QuantizationConfig(), "blocks.3", frozenset({"spare"})
    )
    assert [layer.name for layer in layers] == [f"blocks.3.{n}" for n in ("gate", "up", "down")]
    torch.testing.assert_close(result.spare.state_dict(), block.spare.state_dict(), rtol=0, atol=0)
    hidden = real_tokens(batches)
    with torch.no_grad():
        expected, got = block(hidden), result(hidden)
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.03


def test_every_linear_that_no_token_reaches_is_looked_at() -> None:
    """One that is read behind one that is not."""
    block = Reader()
    block.aaa, block.zzz = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 3)
    del block.spare
    block.spare = nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"^`blocks\.3\.spare` must be called as a module"):
        quantize_block(block, batches_of(), QuantizationConfig(), "blocks.3")

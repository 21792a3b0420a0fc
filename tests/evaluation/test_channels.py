"""`channel_magnitudes` against what hidden states and formulas say by themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import haq
from haq import QuantizationConfig, channel_magnitudes
from tests.architectures import ARCHITECTURES, EXCLUDE, LAYERS, MIXTURES, SLOTS, token_ids

ModelFactory = Callable[..., PreTrainedModel]

BATCHES = [token_ids(2, 24, seed=seed) for seed in range(3)]


def largest(rows: Tensor) -> Tensor:
    return rows.detach().float().abs().flatten(0, -2).amax(0)


def hidden_states(model: PreTrainedModel, block: int, batches: list[Tensor]) -> Tensor:
    """What enters a block."""
    with torch.no_grad():
        outputs = [model(b, output_hidden_states=True, use_cache=False) for b in batches]
    return torch.cat([output.hidden_states[block] for output in outputs])


# The layer that reads a norm of what enters its block, and that norm.
NORMED = {
    "opt": (
        "model.decoder.layers.1.self_attn.q_proj",
        "model.decoder.layers.1.self_attn_layer_norm",
    ),
    "llama": ("model.layers.1.self_attn.k_proj", "model.layers.1.input_layernorm"),
    "gpt2": ("transformer.h.1.attn.c_attn", "transformer.h.1.ln_1"),
}


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", NORMED)
def test_a_linear_reads_the_norm_of_what_enters_its_block(name: str, int8: bool) -> None:
    model = ARCHITECTURES[name]()
    if int8:
        haq.quantize_model(model, BATCHES, progress=False)
    layer, norm = NORMED[name]
    expected = largest(model.get_submodule(norm)(hidden_states(model, 1, BATCHES)))
    found = channel_magnitudes(model, BATCHES, layer)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    torch.testing.assert_close(found, expected)


def test_the_head_reads_the_last_hidden_states() -> None:
    model = ARCHITECTURES["llama"]()
    expected = largest(hidden_states(model, LAYERS, BATCHES))
    torch.testing.assert_close(channel_magnitudes(model, BATCHES, "lm_head"), expected)


def test_smoothing_divides_channels_and_flattens_an_outlier() -> None:
    model = ARCHITECTURES["llama"]()
    attention = model.model.layers[1].self_attn
    model.model.layers[1].input_layernorm.weight.data[5] *= 64
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight.data[:, 5] /= 64
    layer = "model.layers.1.self_attn.q_proj"
    before = channel_magnitudes(model, BATCHES, layer)
    after = channel_magnitudes(haq.quantize_model(model, BATCHES, progress=False), BATCHES, layer)
    assert before.argmax() == 5
    assert before.max() > 20 * before.median()
    assert after.max() < 5 * after.median()


def test_padding_is_left_out(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    ids = torch.randint(64, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    layer = "model.layers.1.mlp.down_proj"
    padded = channel_magnitudes(model, [{"input_ids": ids, "attention_mask": mask}], layer)
    apart = channel_magnitudes(model, [ids[:1], ids[1:, :5]], layer)
    torch.testing.assert_close(padded, apart)
    assert (channel_magnitudes(model, [ids], layer) > 1.001 * padded).any()


def test_16_bit_models_give_float32(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    ids, layer = [torch.randint(64, (2, 12))], "model.layers.0.self_attn.o_proj"
    exact = channel_magnitudes(model, ids, layer)
    found = channel_magnitudes(model.to(torch.bfloat16), ids, layer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.02)  # bfloat16 keeps 8 bits


# --- Experts --------------------------------------------------------------------------------------


def routed(model: PreTrainedModel, experts: str) -> tuple[Tensor, Tensor]:
    """What the experts of a layer were given: hidden states ``[T, D]``, indices ``[T, A]``."""
    seen: list[tuple[Any, ...]] = []
    hook = model.get_submodule(experts).register_forward_pre_hook(lambda _, a: seen.append(a))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch, use_cache=False)
    hook.remove()
    hidden, index = (torch.cat([call[i] for call in seen]) for i in range(2))
    return hidden, index


def test_both_matrices_of_an_expert_in_a_float_model() -> None:
    model, name = MIXTURES["mixtral"](), "model.layers.1.mlp.experts"
    hidden, index = routed(model, name)
    experts = model.get_submodule(name)
    torch.testing.assert_close(channel_magnitudes(model, BATCHES, name), largest(hidden))
    for expert in range(experts.num_experts):
        rows = hidden[(index == expert).sum(-1) > 0]
        gate, up = (experts.gate_up_proj.data[expert] @ rows.T).chunk(2)
        middle = (gate * torch.sigmoid(gate) * up).T
        first = channel_magnitudes(model, BATCHES, f"{name}.{expert}.gate_up_proj")
        second = channel_magnitudes(model, BATCHES, f"{name}.{expert}.down_proj")
        torch.testing.assert_close(first, largest(rows))
        torch.testing.assert_close(second, largest(middle))


def test_int8_experts_read_nearly_what_float_ones_do() -> None:
    model, name = MIXTURES["mixtral"](), "model.layers.0.mlp.experts"
    config = QuantizationConfig(smoothing="none", rounding="nearest")
    int8 = haq.quantize_model(copy.deepcopy(model), BATCHES, config, progress=False)
    for layer in (name, f"{name}.2.gate_up_proj", f"{name}.2.down_proj"):
        before = channel_magnitudes(model, BATCHES, layer)
        after = channel_magnitudes(int8, BATCHES, layer)
        # A percent of the largest is the rounding of int8.
        torch.testing.assert_close(after, before, rtol=0.05, atol=0.02 * float(before.max()))


@pytest.mark.parametrize(
    "name", ["opt", "gpt2", "phi3", "mixtral", "gpt-oss", "nemotron-h", "jamba"]
)
def test_every_layer_that_the_report_names(name: str) -> None:
    model = (ARCHITECTURES | MIXTURES)[name]()
    original = copy.deepcopy(model)
    exclude = ("lm_head", *EXCLUDE.get(name, ()))
    haq.quantize_model(model, BATCHES, QuantizationConfig(exclude=exclude), progress=False)
    layers = [layer for layer in haq.quantization_report(model).layers if layer.tokens > 5]
    assert len(layers) >= 4
    for layer in layers:
        for each in (original, model):
            found = channel_magnitudes(each, BATCHES, layer.name)
            assert found.shape == (layer.in_features,)
            assert bool(found.isfinite().all())
            assert float(found.max()) > 0


# --- What is left behind, and bad input -----------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_is_left_as_it_was(
    tiny_llama: ModelFactory, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids, layer = [torch.randint(64, (1, 8))], "model.layers.1.mlp.up_proj"
    if fails:

        def interrupt(*_: Any) -> Tensor:
            raise KeyboardInterrupt

        monkeypatch.setattr(model.model.layers[1].mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            channel_magnitudes(model, ids, layer)
    else:
        channel_magnitudes(model, ids, layer)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off(tiny_opt: ModelFactory) -> None:
    model, ids = tiny_opt(dropout=0.5), [torch.randint(64, (2, 12))]
    layer = "model.decoder.layers.1.fc1"
    expected = channel_magnitudes(model, ids, layer)
    torch.testing.assert_close(channel_magnitudes(model.train(), ids, layer), expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("model.layers.0.mlp.up_prj", r"Did you mean `model.layers.0.mlp.up_proj`\? There are "),
        ("head", r"one of the 15 layers of LlamaForCausalLM, got 'head'"),
        ("", r"model\.layers\.\*\.self_attn\.o_proj, .*, with numbers for the stars\."),
        ("model.layers.2.mlp.up_proj", "`layer` must be one of"),
    ],
)
def test_unknown_layers(tiny_llama: ModelFactory, layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_magnitudes(tiny_llama(), [torch.randint(64, (1, 8))], layer)


def test_an_expert_that_no_token_chose() -> None:
    model, tokens = MIXTURES["mixtral"](), [token_ids(1, 1)]
    name = f"model.layers.{LAYERS - 1}.mlp.experts"
    messages = []
    for expert in range(model.config.num_local_experts):
        try:
            channel_magnitudes(model, tokens, f"{name}.{expert}.down_proj")
        except ValueError as error:
            messages.append(str(error))
    # One token chooses two experts, and leaves the others without any.
    assert len(messages) == model.config.num_local_experts - SLOTS
    assert all("No token of `calibration` reached `model.layers.1.mlp.exp" in m for m in messages)


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        ([], ValueError, "`calibration` is empty"),
        (torch.zeros(1, 4, dtype=torch.int64), TypeError, "Put batches in a list"),
        ([torch.full((1, 4), 64)], ValueError, r"ids in \[0, 63\].*got 64"),
    ],
)
def test_bad_batches(
    tiny_llama: ModelFactory, batches: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        channel_magnitudes(tiny_llama(), batches, "model.layers.0.mlp.up_proj")


def test_an_offloaded_model_is_refused(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    with (
        haq.ExpertOffloader(model, device="cpu", gpu_memory="1GiB"),
        pytest.raises(RuntimeError, match=r"is in two places.*Call its `detach\(\)` first"),
    ):
        channel_magnitudes(model, [torch.randint(64, (1, 8))], "model.layers.0.mlp.experts")


def test_nan_is_shown(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    layer = "model.layers.1.self_attn.q_proj"
    found = channel_magnitudes(model, [torch.randint(64, (1, 8))], layer)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    assert isinstance(model.get_submodule(layer), nn.Linear)

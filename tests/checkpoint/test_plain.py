"""What `AutoModelForCausalLM.from_pretrained` makes of checkpoints once haq is imported."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

import haq
from haq.checkpoint import plain
from haq.checkpoint.plain import CompressedTensorsOrHaq
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids

pytest.importorskip("compressed_tensors")

METHOD = "compressed-tensors"
CALIBRATION = [token_ids(2, 32, seed=seed) for seed in range(4)]
CONFIG = haq.QuantizationConfig(asymmetric_inputs=False)


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without haq."""
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)


def save(name: str, folder: Path) -> PreTrainedModel:
    model = (ARCHITECTURES | MIXTURES)[name]()
    haq.quantize_model(model, CALIBRATION, CONFIG, progress=False)
    haq.save_pretrained(model, folder)
    return model


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# --- What haq saved -------------------------------------------------------------------------------


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with float linears that have the values of the int8 ones."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, haq.Int8Linear):
            has_bias = module.bias is not None
            linear = nn.Linear(module.in_features, module.out_features, bias=has_bias)
            linear.weight = nn.Parameter(module.weight.float() * module.weight_scale)
            if has_bias:
                linear.bias = nn.Parameter(module.bias.clone())
            twin.set_submodule(name, linear)
    return twin


def with_float_inputs(model: PreTrainedModel) -> PreTrainedModel:
    """Let compressed-tensors round no inputs any more."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    return model


@pytest.mark.parametrize("name", ["opt", "llama", "qwen2", "phi3", "bloom", "gptj", "gpt-neox"])
def test_a_dense_checkpoint_of_haq_loads(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "int8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert isinstance(loaded.hf_quantizer, CompressedTensorsOrHaq)
    ids = token_ids(2, 32, seed=9)
    ours, theirs = logits_of(model, ids), logits_of(loaded, ids)
    # It rounds inputs as well, but to [-128, 127] and not to [-127, 127]: as much as int8 costs.
    assert float((ours - theirs).norm() / ours.norm()) < 0.05
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.9
    # Without that it has the values of the int8 weights.
    exact = logits_of(dequantized(model), ids)
    torch.testing.assert_close(
        logits_of(with_float_inputs(loaded), ids), exact, atol=1e-4, rtol=1e-4
    )


def test_experts_of_haq_are_refused_and_the_message_says_what_to_call(tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    model = save("mixtral", folder)
    with pytest.raises(ValueError, match="int8 experts") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    call = f'haq.from_pretrained("{folder}")'
    assert f"`{call}`" in str(caught.value)
    again = eval(call, {"haq": haq})
    ids = token_ids(1, 12)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


def test_a_mixture_in_float_loads(tmp_path: Path) -> None:
    model = MIXTURES["mixtral"]()
    model.save_pretrained(tmp_path)
    ids = token_ids(1, 12)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


# --- What others saved ----------------------------------------------------------------------------


def write_as_another_tool(model: PreTrainedModel, folder: Path) -> None:
    """W8A8 to nearest, by the description of the format and without haq."""
    tensors, ignore = {}, []
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == "lm_head":
            ignore.append(name)
            continue
        weight = state.pop(f"{name}.weight")
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        tensors[f"{name}.weight"] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale
    tied = model.config.tie_word_embeddings
    tensors |= {n: t for n, t in state.items() if not (tied and n == "lm_head.weight")}
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": METHOD,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
    }
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("dequantize", [False, True], ids=["compressed", "dequantized"])
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2"])
def test_a_dense_checkpoint_of_another_tool_loads_as_without_haq(
    name: str, dequantize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as_another_tool(ARCHITECTURES[name](), tmp_path)
    options = {}
    if dequantize:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with_haq = AutoModelForCausalLM.from_pretrained(tmp_path, **copy.deepcopy(options))
    # One that is float now has none.
    assert dequantize or type(with_haq.hf_quantizer) is CompressedTensorsOrHaq
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)
    without = AutoModelForCausalLM.from_pretrained(tmp_path, **copy.deepcopy(options))
    assert dequantize or type(without.hf_quantizer) is CompressedTensorsHfQuantizer

    ours, theirs = state_of(with_haq), state_of(without)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key
    ids = token_ids(2, 16)
    assert torch.equal(logits_of(with_haq, ids), logits_of(without, ids))
    # And it is the model that was written.
    exact = logits_of(ARCHITECTURES[name](), ids)
    assert float((logits_of(with_haq, ids) - exact).norm() / exact.norm()) < 0.2
    # Saved again, the same.
    with_haq.save_pretrained(tmp_path / "ours")
    without.save_pretrained(tmp_path / "theirs")
    entries = [
        json.loads((tmp_path / n / "config.json").read_text()).get("quantization_config")
        for n in ("ours", "theirs")
    ]
    assert entries[0] == entries[1]


def outcome(folder: Path) -> tuple[str, str]:
    try:
        return "loaded", type(AutoModelForCausalLM.from_pretrained(folder)).__name__
    except Exception as error:  # noqa: BLE001 (which one is what is compared)
        return type(error).__name__, str(error)


def test_experts_without_the_file_of_haq_fare_as_without_haq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "int8"
    save("mixtral", folder)
    (folder / "haq.json").unlink()
    with_haq = outcome(folder)
    assert "haq" not in with_haq[1].replace(str(folder), "")
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, CompressedTensorsHfQuantizer)
    assert with_haq == outcome(folder)


# --- The registry ---------------------------------------------------------------------------------


def test_importing_haq_takes_the_entry_and_no_other() -> None:
    assert AUTO_QUANTIZER_MAPPING[METHOD] is CompressedTensorsOrHaq
    taken = [n for n, kind in AUTO_QUANTIZER_MAPPING.items() if kind is CompressedTensorsOrHaq]
    assert taken == [METHOD]


def test_registering_twice_changes_nothing() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING)
    plain.register()
    plain.register()
    assert before == AUTO_QUANTIZER_MAPPING


@pytest.mark.usefixtures("original")
def test_registering_takes_the_place_of_the_original() -> None:
    plain.register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is CompressedTensorsOrHaq


def test_the_quantizer_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(CompressedTensorsHfQuantizer):
        pass

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, Other)
    plain.register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is Other


def test_without_an_entry_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, METHOD)
    plain.register()
    assert METHOD not in AUTO_QUANTIZER_MAPPING

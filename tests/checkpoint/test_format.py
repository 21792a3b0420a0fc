"""What is on disk, as other tools read it, and what they write, as haq reads it."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import haq
from haq import Int8Experts, Int8Linear, QuantizationConfig
from tests.architectures import (
    ARCHITECTURES,
    EXCLUDE,
    EXPERTS,
    HEADS,
    HIDDEN,
    INNER,
    KEY_VALUE_HEADS,
    LAYERS,
    MIXTURES,
    VOCABULARY,
    token_ids,
)
from tests.conftest import ModelFactory

MODELS = ARCHITECTURES | MIXTURES
CALIBRATION = [token_ids(2, 32, seed=seed) for seed in range(2)]
UNSEEN = token_ids(2, 20, seed=9) % 64


def quantize(name: str, *exclude: str, **options: Any) -> PreTrainedModel:
    options = {"rounding": "nearest", "smoothing": "fixed"} | options
    excluded = ("lm_head", *EXCLUDE.get(name, ()), *exclude)
    config = QuantizationConfig(exclude=excluded, **options)
    return haq.quantize_model(MODELS[name](), CALIBRATION, config, progress=False)


@functools.cache
def quantized(name: str) -> PreTrainedModel:
    """To be looked at, saved and called only."""
    return quantize(name)


@functools.cache
def _folder(name: str, root: Path) -> Path:
    haq.save_pretrained(quantized(name), root / name)
    return root / name


class Saved:
    """Directories of `quantized` models, each written once; to be read only."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        return _folder(name, self._root)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def entry_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(UNSEEN).logits


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama", "mixtral"])
def test_compressed_tensors_reads_the_configuration(name: str, saved: Saved) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    entry = entry_of(saved(name))
    config = quantization.QuantizationConfig.model_validate(entry)
    assert config.quant_method == "compressed-tensors"
    assert config.format == "int-quantized"
    assert config.quantization_status == quantization.QuantizationStatus.COMPRESSED
    assert config.kv_cache_scheme is None
    assert config.ignore == entry["ignore"]
    assert not config.requires_calibration_data()
    (scheme,) = config.config_groups.values()
    # It has a name for what haq does.
    expected = quantization.preset_name_to_scheme("W8A8", ["Linear"])
    assert scheme.targets == expected.targets
    for part in ("weights", "input_activations"):
        ours, theirs = (getattr(s, part).model_dump() for s in (scheme, expected))
        # How a scale was found is of no interest to who reads it.
        assert ours | {"observer": None} == theirs | {"observer": None}
    assert scheme.output_activations is None
    assert scheme.format == "int-quantized"


def sparse(*layers: int, router: str = "mlp.gate", prefix: str = "model") -> list[str]:
    return [f"{prefix}.layers.{layer}.{router}" for layer in layers]


# What multiplies in float, by the name that it has on disk.
FLOAT = {
    "opt-post-norm": ["lm_head", "model.decoder.project_in", "model.decoder.project_out"],
    # Its head has two names: as it is published, and as transformers looks for it.
    "gpt-neox": ["embed_out", "lm_head"],
    "mixtral": ["lm_head", *sparse(0, 1, router="block_sparse_moe.gate")],
    "qwen2-moe": ["lm_head", *sparse(1), *sparse(1, router="mlp.shared_expert_gate")],
    "qwen3-moe": ["lm_head", *sparse(0, 1)],
    "olmoe": ["lm_head", *sparse(0, 1)],
    "phimoe": ["lm_head", *sparse(0, 1, router="block_sparse_moe.gate")],
    "deepseek-v2": ["lm_head", *sparse(1)],
    "deepseek-v3": ["lm_head", *sparse(1)],
    "gpt-oss": ["lm_head", *sparse(0, 1, router="mlp.router")],
    "granite-moe": ["lm_head", *sparse(0, 1, router="block_sparse_moe.router.layer")],
    "granite-moe-shared": ["lm_head", *sparse(0, 1, router="block_sparse_moe.router.layer")],
    "jamba": [
        "lm_head",
        *sparse(0, router="mamba.dt_proj"),
        *sparse(1, router="feed_forward.router"),
    ],
    "ernie4_5-moe": ["lm_head", *sparse(1)],
    "hunyuan-moe": ["lm_head", *sparse(0, 1, router="mlp.gate.wg")],
    "glm4-moe": ["lm_head", *sparse(1)],
    "nemotron-h": ["lm_head", *sparse(0, router="mixer.gate", prefix="backbone")],
}


def is_ignored(name: str, ignore: list[str]) -> bool:
    """As compressed-tensors reads the list: names, or regular expressions that match the start."""
    return any(
        re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
        for entry in ignore
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_stays_float_is_ignored_by_its_name_on_disk(name: str, saved: Saved) -> None:
    ignore, tensors = entry_of(saved(name))["ignore"], tensors_of(saved(name))
    assert sorted(ignore) == sorted(FLOAT.get(name, ["lm_head"]))
    tied = quantized(name).config.tie_word_embeddings
    without = [n for n in ignore if f"{n}.weight" not in tensors]
    assert without == (["lm_head"] if tied or name == "gpt-neox" else [])
    for key, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            assert not is_ignored(key.removesuffix(".weight"), ignore), key


@pytest.mark.parametrize(
    ("name", "pattern", "layers"),
    [
        ("llama", "model.layers.0", r"model\.layers\.0\..*_proj"),
        ("gpt2", "*.c_attn", r"transformer\.h\.\d\.attn\.c_attn"),
        ("mixtral", "*.self_attn", r"model\.layers\.\d\.self_attn\.._proj"),
        ("mixtral", "*.mlp.experts", r"model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w\d"),
        (
            "mixtral",
            "model.layers.1.mlp.experts",
            r"model\.layers\.1\.block_sparse_moe\.experts\.\d\.w\d",
        ),
        ("qwen3-moe", "*.mlp.experts", r"model\.layers\.\d\.mlp\.experts\.\d\..*_proj"),
    ],
)
def test_what_was_excluded_is_ignored(name: str, pattern: str, layers: str, tmp_path: Path) -> None:
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    haq.save_pretrained(quantize(name, pattern), tmp_path / "int8")
    ignore, tensors = entry_of(tmp_path / "int8")["ignore"], tensors_of(tmp_path / "int8")
    excluded = {n for n in tensors if re.fullmatch(rf"{layers}\.weight", n)}
    assert excluded
    for key in excluded:
        assert tensors[key].dtype == torch.float32
    int8 = {n for n, tensor in tensors.items() if tensor.dtype == torch.int8}
    missing = []
    for key in excluded | int8:
        layer = key.removesuffix(".weight")
        ignored = any(match_name(layer, entry) for entry in ignore)
        assert ignored == is_ignored(layer, ignore)
        if ignored != (key in excluded):
            missing.append(key)
    assert sorted(missing) == []


# --- Tensors --------------------------------------------------------------------------------------

Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def what_vllm_asks_for_of_mixtral() -> Expected:
    """Names, dtypes and shapes that its loader knows, from the sizes of the architecture."""
    expected: Expected = {}

    def whole(name: str, *shape: int) -> None:
        expected[f"{name}.weight"] = (torch.float32, shape)

    def int8(name: str, rows: int, columns: int) -> None:
        expected[f"{name}.weight"] = (torch.int8, (rows, columns))
        expected[f"{name}.weight_scale"] = (torch.float32, (rows, 1))

    narrow = HIDDEN // HEADS * KEY_VALUE_HEADS
    whole("model.embed_tokens", VOCABULARY, HIDDEN)
    whole("model.norm", HIDDEN)
    whole("lm_head", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        whole(f"{block}.input_layernorm", HIDDEN)
        whole(f"{block}.post_attention_layernorm", HIDDEN)
        whole(f"{block}.block_sparse_moe.gate", EXPERTS, HIDDEN)
        int8(f"{block}.self_attn.q_proj", HIDDEN, HIDDEN)
        int8(f"{block}.self_attn.k_proj", narrow, HIDDEN)
        int8(f"{block}.self_attn.v_proj", narrow, HIDDEN)
        int8(f"{block}.self_attn.o_proj", HIDDEN, HIDDEN)
        for expert in range(EXPERTS):
            int8(f"{block}.block_sparse_moe.experts.{expert}.w1", INNER, HIDDEN)
            int8(f"{block}.block_sparse_moe.experts.{expert}.w2", HIDDEN, INNER)
            int8(f"{block}.block_sparse_moe.experts.{expert}.w3", INNER, HIDDEN)
    return expected


def test_mixtral_is_what_vllm_asks_for(saved: Saved) -> None:
    found = {n: (t.dtype, tuple(t.shape)) for n, t in tensors_of(saved("mixtral")).items()}
    assert found == what_vllm_asks_for_of_mixtral()


@pytest.mark.parametrize(
    "name",
    [name for name in MODELS if name not in ("gpt-oss", "granite-moe", "granite-moe-shared")],
)
def test_the_names_are_the_published_ones_with_a_scale_for_each_int8(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    """But for families whose experts are published in one."""
    MODELS[name]().save_pretrained(tmp_path)
    published, tensors = tensors_of(tmp_path), tensors_of(saved(name))
    int8 = {n for n, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert int8
    assert all(n.endswith(".weight") for n in int8)
    assert set(tensors) == set(published) | {f"{n}_scale" for n in int8}
    for key in int8:
        scale = tensors[f"{key}_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == (len(tensors[key]), 1)
        assert bool((scale > 0).all())
        assert scale.isfinite().all()
        # gpt2 keeps its matrices the other way round.
        assert sorted(tensors[key].shape) == sorted(published[key].shape)


@pytest.mark.parametrize("name", ["opt", "llama", "phi3", "gpt2", "mixtral", "qwen3-moe"])
def test_int8_times_scale_is_the_published_weight(name: str, saved: Saved, tmp_path: Path) -> None:
    """Rounded to nearest and not smoothed, it is half a step away at most: w1 is the gate."""
    MODELS[name]().save_pretrained(tmp_path / "float")
    haq.save_pretrained(quantize(name, smoothing="none"), tmp_path / "int8")
    published, tensors = tensors_of(tmp_path / "float"), tensors_of(tmp_path / "int8")
    for key, tensor in tensors.items():
        if key.endswith("_scale"):
            continue
        if tensor.dtype != torch.int8:
            assert torch.equal(tensor, published[key]), key
            continue
        scale = tensors[f"{key}_scale"].double()
        weight = published[key].double()
        weight = weight.T if name == "gpt2" else weight
        error = (tensor.double() * scale - weight).abs()
        assert bool((error <= scale * (0.5 + 1e-4)).all()), key


# --- transformers ---------------------------------------------------------------------------------


# It warns that it reads `dequantize` from what it was given and the rest from the checkpoint.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2", "gpt-neox"])
def test_transformers_dequantizes_a_dense_checkpoint(name: str, saved: Saved) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        saved(name), quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    model = quantized(name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    reference = MODELS[name]()
    state = {
        key: value for key, value in model.state_dict().items() if not key.endswith("weight_scale")
    }
    for path, layer in layers.items():
        state[f"{path}.weight"] = layer.weight.float() * layer.weight_scale
    reference.load_state_dict(state)
    assert layers
    theirs = loaded.state_dict()
    assert theirs.keys() == reference.state_dict().keys()
    torch.testing.assert_close(dict(theirs), dict(reference.state_dict()), rtol=0, atol=0)
    assert torch.equal(logits_of(loaded), logits_of(reference))
    # Their inputs are float, ours int8.
    error = relative_error(logits_of(model), logits_of(loaded))
    assert 0 < error < 0.05


# --- What llm-compressor writes -------------------------------------------------------------------

INT8_NAME = re.compile(r".*\.(([qkvo]|gate|up|down)_proj|w[123])\.weight")


def write_like_llm_compressor(model: PreTrainedModel, folder: Path, **changes: Any) -> None:
    """A bfloat16 checkpoint with the scheme "W8A8", by its rules and without haq."""
    model.save_pretrained(folder)
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        if INT8_NAME.fullmatch(name):
            scale = (tensor.abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
            integers = (tensor / scale.float()).round().clamp(-128, 127)
            tensors[name] = integers.to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    common = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer_kwargs": {},
    }
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": common | {"strategy": "channel", "dynamic": False, "observer": "minmax"},
                "input_activations": common
                | {"strategy": "token", "dynamic": True, "observer": None},
                "output_activations": None,
            }
        },
        "format": "int-quantized",
        "global_compression_ratio": 1.4,
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.9.4",
    } | changes
    (folder / "config.json").write_text(json.dumps(config))


class Reference(nn.Module):
    """The int8 product of one layer in float64, every token with a scale of its own."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.integers, self.scale, self.bias = weight.double(), scale.double(), bias

    def forward(self, x: Tensor) -> Tensor:
        token_scale = x.float().abs().amax(-1, keepdim=True) / 127
        rounded = (x.float() / token_scale).round().double()
        result = rounded @ self.integers.T * token_scale.double() * self.scale.T
        return (result if self.bias is None else result + self.bias.double()).to(x.dtype)


class ReferenceExperts(nn.Module):
    """Token by token."""

    def __init__(self, experts: list[dict[str, Reference]]) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for token, hidden in enumerate(hidden_states.split(1)):
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                parts = self.experts[expert]
                gated = functional.silu(parts["w1"](hidden)) * parts["w3"](hidden)
                total[token] += weight * parts["w2"](gated)[0]
        return total


def reference_of(model: PreTrainedModel, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The float32 model with what is on disk, its int8 layers replaced by `Reference`."""
    state = model.state_dict()
    floats = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items()}
    kept = {n: t.float() for n, t in floats.items() if n in state and t.dtype != torch.int8}
    model.load_state_dict(kept, strict=False)

    def product(name: str) -> Reference:
        bias = tensors.get(f"{name}.bias")
        return Reference(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], bias)

    for name in [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]:
        if f"{name}.weight_scale" in tensors:
            model.set_submodule(name, product(name))
    for layer in range(model.config.num_hidden_layers):
        owner = f"model.layers.{layer}.block_sparse_moe.experts"
        if f"{owner}.0.w1.weight_scale" in tensors:
            number = model.config.num_local_experts
            experts = [
                {w: product(f"{owner}.{e}.{w}") for w in ("w1", "w2", "w3")} for e in range(number)
            ]
            model.set_submodule(f"model.layers.{layer}.mlp.experts", ReferenceExperts(experts))
    return model


Written = tuple[PreTrainedModel, Path, dict[str, Tensor]]


@pytest.fixture(params=["llama", "mixtral"])
def written(
    request: pytest.FixtureRequest,
    tiny_llama: ModelFactory,
    tiny_mixtral: ModelFactory,
    tmp_path: Path,
) -> Written:
    """The float model, the directory of another tool, and what is in it."""
    if request.param == "llama":
        model = tiny_llama(attention_bias=True, mlp_bias=True)
    else:
        model = tiny_mixtral()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    write_like_llm_compressor(model, tmp_path / "other")
    tensors = tensors_of(tmp_path / "other")
    assert any(bool((t == -128).any()) for t in tensors.values() if t.dtype == torch.int8)
    return model, tmp_path / "other", tensors


def test_a_checkpoint_of_llm_compressor_computes_what_its_integers_say(written: Written) -> None:
    model, folder, tensors = written
    loaded = haq.from_pretrained(folder, dtype=torch.float32)
    dequantized = relative_error(logits_of(loaded), logits_of(model))
    assert 0.001 < dequantized < 0.1
    reference = reference_of(model, tensors)
    assert relative_error(logits_of(loaded), logits_of(reference)) < 1e-5


def test_a_checkpoint_of_llm_compressor_is_loaded_bit_for_bit(written: Written) -> None:
    _, folder, tensors = written
    loaded = haq.from_pretrained(folder)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, Int8Linear)}
    seen = set()
    for name, layer in layers.items():
        assert not layer.asymmetric
        parts = re.fullmatch(r"(.*)\.mlp\.experts\.(up|down)\.(\d+)", name)
        names = [name]
        if parts is not None:
            owner = f"{parts[1]}.block_sparse_moe.experts.{parts[3]}"
            names = [f"{owner}.{w}" for w in (("w1", "w3") if parts[2] == "up" else ("w2",))]
        weight = torch.cat([tensors[f"{n}.weight"] for n in names])
        scale = torch.cat([tensors[f"{n}.weight_scale"] for n in names])
        assert scale.dtype == torch.bfloat16
        assert torch.equal(layer.weight, weight), name
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.weight_scale, scale.float()), name
        if layer.bias is not None:
            assert layer.bias.dtype == torch.float32
            assert torch.equal(layer.bias, tensors[f"{name}.bias"].float()), name
        seen |= {f"{n}.weight" for n in names}
    assert seen == {n for n, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])


def test_a_checkpoint_of_llm_compressor_has_no_report_and_can_be_saved(
    written: Written, tmp_path: Path
) -> None:
    _, folder, tensors = written
    loaded = haq.from_pretrained(folder)
    with pytest.raises(ValueError, match="must have been quantized by haq"):
        haq.quantization_report(loaded)
    haq.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(logits_of(haq.from_pretrained(tmp_path / "again")), logits_of(loaded))
    again = tensors_of(tmp_path / "again")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name].double(), tensor.double()), name


def test_experts_that_another_tool_left_float(tiny_mixtral: ModelFactory, tmp_path: Path) -> None:
    """Which layers are int8 is what the files say."""
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "float")
    write_like_llm_compressor(model, tmp_path)
    tensors, floats = tensors_of(tmp_path), tensors_of(tmp_path / "float")
    first = "model.layers.0.block_sparse_moe.experts."
    for name in [n for n in tensors if n.startswith(first)]:
        del tensors[name]
    tensors |= {n: t.to(torch.bfloat16) for n, t in floats.items() if n.startswith(first)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = haq.from_pretrained(tmp_path, dtype=torch.float32)
    kinds = [type(loaded.model.layers[i].mlp.experts) for i in range(2)]
    assert kinds[0] is type(model.model.layers[0].mlp.experts)
    assert kinds[1] is Int8Experts
    ours, theirs = (m.model.layers[0].mlp.experts for m in (loaded, model))
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.to(torch.bfloat16).float()
        assert torch.equal(ours.get_parameter(name), parameter)
    reference = reference_of(model, tensors)
    assert relative_error(logits_of(loaded), logits_of(reference)) < 1e-5

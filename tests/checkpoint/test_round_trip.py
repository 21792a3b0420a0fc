"""`save_pretrained` and `from_pretrained`: the model that comes back is the one that was saved."""

import fnmatch
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import haq
from haq import Int8Linear, QuantizationConfig
from haq.quantization.report import find_report
from tests.architectures import (
    ARCHITECTURES,
    EXCLUDE,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    MIXTURES,
    token_ids,
)
from tests.conftest import REPOSITORY, ModelFactory

MODELS = ARCHITECTURES | MIXTURES
TRAINED = REPOSITORY / "examples" / "tiny_models"
CALIBRATION = [token_ids(2, 32, seed=seed) for seed in range(2)]
UNSEEN = token_ids(2, 20, seed=9)


def quantize(model: PreTrainedModel, *exclude: str, **options: Any) -> PreTrainedModel:
    options = {"rounding": "nearest", "smoothing": "fixed"} | options
    config = QuantizationConfig(exclude=("lm_head", *exclude), **options)
    ids = [batch % model.config.vocab_size for batch in CALIBRATION]
    return haq.quantize_model(model, ids, config, progress=False)


@functools.cache
def quantized(name: str) -> PreTrainedModel:
    """To be looked at, saved and called only."""
    return quantize(MODELS[name](), *EXCLUDE.get(name, ()))


def in_bfloat16(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """As `transformers` loads it: what is computed from the configuration stays float32."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.bfloat16)


def logits_of(model: PreTrainedModel, ids: Tensor = UNSEEN) -> Tensor:
    with torch.no_grad():
        return model(ids % model.config.vocab_size).logits


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}


def floats_of(model: nn.Module) -> dict[str, Tensor]:
    """All of the state that is in no int8 layer."""
    inside = tuple(f"{name}." for name in int8_layers(model))
    return {n: t for n, t in model.state_dict().items() if not n.startswith(inside)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """Every bit of the state, its dtypes, and all that is no tensor."""
    assert type(loaded) is type(model)
    assert not loaded.training
    state, other = model.state_dict(), loaded.state_dict()
    assert list(other) == list(state)
    torch.testing.assert_close(other, state, rtol=0, atol=0)
    flags, other_flags = (
        {n: m.asymmetric for n, m in int8_layers(m).items()} for m in (model, loaded)
    )
    assert flags
    assert other_flags == flags
    reports = [haq.quantization_report(m).to_dict() for m in (loaded, model)]
    assert reports[0] == reports[1]


def round_trip(model: PreTrainedModel, folder: Path, **options: Any) -> PreTrainedModel:
    haq.save_pretrained(model, folder, **options)
    loaded = haq.from_pretrained(folder)
    assert_same(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    return loaded


# --- Every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_was_saved_comes_back(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    loaded = round_trip(model, tmp_path / "int8")
    prompt, options = UNSEEN[:, :6], {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("name", MODELS)
def test_the_loaded_model_saves_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second, third = (tmp_path / n for n in ("first", "second", "third"))
    haq.save_pretrained(quantized(name), first)
    haq.save_pretrained(quantized(name), second)
    assert contents(second) == contents(first)
    haq.save_pretrained(haq.from_pretrained(first), third)
    assert contents(third) == contents(first)


def test_some_inputs_have_zero_points_and_some_do_not() -> None:
    """Else the flags that come back say nothing."""
    for name in ("opt", "llama", "mixtral", "deepseek-v3"):
        flags = [layer.asymmetric for layer in int8_layers(quantized(name)).values()]
        assert 0 < sum(flags) < len(flags)


@pytest.mark.parametrize("name", ["opt", "gpt2", "mixtral", "gpt-oss", "nemotron-h"])
def test_the_loaded_model_is_independent_of_the_files(name: str, tmp_path: Path) -> None:
    haq.save_pretrained(quantized(name), tmp_path / "int8")
    loaded = haq.from_pretrained(tmp_path / "int8")
    for file in (tmp_path / "int8").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(logits_of(loaded), logits_of(quantized(name)))


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_saving_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    before, config = logits_of(model), model.config.to_dict()
    haq.save_pretrained(model, tmp_path / "int8")
    assert torch.equal(logits_of(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", ["opt-python", "mixtral-python"])
def test_trained_models(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TRAINED / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TRAINED / name)
    ids = tokenizer("def read(path):\n    with open(path) as file:\n", return_tensors="pt")
    quantize(model)
    loaded = round_trip(model, tmp_path / "int8", tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(**ids, **options), model.generate(**ids, **options))


# --- Heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_tied_head_is_one_tensor_on_disk_and_in_memory(
    name: str, tiny_llama: ModelFactory, tiny_opt: ModelFactory, tmp_path: Path
) -> None:
    build = {"opt": tiny_opt, "llama": tiny_llama}[name]
    loaded = round_trip(quantize(build(tie_word_embeddings=True)), tmp_path / "int8")
    assert "lm_head.weight" not in stored(tmp_path / "int8")
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is embedding.weight
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


def test_an_untied_head_is_two_tensors(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    model = quantize(tiny_llama(tie_word_embeddings=False))
    loaded = round_trip(model, tmp_path / "int8")
    tensors = stored(tmp_path / "int8")
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()


# --- Dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str, tmp_path: Path) -> None:
    model = in_bfloat16(MODELS[name](), tmp_path / "float")
    quantize(model, *EXCLUDE.get(name, ()))
    dtypes = {key: tensor.dtype for key, tensor in floats_of(model).items()}
    assert torch.bfloat16 in dtypes.values()
    loaded = round_trip(model, tmp_path / "int8")
    assert {key: tensor.dtype for key, tensor in floats_of(loaded).items()} == dtypes
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["dtype"] == "bfloat16"
    for layer in int8_layers(loaded).values():
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias is None or layer.bias.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_dtype_to_load_in(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What is float has the dtype that `transformers` gives it; int8 layers keep every bit."""
    MODELS[name]().save_pretrained(tmp_path / "float")
    original = type(quantized(name)).from_pretrained(tmp_path / "float", dtype=dtype)
    dtypes = {key: tensor.dtype for key, tensor in original.state_dict().items()}
    haq.save_pretrained(quantized(name), tmp_path / "int8")
    loaded = haq.from_pretrained(tmp_path / "int8", dtype=dtype)

    assert loaded.dtype == loaded.config.dtype == dtype
    expected, floats = floats_of(quantized(name)), floats_of(loaded)
    assert floats.keys() == expected.keys()
    differing = {
        key: (tensor.dtype, dtypes[key])
        for key, tensor in floats.items()
        if tensor.dtype != dtypes[key]
    }
    assert differing == {}
    for key, tensor in floats.items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
    layers = int8_layers(loaded)
    for key, layer in int8_layers(quantized(name)).items():
        torch.testing.assert_close(
            layers[key].state_dict(), layer.state_dict(), rtol=0, atol=0, msg=key
        )
        assert layers[key].weight_scale.dtype == torch.float32
    assert logits_of(loaded).isfinite().all()


# --- Files ----------------------------------------------------------------------------------------


def test_what_a_directory_holds(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TRAINED / "opt-python")
    haq.save_pretrained(quantized("opt"), tmp_path / "int8", tokenizer)
    expected = {"config.json", "generation_config.json", "haq.json", "model.safetensors"}
    names = set(contents(tmp_path / "int8"))
    assert names == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_shards(name: str, tmp_path: Path) -> None:
    folder, limit = tmp_path / "int8", 20_000
    loaded = round_trip(quantized(name), folder, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            found |= dict.fromkeys(handle.keys(), file.name)
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        assert size <= limit
        total += size
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total
    # In one file the tensors are the same.
    haq.save_pretrained(quantized(name), tmp_path / "whole")
    torch.testing.assert_close(stored(tmp_path / "whole"), stored(folder), rtol=0, atol=0)
    haq.save_pretrained(loaded, tmp_path / "again", max_shard_size="20KB")
    assert contents(tmp_path / "again") == contents(folder)


def test_a_tensor_larger_than_a_shard(tmp_path: Path) -> None:
    round_trip(quantized("opt"), tmp_path / "int8", max_shard_size="1KB")
    largest = max(tensor.nbytes for tensor in stored(tmp_path / "int8").values())
    assert largest > 1000


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TRAINED / "opt-python")
    haq.save_pretrained(quantized("opt"), tmp_path / "int8", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "int8")
    text = "def größe(x):\n    return x ** 2\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_the_generation_config_goes_along(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    model = quantize(tiny_llama())
    given = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=7, max_new_tokens=5, eos_token_id=[4, 9]
    )
    model.generation_config = given
    loaded = round_trip(model, tmp_path / "int8")
    on_disk = GenerationConfig.from_pretrained(tmp_path / "int8")
    for config in (loaded.generation_config, on_disk):
        assert config.to_diff_dict() == given.to_diff_dict()
        assert (config.temperature, config.top_k, config.eos_token_id) == (0.3, 7, [4, 9])


def test_what_the_configuration_says_stays(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    model = quantize(tiny_llama(rms_norm_eps=3e-4, max_position_embeddings=77))
    loaded = round_trip(model, tmp_path / "int8")
    before, after = model.config.to_dict(), loaded.config.to_dict()
    differing = {key for key in before | after if before.get(key) != after.get(key)}
    assert differing <= {"_name_or_path", "architectures", "dtype"}
    assert (loaded.config.rms_norm_eps, loaded.config.max_position_embeddings) == (3e-4, 77)
    assert loaded.config.name_or_path == str(tmp_path / "int8")
    assert loaded.config.architectures == ["LlamaForCausalLM"]


def test_a_report_that_is_missing_is_missing_after_loading(tmp_path: Path) -> None:
    haq.save_pretrained(quantized("opt"), tmp_path / "int8")
    notes = json.loads((tmp_path / "int8" / "haq.json").read_text())
    notes["report"] = None
    (tmp_path / "int8" / "haq.json").write_text(json.dumps(notes))
    loaded = haq.from_pretrained(tmp_path / "int8")
    assert find_report(loaded) is None
    haq.save_pretrained(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "haq.json").read_text())["report"] is None
    assert torch.equal(logits_of(loaded), logits_of(quantized("opt")))


# --- What stays float -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("opt", "*.fc2"),
        ("gpt2", "*.c_attn"),
        ("llama", "model.layers.0"),
        ("phi3", "*.gate_up_proj"),
        ("mixtral", "*.mlp.experts"),
        ("mixtral", "model.layers.1.mlp.experts"),
        ("mixtral", "*.self_attn"),
        ("gpt-oss", "*.mlp.experts"),
        ("granite-moe", "*.experts"),
        ("nemotron-h", "*.experts"),
    ],
)
def test_excluded_layers_stay_float(name: str, pattern: str, tmp_path: Path) -> None:
    before = MODELS[name]()
    before.save_pretrained(tmp_path / "float")
    published = stored(tmp_path / "float")
    model = quantize(MODELS[name](), pattern, smoothing="none")
    loaded = round_trip(model, tmp_path / "int8")
    excluded = [n for n, _ in before.named_modules() if fnmatch.fnmatchcase(n, pattern)]
    assert excluded
    inside = tuple(f"{n}." for n in excluded)
    layers = {n for n in int8_layers(quantized(name)) if not f"{n}.".startswith(inside)}
    assert set(int8_layers(loaded)) == layers
    # Without smoothing nothing that stays float changes, in memory and on disk.
    floats, state = floats_of(loaded), before.state_dict()
    torch.testing.assert_close(floats, {key: state[key] for key in floats}, rtol=0, atol=0)
    tensors = stored(tmp_path / "int8")
    kept = {n: t for n, t in tensors.items() if n in published and t.dtype == torch.float32}
    torch.testing.assert_close(kept, {n: published[n] for n in kept}, rtol=0, atol=0)


def test_excluded_experts_have_their_published_names(tmp_path: Path) -> None:
    model = quantize(MIXTURES["mixtral"](), "*.mlp.experts")
    round_trip(model, tmp_path / "int8")
    tensors = stored(tmp_path / "int8")
    shapes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    expected = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{matrix}.weight": (torch.float32, shape)
        for i in range(LAYERS)
        for e in range(EXPERTS)
        for matrix, shape in shapes.items()
    }
    found = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items() if ".experts." in n}
    assert found == expected


@pytest.mark.parametrize("place", [".", "link"])
def test_an_empty_directory_by_another_name(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty" if place == "." else tmp_path)
    haq.save_pretrained(quantized("llama"), place)
    loaded = haq.from_pretrained(tmp_path / "empty")
    assert torch.equal(logits_of(loaded), logits_of(quantized("llama")))

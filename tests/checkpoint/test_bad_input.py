"""What is damaged, of another method or in the way is refused, and the disk stays as it was."""

import hashlib
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import haq
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CALIBRATION = [token_ids(2, 32, seed=seed) for seed in range(4)]
IDS = token_ids(2, 16, seed=9)

LAYER = "model.layers.1.mlp.down_proj"
HEAD = "lm_head"
NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"

Json = dict[str, Any]


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    config = haq.QuantizationConfig(rounding="nearest", smoothing="none")
    ids = [batch % model.config.vocab_size for batch in CALIBRATION]
    return haq.quantize_model(model, ids, config, progress=False)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """An int8 Llama, to be looked at, saved and called only."""
    return quantized(ARCHITECTURES["llama"]())


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in several files, to be copied only."""
    folder = tmp_path_factory.mktemp("saved")
    int8 = {
        "llama": model,
        "mixtral": quantized(MIXTURES["mixtral"]()),
        "opt": quantized(ARCHITECTURES["opt"]()),
    }
    for name, one in int8.items():
        haq.save_pretrained(one, folder / name, max_shard_size="20KB")
        assert len(shards(folder / name)) >= 3
    return {name: folder / name for name in int8}


@pytest.fixture
def llama(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Llama, to be damaged."""
    return copy_of(saved["llama"], tmp_path)


@pytest.fixture
def mixtral(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Mixtral, to be damaged."""
    return copy_of(saved["mixtral"], tmp_path)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / f"{folder.name}-int8"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def shard_of(folder: Path, tensor: str) -> Path:
    name = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    return folder / str(name)


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file below; what is no file is only named."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def refused(folder: Path, *named: object, kind: type[Exception] = ValueError) -> str:
    """The message with which the checkpoint is refused; it names all of ``named``."""
    with unchanged(folder.parent), pytest.raises(kind) as caught:
        haq.from_pretrained(folder)
    assert caught.type is kind
    message = str(caught.value)
    for name in named:
        assert str(name) in message
    return message


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def edit_json(file: Path, change: Callable[[Json], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit(folder: Path, tensor: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """Put another tensor in the place of one, or none, in the index as well; returns its file."""
    file = shard_of(folder, tensor)
    tensors = load_file(file)
    changed = change(tensors.pop(tensor))
    if changed is None:
        edit_json(folder / INDEX, lambda index: index["weight_map"].pop(tensor))
    else:
        tensors[tensor] = changed.contiguous()
    save_file(tensors, file, {"format": "pt"})
    return file


def add(folder: Path, **tensors: Tensor) -> Path:
    """Tensors in a file of their own, and in the index."""
    file = folder / "more.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, file)
    names = dict.fromkeys((name.replace("__", ".") for name in tensors), file.name)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(names))
    return file


def gone(tensor: Tensor) -> None:
    return None


def header_length(raw: bytes) -> int:
    return 8 + int(struct.unpack("<Q", raw[:8])[0])


class Creates:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


# --- The checkpoints themselves -------------------------------------------------------------------


def test_undamaged_they_load(saved: dict[str, Path], model: PreTrainedModel) -> None:
    for folder in saved.values():
        with unchanged(folder.parent):
            loaded = haq.from_pretrained(folder)
        if folder.name == "llama":
            assert torch.equal(logits_of(loaded), logits_of(model))


# --- Arguments ------------------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "nowhere", kind=FileNotFoundError)
    (tmp_path / "file").write_text("not a directory")
    refused(tmp_path / "file", tmp_path / "file", kind=FileNotFoundError)


def test_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", kind=FileNotFoundError)


@pytest.mark.parametrize("memory", ["16 elephants", "", 0, -1])
def test_memory_of_no_size(llama: Path, memory: str | int) -> None:
    with unchanged(llama), pytest.raises(ValueError, match="`gpu_memory` must be a size"):
        haq.from_pretrained(llama, gpu_memory=memory)


@pytest.mark.parametrize("memory", [True, 1.5, b"8GB"])
def test_memory_of_another_type(llama: Path, memory: Any) -> None:
    with unchanged(llama), pytest.raises(TypeError, match="`gpu_memory` must be a string"):
        haq.from_pretrained(llama, gpu_memory=memory)


def test_memory_in_two_tiers_is_for_mixtures_of_experts(llama: Path) -> None:
    with unchanged(llama), pytest.raises(ValueError, match="must be a mixture of experts"):
        haq.from_pretrained(llama, device="cpu", gpu_memory="8GB")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16", float])
def test_a_dtype_that_is_no_float_of_torch(llama: Path, dtype: Any) -> None:
    with unchanged(llama), pytest.raises(TypeError, match="`dtype`"):
        haq.from_pretrained(llama, dtype=dtype)


# --- Other methods --------------------------------------------------------------------------------


def test_a_float_checkpoint(tmp_path: Path) -> None:
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "float")
    message = refused(tmp_path / "float", tmp_path / "float" / "config.json")
    assert "quantize_model" in message


def group(entry: Json, part: str) -> Json:
    found: Json = entry["config_groups"]["group_0"][part]
    return found


OTHERS: dict[str, tuple[Callable[[Json], object], str]] = {
    "gptq": (lambda e: (e.clear(), e.update(quant_method="gptq", bits=8)), "'gptq'"),
    "no method": (lambda e: e.pop("quant_method"), "quant_method"),
    "no groups": (lambda e: e.update(config_groups={}), "config_groups"),
    "a list of groups": (lambda e: e.update(config_groups=[1]), "config_groups"),
    "a group of nothing": (lambda e: e["config_groups"].update(group_0=None), "weights"),
    "a second group": (
        lambda e: e["config_groups"].update(group_1={"weights": None}),
        "weights of group_1",
    ),
    "4 bits": (lambda e: group(e, "weights").update(num_bits=4), "weights.num_bits"),
    "float8": (lambda e: group(e, "weights").update(type="float"), "weights.type"),
    "float inputs": (
        lambda e: e["config_groups"]["group_0"].update(input_activations=None),
        "input_activations",
    ),
    "static inputs": (
        lambda e: group(e, "input_activations").update(dynamic=False),
        "input_activations.dynamic",
    ),
    "inputs per tensor": (
        lambda e: group(e, "input_activations").update(strategy="tensor"),
        "input_activations.strategy",
    ),
    "asymmetric inputs": (
        lambda e: group(e, "input_activations").update(symmetric=False),
        "input_activations.symmetric",
    ),
    "asymmetric weights": (
        lambda e: group(e, "weights").update(symmetric=False),
        "weights.symmetric",
    ),
    "weights in groups": (
        lambda e: group(e, "weights").update(strategy="group", group_size=16),
        "weights.strategy",
    ),
    "packed": (lambda e: e.update(format="pack-quantized"), "pack-quantized"),
    "outputs": (
        lambda e: e["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
        "output_activations",
    ),
    "a packed group": (
        lambda e: e["config_groups"]["group_0"].update(format="pack-quantized"),
        "pack-quantized",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_method(name: str, llama: Path) -> None:
    change, named = OTHERS[name]
    edit_json(llama / "config.json", lambda config: change(config["quantization_config"]))
    refused(llama, llama / "config.json", named)


def test_an_entry_that_is_no_object(llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(quantization_config="int8"))
    refused(llama, llama / "config.json", "'int8'")


# --- Files ----------------------------------------------------------------------------------------


def test_a_missing_shard(llama: Path) -> None:
    for file in shards(llama):
        raw = file.read_bytes()
        file.unlink()
        message = refused(llama, file, INDEX, kind=FileNotFoundError)
        assert any(f"`{name}`" in message for name in load_names(raw))
        file.write_bytes(raw)
    haq.from_pretrained(llama)


def load_names(raw: bytes) -> list[str]:
    return [n for n in json.loads(raw[8 : header_length(raw)]) if n != "__metadata__"]


def test_a_shard_that_was_cut_short(llama: Path) -> None:
    for file in shards(llama):
        raw = file.read_bytes()
        start = header_length(raw)
        inside = [0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(raw) // 2]
        for length in [*inside, len(raw) - 1]:
            file.write_bytes(raw[:length])
            assert "cut short" in refused(llama, file)
        file.write_bytes(raw + b"\0")
        refused(llama, file)
        file.write_bytes(raw)
    haq.from_pretrained(llama)


def attempt(folder: Path) -> tuple[PreTrainedModel | None, str]:
    try:
        return haq.from_pretrained(folder), ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_flipped_bits_in_a_header(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Every bit of the length, and of the rest some in the places of all kinds of things."""
    folder, random = copy_of(saved[name], tmp_path), Random(0)
    right = logits_of(haq.from_pretrained(folder))
    harmless, refusals = 0, 0
    for file in shards(folder):
        raw = file.read_bytes()
        places = [*range(8), *sorted(random.sample(range(8, header_length(raw)), 60))]
        for place in places:
            for bit in range(8) if place < 8 else [random.randrange(8)]:
                flipped = bytearray(raw)
                flipped[place] ^= 1 << bit
                file.write_bytes(flipped)
                loaded, message = attempt(folder)
                if loaded is None:
                    assert str(file) in message
                    refusals += 1
                else:
                    assert torch.equal(logits_of(loaded), right), (place, bit)
                    harmless += 1
                assert file.read_bytes() == flipped
        file.write_bytes(raw)
    print(name, refusals, "refused,", harmless, "harmless")
    assert refusals > 100 * len(shards(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}", "[" * 100_000, "nonsense", '"a"'])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "haq.json", INDEX])
def test_a_file_that_holds_no_object(name: str, text: str, llama: Path) -> None:
    (llama / name).write_text(text)
    refused(llama, llama / name)


def test_a_file_that_is_no_text(llama: Path) -> None:
    for name in ("config.json", "generation_config.json", "haq.json", INDEX):
        raw = (llama / name).read_bytes()
        (llama / name).write_bytes(b"\xff\xfe" + raw)
        refused(llama, llama / name)
        (llama / name).write_bytes(raw)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map(weight_map: Any, llama: Path) -> None:
    edit_json(llama / INDEX, lambda index: index.update(weight_map=weight_map))
    refused(llama, llama / INDEX, "weight_map")
    edit_json(llama / INDEX, lambda index: index.pop("weight_map"))
    refused(llama, llama / INDEX, "weight_map")


OUTSIDE = ["../x.safetensors", "sub/x.safetensors", "./x.safetensors", "/etc/passwd", "ABSOLUTE"]


@pytest.mark.parametrize("to", [*OUTSIDE, "..", ".", "", "x\0", None, 3, ["x.safetensors"]])
def test_an_index_that_leads_out_of_the_directory(to: Any, llama: Path) -> None:
    # All that it leads to is there and would do.
    for place in (llama.parent, llama / "sub", llama):
        place.mkdir(exist_ok=True)
        shutil.copy(shard_of(llama, NORM), place / "x.safetensors")
    to = str(llama.parent / "x.safetensors") if to == "ABSOLUTE" else to
    edit_json(llama / INDEX, lambda index: index["weight_map"].update({NORM: to}))
    message = refused(llama, llama / INDEX, NORM)
    assert "beside it" in message


def test_an_index_with_a_name_that_is_not_in_the_file(llama: Path) -> None:
    other = next(file for file in shards(llama) if file != shard_of(llama, NORM))
    edit_json(llama / INDEX, lambda index: index["weight_map"].update({NORM: other.name}))
    refused(llama, other, NORM)


def test_an_index_that_leads_to_another_kind_of_file(llama: Path) -> None:
    edit_json(llama / INDEX, lambda index: index["weight_map"].update({NORM: "config.json"}))
    refused(llama, llama / "config.json")


def test_a_file_without_tensors(llama: Path) -> None:
    (llama / INDEX).unlink()
    for file in shards(llama):
        file.unlink()
    save_file({}, llama / SINGLE)
    refused(llama, llama / SINGLE, "model.embed_tokens.weight")


@pytest.mark.parametrize("where", ["alone", "in the index", "under another name", "alone as .pt"])
def test_nothing_is_unpickled(where: str, llama: Path) -> None:
    index = json.loads((llama / INDEX).read_text())
    for file in [llama / INDEX, *shards(llama)]:
        file.unlink()
    names = {"alone as .pt": "model.pt", "under another name": SINGLE}
    file = llama / names.get(where, "pytorch_model.bin")
    file.write_bytes(pickle.dumps(Creates(llama / "created")))
    if where == "in the index":
        index["weight_map"] = dict.fromkeys(index["weight_map"], file.name)
        (llama / INDEX).write_text(json.dumps(index))
    message = refused(
        llama, file.name, kind=FileNotFoundError if where.startswith("alone") else ValueError
    )
    assert str(llama) in message
    assert ("to be unpickled" in message) == where.startswith("alone")
    assert not (llama / "created").exists()
    pickle.loads(file.read_bytes())
    assert (llama / "created").exists()  # As it would have been.


# --- Configurations -------------------------------------------------------------------------------


def test_no_configuration(llama: Path) -> None:
    (llama / "config.json").unlink()
    refused(llama, llama / "config.json", kind=FileNotFoundError)


NO_CLASS = [[], None, [3], ["NoSuchForCausalLM"], ["AutoTokenizer"], ["logging"]]
NO_LIST = ["LlamaForCausalLM", ["LlamaForCausalLM", "LlamaModel"]]


@pytest.mark.parametrize("classes", [*NO_CLASS, *NO_LIST])
def test_a_class_that_transformers_does_not_have(classes: Any, llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(architectures=classes))
    refused(llama, llama / "config.json")


@pytest.mark.parametrize(
    "damage",
    [
        {"model_type": "no-such-type"},
        {"model_type": None},
        {"hidden_act": "no-such-function"},
        {"hidden_size": 30},
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"dtype": "dloat32"},
        {"initializer_range": 8.0},
        {"vocab_size": -5},
    ],
    ids=str,
)
def test_a_configuration_of_no_model(damage: Json, llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(damage))
    refused(llama, llama / "config.json")


def test_a_configuration_of_another_model(llama: Path) -> None:
    edit_json(llama / "config.json", lambda config: config.update(intermediate_size=64))
    refused(llama, *shards(llama)[:1], "model.layers.0.mlp.gate_proj.weight", "int8 [64, 32]")
    edit_json(llama / "config.json", lambda config: config.update(intermediate_size=48))
    haq.from_pretrained(llama)
    edit_json(llama / "config.json", lambda config: config.update(num_hidden_layers=3))
    refused(llama, *shards(llama), "model.layers.2.")
    edit_json(llama / "config.json", lambda config: config.update(num_hidden_layers=1))
    refused(llama, llama / "config.json", "model.layers.1.")


@pytest.mark.parametrize("known", [True, False], ids=["a known type", "an unknown type"])
def test_code_beside_the_checkpoint_is_not_run(
    known: bool, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("it asks whether to run it")

    monkeypatch.setattr("builtins.input", asked)
    (llama / "theirs.py").write_text(f"open({str(llama / 'created')!r}, 'w')\nclass Config: ...\n")
    kind = "llama" if known else "theirs"
    theirs = {"AutoConfig": "theirs.Config"}
    edit_json(llama / "config.json", lambda c: c.update(model_type=kind, auto_map=theirs))
    with unchanged(llama):
        if known:
            haq.from_pretrained(llama)
        else:
            refused(llama, llama / "config.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_of_our_own_file(version: Any, llama: Path) -> None:
    edit_json(llama / "haq.json", lambda notes: notes.update(format=version))
    refused(llama, llama / "haq.json", repr(version))


NOTES: dict[str, Callable[[Json], object]] = {
    "no version": lambda n: n.pop("format"),
    "no asymmetric": lambda n: n.pop("asymmetric"),
    "asymmetric is nothing": lambda n: n.update(asymmetric=None),
    "asymmetric is text": lambda n: n.update(asymmetric=LAYER),
    "asymmetric holds no names": lambda n: n.update(asymmetric=[["a"], 3]),
    "no such layer": lambda n: n["asymmetric"].append("model.layers.7.mlp.down_proj"),
    "not an int8 layer": lambda n: n["asymmetric"].append(HEAD),
    "a layer twice": lambda n: n["asymmetric"].append(n["asymmetric"][0]),
    "report is text": lambda n: n.update(report="none"),
    "report is empty": lambda n: n.update(report={}),
    "report lacks blocks": lambda n: n["report"].pop("blocks"),
    "report has more": lambda n: n["report"].update(more=1),
    "report of another configuration": lambda n: n["report"]["config"].update(rounding="up"),
    "a layer has more": lambda n: n["report"]["blocks"][0]["layers"][0].update(more=1),
}


@pytest.mark.parametrize("name", NOTES)
def test_our_own_file_damaged(name: str, llama: Path) -> None:
    edit_json(llama / "haq.json", NOTES[name])
    refused(llama, llama / "haq.json")


# --- Tensors --------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "weight as float": (f"{LAYER}.weight", lambda t: t.float(), "int8"),
    "weight as bfloat16": (f"{LAYER}.weight", lambda t: t.bfloat16(), "int8"),
    "weight as uint8": (f"{LAYER}.weight", lambda t: t.view(torch.uint8), "int8"),
    "weight as int32": (f"{LAYER}.weight", lambda t: t.int(), "int8"),
    "weight as float8": (f"{LAYER}.weight", lambda t: t.view(torch.float8_e4m3fn), "int8"),
    "scale as int32": (f"{LAYER}.weight_scale", lambda t: t.view(torch.int32), "float"),
    "scale as int8": (f"{LAYER}.weight_scale", lambda t: t.to(torch.int8), "float"),
    "scale as float8": (f"{LAYER}.weight_scale", lambda t: t.to(torch.float8_e4m3fn), "float"),
    "norm as int8": (NORM, lambda t: t.to(torch.int8), "float"),
    "weight transposed": (f"{LAYER}.weight", lambda t: t.T, "[32, 48]"),
    "weight too short": (f"{LAYER}.weight", lambda t: t[:-1], "[32, 48]"),
    "weight flat": (f"{LAYER}.weight", lambda t: t.reshape(-1), "[32, 48]"),
    "scale flat": (f"{LAYER}.weight_scale", lambda t: t.reshape(-1), "[32, 1]"),
    "scale of a tensor": (f"{LAYER}.weight_scale", lambda t: t[:1], "[32, 1]"),
    "scales of groups": (f"{LAYER}.weight_scale", lambda t: t.repeat(1, 3), "[32, 1]"),
    "norm too long": (NORM, lambda t: t.repeat(2), "[32]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_of_the_wrong_kind(name: str, llama: Path) -> None:
    tensor, change, expected = WRONG[name]
    file = edit(llama, tensor, change)
    refused(llama, f"`{tensor}`", f"`{file}`", f"must be {expected}" if "[" not in expected else "")
    refused(llama, expected, "got")


@pytest.mark.parametrize("leaf", ["weight", "weight_scale"])
def test_a_tensor_of_the_wrong_kind_of_an_expert(leaf: str, mixtral: Path) -> None:
    tensor = f"{EXPERT}.{leaf}"
    file = edit(mixtral, tensor, lambda t: t.float() if t.dtype == torch.int8 else t.int())
    refused(mixtral, f"`{tensor}`", f"`{file}`", "int8" if leaf == "weight" else "float")


@pytest.mark.parametrize("tensor", [f"{LAYER}.weight_scale", f"{LAYER}.weight", NORM])
def test_a_missing_tensor(tensor: str, llama: Path) -> None:
    edit(llama, tensor, gone)
    refused(llama, f"`{tensor}`", *shards(llama))


@pytest.mark.parametrize("leaf", ["weight", "weight_scale"])
def test_a_missing_tensor_of_an_expert(leaf: str, mixtral: Path) -> None:
    edit(mixtral, f"{EXPERT}.{leaf}", gone)
    refused(mixtral, f"`{EXPERT}.{leaf}`", *shards(mixtral))


def test_a_missing_expert(mixtral: Path) -> None:
    for matrix in ("w1", "w2", "w3"):
        for leaf in ("weight", "weight_scale"):
            edit(mixtral, f"{EXPERT[:-3]}.{matrix}.{leaf}", gone)
    refused(mixtral, f"`{EXPERT[:-3]}.w1.weight`", *shards(mixtral))


@pytest.mark.parametrize("layer", [LAYER, HEAD])
def test_a_zero_point(layer: str, llama: Path) -> None:
    points = {f"{layer}.weight_zero_point": torch.zeros(32, 1, dtype=torch.int8)}
    file = add(llama, **points)
    refused(llama, f"`{layer}.weight_zero_point`", f"`{file}`", "symmetric")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.01, 0.0])
def test_a_scale_that_is_none(value: float, llama: Path) -> None:
    def change(scale: Tensor) -> Tensor:
        scale[5] = value
        return scale

    file = edit(llama, f"{LAYER}.weight_scale", change)
    refused(llama, f"`{LAYER}.weight_scale`", f"`{file}`", "finite and positive", "got")


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_scale_that_is_none_of_an_expert(value: float, mixtral: Path) -> None:
    file = edit(mixtral, f"{EXPERT}.weight_scale", lambda scale: scale.fill_(value))
    refused(mixtral, f"`{EXPERT}.weight_scale`", f"`{file}`", f"got {value}")


def test_a_scale_that_is_too_large_for_float32(llama: Path) -> None:
    file = edit(llama, f"{LAYER}.weight_scale", lambda scale: scale.double() * 1e300)
    refused(llama, f"`{LAYER}.weight_scale`", f"`{file}`", "got inf")


def test_a_bias_that_is_not_finite(saved: dict[str, Path], tmp_path: Path) -> None:
    opt, bias = copy_of(saved["opt"], tmp_path), "model.decoder.layers.0.fc1.bias"
    bias = next(
        name for name in json.loads((opt / INDEX).read_text())["weight_map"] if name.endswith(bias)
    )
    edit(opt, bias, lambda values: values - 1)
    haq.from_pretrained(opt)
    file = edit(opt, bias, lambda values: values.fill_(math.nan))
    refused(opt, f"`{bias}`", f"`{file}`", "finite", "got nan")


def test_tensors_that_belong_to_nothing_are_named_and_left(
    llama: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    add(llama, other__weight=torch.ones(2), other__bias=torch.ones(2, dtype=torch.int64))
    with unchanged(llama):
        loaded = haq.from_pretrained(llama)
    assert torch.equal(logits_of(loaded), logits_of(model))
    (record,) = [r for r in caplog.records if r.name.startswith("haq")]
    assert record.levelname == "WARNING"
    assert "2 tensors" in record.message
    assert "other.bias, other.weight" in record.message


def test_of_many_that_belong_to_nothing_some_are_named(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(llama, **{f"other.{i}": torch.ones(1) for i in range(9)})
    haq.from_pretrained(llama)
    (record,) = [r for r in caplog.records if r.name.startswith("haq")]
    assert "9 tensors" in record.message
    assert "other.0, other.1, other.2, other.3, other.4, ..." in record.message


# --- Saving ---------------------------------------------------------------------------------------


@contextmanager
def nothing_written(folder: Path, *named: object, kind: type[BaseException]) -> Iterator[None]:
    """It fails, names what it must, and all in ``folder`` is as before."""
    with unchanged(folder):
        with pytest.raises(kind) as caught:
            yield
        for name in named:
            assert str(name) in str(caught.value)


@pytest.mark.parametrize("thing", [None, "model", {}, torch.nn.Linear(2, 2)], ids=repr)
def test_what_is_no_model(thing: Any, tmp_path: Path) -> None:
    with nothing_written(tmp_path, type(thing).__name__, kind=TypeError):
        haq.save_pretrained(thing, tmp_path / "out")


def test_a_float_model(tmp_path: Path) -> None:
    with nothing_written(tmp_path, "quantize_model", kind=ValueError):
        haq.save_pretrained(ARCHITECTURES["llama"](), tmp_path / "out")


@pytest.mark.parametrize("inside", ["file", ".hidden", "folder/file"])
def test_a_directory_that_holds_something(
    inside: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / inside).parent.mkdir(parents=True, exist_ok=True)
    (out / inside).write_text("precious")
    with nothing_written(tmp_path, out, kind=FileExistsError):
        haq.save_pretrained(model, out)
    assert (out / inside).read_text() == "precious"


def test_a_checkpoint_is_not_written_over(model: PreTrainedModel, llama: Path) -> None:
    with nothing_written(llama.parent, llama, kind=FileExistsError):
        haq.save_pretrained(model, llama)


def test_a_path_that_is_a_file(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with nothing_written(tmp_path, tmp_path / "out", kind=FileExistsError):
        haq.save_pretrained(model, tmp_path / "out")
    with nothing_written(tmp_path, tmp_path / "out", kind=OSError):
        haq.save_pretrained(model, tmp_path / "out" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written_to(model: PreTrainedModel, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with nothing_written(tmp_path, "out", kind=PermissionError):
            haq.save_pretrained(model, tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place that nobody writes to")
def test_a_parent_that_nobody_can_write_to(model: PreTrainedModel) -> None:
    with pytest.raises(OSError, match="haq-int8"):
        haq.save_pretrained(model, "/proc/haq-int8")
    assert not Path("/proc/haq-int8").exists()


@pytest.mark.parametrize("device", ["cdua", "cuda:99", torch.device("cuda", 99)])
def test_a_device_that_is_not_there(device: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`device` must be one that torch can use here"):
        haq.from_pretrained(saved["llama"], device=device)
    ARCHITECTURES["llama"]().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="`device` must be one that torch can use here"):
        haq.quantize_checkpoint(
            tmp_path / "source", tmp_path / "out", CALIBRATION, device=device, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_that_is_none(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="`tokenizer` must be a tokenizer of `transformers`, got str"
    ):
        haq.save_pretrained(model, tmp_path / "out", "tokenizer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True], ids=["new", "an empty directory"])
def test_what_fails_in_the_middle_leaves_nothing(
    there: bool,
    kind: type[BaseException],
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []

    def fail(folder: Path) -> None:
        written.extend(contents(folder))
        raise kind("in the middle")

    tokenizer = words(8)
    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    if there:
        (tmp_path / "out").mkdir()
    with nothing_written(tmp_path, "in the middle", kind=kind):
        haq.save_pretrained(model, tmp_path / "out", tokenizer, max_shard_size="20KB")
    assert {"config.json", "haq.json"} <= set(written)
    haq.save_pretrained(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def words(number: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"word{i}": i for i in range(number)}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    return PreTrainedTokenizerFast(tokenizer_object=level, unk_token="word0")


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import haq
from transformers import AutoTokenizer

checkpoint, limit, size = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = haq.from_pretrained(checkpoint)
tokenizer = None
if (checkpoint / "tokenizer.json").exists():
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # A write beyond the limit is an error instead.
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for out in sys.argv[4:]:
    try:
        haq.save_pretrained(model, out, tokenizer, max_shard_size=size)
    except Exception as error:
        print(json.dumps([isinstance(error, OSError), str(error)]))
"""


def very_tiny() -> PreTrainedModel:
    """Its largest tensor is smaller than what is written about it."""
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.slow
@pytest.mark.parametrize("what", ["tensors", "configuration", "tokenizer"])
def test_a_full_disk(what: str, tmp_path: Path) -> None:
    checkpoint, parent = tmp_path / "checkpoint", tmp_path / "parent"
    limit, size = {
        "tensors": (9000, "20KB"),
        "configuration": (3000, "1KB"),
        "tokenizer": (30_000, "20KB"),
    }[what]
    tokenizer = words(3000) if what == "tokenizer" else None
    haq.save_pretrained(quantized(very_tiny()), checkpoint, tokenizer, max_shard_size=size)
    # It is the right file that fails.
    large = {path.name for path in checkpoint.iterdir() if path.stat().st_size > limit}
    assert any(name.endswith(".safetensors") for name in large) == (what == "tensors")
    assert ("haq.json" in large) == (what == "configuration")
    assert ("tokenizer.json" in large) == (what == "tokenizer")
    outs = [parent / "new", parent / "there"]
    outs[1].mkdir(parents=True)
    script = [sys.executable, "-c", FULL_DISK, str(checkpoint), str(limit), size, *map(str, outs)]
    with unchanged(tmp_path):
        done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    failures = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(failures) == len(outs)
    for out, (is_os_error, message) in zip(outs, failures, strict=True):
        assert "too large" in message
        if what == "tensors":
            assert out.name in message
            assert ".safetensors" in message
        # The library of the tokenizer has errors of its own.
        assert is_os_error or what == "tokenizer"

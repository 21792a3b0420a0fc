"""Saved, loaded, quantized from disk to disk, and what happens when the disk is damaged."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import haq
from haq.checkpoint import stream
from tests.architectures import ARCHITECTURES, EXCLUDE, MIXTURES, token_ids

ALL = {**ARCHITECTURES, **MIXTURES}
FAST = {"rounding": "nearest", "smoothing": "fixed"}


def quantized(name, **options):
    exclude = ("lm_head", *EXCLUDE.get(name, ()))
    config = haq.QuantizationConfig(exclude=exclude, **(FAST | options))
    return haq.quantize_model(ALL[name](), [token_ids(2, 32)], config, progress=False)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


@pytest.mark.parametrize("name", ALL)
def test_round_trip_is_exact(name, tmp_path):
    model, ids = quantized(name), token_ids(2, 16, seed=5)
    haq.save_pretrained(model, tmp_path / "x", max_shard_size="20KB")
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file()
    loaded = haq.from_pretrained(tmp_path / "x")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    flags = [
        [m.asymmetric for m in each.modules() if isinstance(m, haq.Int8Linear)]
        for each in (model, loaded)
    ]
    assert flags[0] == flags[1]
    reports = [haq.quantization_report(each).to_dict() for each in (model, loaded)]
    assert reports[0] == reports[1]
    haq.save_pretrained(loaded, tmp_path / "again", max_shard_size="20KB")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "x")


def test_names_and_shapes_are_those_that_vllm_asks_for(tiny_mixtral, tmp_path):
    """Its Mixtral loader maps w1 and w3 of each expert to rows of one matrix, and w2 to another."""
    model = haq.quantize_model(tiny_mixtral(), [token_ids(2, 32) % 64], progress=False)
    haq.save_pretrained(model, tmp_path / "x")
    expected = {"model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32)}
    expected["model.norm.weight"] = (32,)
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"{layer}.{norm}.weight"] = (32,)
        expected[f"{layer}.block_sparse_moe.gate.weight"] = (4, 32)
        shapes = {f"self_attn.{x}_proj": (n, 32) for x, n in zip("qkvo", (32, 16, 16, 32))}  # noqa: B905
        for e in range(4):
            expert = f"block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1": (48, 32), f"{expert}.w3": (48, 32), f"{expert}.w2": (32, 48)}
        for linear, shape in shapes.items():
            expected[f"{layer}.{linear}.weight"] = shape
            expected[f"{layer}.{linear}.weight_scale"] = (shape[0], 1)
    found = tensors(tmp_path / "x")
    assert {n: tuple(t.shape) for n, t in found.items()} == expected
    int8 = {n.removesuffix("_scale") for n in expected if n.endswith("_scale")}
    assert {n for n, t in found.items() if t.dtype == torch.int8} == int8
    ignored = json.loads((tmp_path / "x/config.json").read_text())["quantization_config"]["ignore"]
    gates = [f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)]
    assert ignored == sorted(["lm_head", *gates])


def test_w1_is_the_gate_and_w3_the_other(tiny_mixtral, tmp_path):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "float")
    config = haq.QuantizationConfig(rounding="nearest", smoothing="none")
    haq.quantize_model(model, [token_ids(2, 32) % 64], config, progress=False)
    haq.save_pretrained(model, tmp_path / "int8")
    before, after = tensors(tmp_path / "float"), tensors(tmp_path / "int8")
    names = [n.removesuffix("_scale") for n in after if n.endswith("_scale")]
    assert len(names) == 2 * (4 + 3 * 4)
    for name in names:
        scale = after[f"{name}_scale"]
        error = (after[name] * scale - before[name]).abs()
        assert bool((error <= scale * 0.5001).all()), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_and_tied_again(tied, tiny_llama, tmp_path):
    model = haq.quantize_model(
        tiny_llama(tie_word_embeddings=tied), [token_ids(2, 32) % 64], progress=False
    )
    haq.save_pretrained(model, tmp_path / "x")
    loaded = haq.from_pretrained(tmp_path / "x")
    assert ("lm_head.weight" in tensors(tmp_path / "x")) is not tied
    same = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert same is tied
    ids = token_ids(1, 8) % 64
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_bfloat16(tiny_llama, tmp_path):
    # Not `.to`, which would cast the rotary frequencies, too: no checkpoint holds them.
    tiny_llama().save_pretrained(tmp_path / "float")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    haq.quantize_model(model, [token_ids(2, 32) % 64], progress=False)
    haq.save_pretrained(model, tmp_path / "x")
    loaded = haq.from_pretrained(tmp_path / "x")
    ids = token_ids(1, 8) % 64
    assert loaded.dtype == torch.bfloat16
    assert json.loads((tmp_path / "x/config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_checkpoint_of_another_tool(tiny_llama, tmp_path):
    """Steps of absmax / 127.5 with -128, scales in bfloat16, and nothing of haq's beside it."""
    model = quantized("llama")
    haq.save_pretrained(model, tmp_path / "x")
    (tmp_path / "x" / "haq.json").unlink()
    file = tmp_path / "x" / "model.safetensors"
    written = load_file(file)
    for name in [n for n in written if n.endswith("_scale")]:
        weight = written[name.removesuffix("_scale")].float() * written[name]
        scale = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16()
        written[name] = scale
        integers = (weight / scale.float()).round().clamp(-128, 127)
        written[name.removesuffix("_scale")] = integers.to(torch.int8)
    assert any(int(t.min()) == -128 for t in written.values() if t.dtype == torch.int8)
    save_file(written, file, {"format": "pt"})
    loaded = haq.from_pretrained(tmp_path / "x")
    layer = loaded.model.layers[1].mlp.down_proj
    assert torch.equal(layer.weight, written["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(
        layer.weight_scale, written["model.layers.1.mlp.down_proj.weight_scale"].float()
    )
    ids = token_ids(1, 8)
    difference = (loaded(ids).logits - model(ids).logits).abs().max()
    assert 0 < difference < 0.05 * model(ids).logits.abs().max()


# --- from disk to disk

NAMES = ["opt", "llama", "mixtral", "gpt-oss", "deepseek-v3", "granite-moe", "jamba"]
CALIBRATION = [token_ids(2, 32, seed=seed) for seed in range(3)]


@pytest.fixture
def source(tmp_path):
    ALL["mixtral"]().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def run(source, output, **options):
    return haq.quantize_checkpoint(source, output, CALIBRATION, progress=False, **options)


@pytest.mark.parametrize("name", NAMES)
def test_from_disk_to_disk_equals_the_model_in_memory(name, tmp_path):
    config = haq.QuantizationConfig(exclude=("lm_head", *EXCLUDE.get(name, ())))
    ALL[name]().save_pretrained(tmp_path / "source")
    report = haq.quantize_checkpoint(
        tmp_path / "source", tmp_path / "out", CALIBRATION, config, progress=False
    )
    model = type(ALL[name]()).from_pretrained(tmp_path / "source")
    haq.quantize_model(model, CALIBRATION, config, progress=False)
    haq.save_pretrained(model, tmp_path / "whole")
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert all(found[n].dtype == expected[n].dtype for n in expected)
    assert report.to_dict() == haq.quantization_report(model).to_dict()
    texts = [(tmp_path / d / "config.json").read_text() for d in ("out", "whole")]
    assert texts[0] == texts[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


@pytest.mark.parametrize("stop", [0, 1])
def test_the_same_call_goes_on_after_an_end(stop, source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole")
    original, calls = stream.quantize_block, []

    def ends(*args, **options):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(args[3])
        return original(*args, **options)

    monkeypatch.setattr(stream, "quantize_block", ends)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(source, tmp_path / "out")
    assert any(f"{stop} blocks are done" in note for note in caught.value.__notes__)
    assert not (tmp_path / "out").exists()
    calls.clear()
    monkeypatch.setattr(
        stream, "quantize_block", lambda *a, **o: calls.append(a[3]) or original(*a, **o)
    )
    run(source, tmp_path / "out")
    assert calls == [f"model.layers.{i}" for i in range(stop, 2)]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]
    again = run(source, tmp_path / "out")
    assert again.complete
    assert len(calls) == 2 - stop


def test_another_job_is_not_gone_on_with(source, tmp_path, monkeypatch):
    def ends(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream, "quantize_block", ends)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out")
    before = hashes(tmp_path / "out.incomplete")
    file = source / "config.json"
    text = file.read_text()
    file.write_text(text.replace("}", " }"))
    with pytest.raises(ValueError, match=r"another source: config\.json was"):
        run(source, tmp_path / "out")
    file.write_text(text)
    with pytest.raises(ValueError, match="another calibration"):
        haq.quantize_checkpoint(source, tmp_path / "out", CALIBRATION[:2], progress=False)
    with pytest.raises(ValueError, match=r"another configuration: damping was 0\.01 and is 0\.1"):
        run(source, tmp_path / "out", config=haq.QuantizationConfig(damping=0.1))
    assert hashes(tmp_path / "out.incomplete") == before
    assert run(source, tmp_path / "out", resume=False).complete


def test_a_source_that_cannot_be_worked_with(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file(weights | {name: weights[name] / 0}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"`model\.layers\.1\.mlp\.experts\.gate_up_proj` has NaN"):
        run(source, tmp_path / "out")
    del weights[name]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        run(source, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    with pytest.raises(FileExistsError):
        run(source, tmp_path / "full")
    assert (tmp_path / "full/mine").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere", tmp_path / "out")
    haq.save_pretrained(quantized("llama"), tmp_path / "int8")
    with pytest.raises(ValueError, match="compressed-tensors"):
        run(tmp_path / "int8", tmp_path / "other")


# --- damage


@pytest.fixture
def saved(tmp_path):
    haq.save_pretrained(quantized("mixtral"), tmp_path / "x", max_shard_size="20KB")
    return tmp_path / "x"


def test_every_flipped_byte_of_a_header_is_seen_or_harmless(saved):
    file = sorted(saved.glob("*.safetensors"))[1]
    right, before = tensors(saved), file.read_bytes()
    length = int.from_bytes(before[:8], "little")
    refused = 0
    for position in range(0, 8 + length, 7):
        damaged = bytearray(before)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        try:
            loaded = haq.from_pretrained(saved)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            named = [file.name, "model.layers"]
            assert any(part in str(error) for part in named), error  # noqa: PT017
        else:
            name = "model.layers.0.block_sparse_moe.experts.0.w2"
            layer = loaded.model.layers[0].mlp.experts.down[0]
            assert torch.equal(layer.weight, right[f"{name}.weight"])
    assert refused > 20


@pytest.mark.parametrize("size", [0, 4, 60, -1])
def test_a_file_cut_short(size, saved):
    file = sorted(saved.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=file.name):
        haq.from_pretrained(saved)


def test_a_missing_file(saved):
    file = sorted(saved.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.name}.*holds `model"):
        haq.from_pretrained(saved)


@pytest.mark.parametrize("place", ["../x.safetensors", "/x.safetensors", "a/b.safetensors"])
def test_an_index_that_leads_elsewhere(place, saved):
    index = saved / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = sorted(values["weight_map"])[0]
    values["weight_map"][name] = place
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{index.name}.*{name}"):
        haq.from_pretrained(saved)


def test_an_index_to_a_tensor_that_is_not_there(saved):
    index = saved / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.nothing"] = next(iter(values["weight_map"].values()))
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"must hold the tensor `model\.nothing`"):
        haq.from_pretrained(saved)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.float(), "int8"),
        (lambda t: t[:-1], "int8"),
        (lambda t: t.to(torch.uint8), "U8"),
        (None, "must hold"),
    ],
)
def test_a_tensor_of_another_kind(change, expected, saved):
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    file = next(f for f in saved.glob("*.safetensors") if name in load_file(f))
    values = load_file(file)
    values.pop(name) if change is None else values.update({name: change(values[name])})
    save_file(values, file, {"format": "pt"})
    with pytest.raises(ValueError, match=expected) as caught:
        haq.from_pretrained(saved)
    assert name in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("quant_method", "gptq"), ("format", "pack-quantized"), ("config_groups", {})],
)
def test_a_config_of_another_method(key, value, saved):
    file = saved / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"][key] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=key):
        haq.from_pretrained(saved)


def test_what_is_no_checkpoint_of_haq(tiny_llama, tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        haq.from_pretrained(tmp_path / "nowhere")
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="float model"):
        haq.from_pretrained(tmp_path / "float")
    with pytest.raises(NotImplementedError, match="gpu_memory"):
        haq.from_pretrained(saved, gpu_memory="1GiB")
    with pytest.raises(TypeError, match="dtype"):
        haq.from_pretrained(saved, dtype=torch.int8)
    (saved / "haq.json").write_text("{")
    with pytest.raises(ValueError, match=r"haq\.json"):
        haq.from_pretrained(saved)


def test_what_cannot_be_saved(tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="Linear"):
        haq.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "x")
    with pytest.raises(ValueError, match="quantize_model"):
        haq.save_pretrained(tiny_llama(), tmp_path / "x")
    model = quantized("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    with pytest.raises(FileExistsError, match="full"):
        haq.save_pretrained(model, tmp_path / "full")

    def fails(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("haq.checkpoint.save.save_file", fails)
    with pytest.raises(OSError, match="No space"):
        haq.save_pretrained(model, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full/mine").read_text() == "mine"

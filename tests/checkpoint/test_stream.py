"""`quantize_checkpoint` makes what the model in memory would give, and goes on after any end."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import haq
from haq.checkpoint import progress as progress_module
from haq.checkpoint import stream
from haq.checkpoint.files import INDEX
from tests.architectures import ARCHITECTURES, EXCLUDE, MIXTURES, VOCABULARY, token_ids

REPOSITORY = Path(__file__).parents[2]
CALIBRATION = [token_ids(2, 24, seed=seed) for seed in range(3)]
BLOCKS = 3


def quantize(source: Path, output: Path, **options: Any) -> haq.QuantizationReport:
    calibration = options.pop("calibration", CALIBRATION)
    return haq.quantize_checkpoint(source, output, calibration, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


# --- The same as in memory ------------------------------------------------------------------------


def tied(model: PreTrainedModel) -> PreTrainedModel:
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    **{n: ARCHITECTURES[n] for n in ("opt", "llama", "gpt2")},
    **{n: MIXTURES[n] for n in ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "jamba")},
    "llama-tied": lambda: tied(ARCHITECTURES["llama"]()),
    "llama-bfloat16": lambda: ARCHITECTURES["llama"]().bfloat16(),
    "mixtral-sharded": MIXTURES["mixtral"],
}


@pytest.mark.parametrize("name", BUILD)
def test_equals_quantize_model_and_save_pretrained(name: str, tmp_path: Path) -> None:
    source, output, other = (tmp_path / n for n in ("source", "output", "other"))
    built = BUILD[name]()
    sharded = name.endswith("sharded")
    built.save_pretrained(source, max_shard_size="8KB" if sharded else "5GB")
    assert (source / INDEX).is_file() == sharded
    config = haq.QuantizationConfig(exclude=("lm_head", *EXCLUDE.get(name, ())))

    report = quantize(source, output, config=config)
    assert names_in(tmp_path) == ["output", "source"]
    model = type(built).from_pretrained(source, dtype="auto")
    assert model.dtype == built.dtype
    haq.quantize_model(model, CALIBRATION, config, progress=False)
    haq.save_pretrained(model, other)

    ours, theirs = tensors_of(output), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    assert report == haq.quantization_report(model)
    for file in ("config.json", "generation_config.json"):
        assert (output / file).read_bytes() == (other / file).read_bytes()
    notes = [json.loads((folder / "haq.json").read_text()) for folder in (output, other)]
    assert len(notes[0].pop("job")) == 64
    assert notes[0] == notes[1]

    loaded, ids = haq.from_pretrained(output), token_ids(2, 12, seed=9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert haq.quantization_report(loaded) == report


def test_a_file_for_each_block_and_an_index_of_all(reference: Path) -> None:
    index = json.loads((reference / INDEX).read_text())
    files = [f"model-{i:05}-of-{BLOCKS + 1:05}.safetensors" for i in range(1, BLOCKS + 2)]
    assert sorted(set(index["weight_map"].values())) == files
    tensors = tensors_of(reference)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for i, file in enumerate(files[1:]):
        assert all(n.startswith(f"model.layers.{i}.") for n in load_file(reference / file))


def test_tokenizer_files_are_copied_and_nothing_else(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    for number, name in enumerate([*wanted, "README.md", "training_args.bin"]):
        (folder / name).write_text(json.dumps({"number": number}))
    (folder / "tokenizer").mkdir()
    quantize(folder, tmp_path / "output")
    for name in wanted:
        assert (tmp_path / "output" / name).read_bytes() == (folder / name).read_bytes()
    own = ["config.json", "generation_config.json", "haq.json", INDEX]
    others = [n for n in names_in(tmp_path / "output") if not n.endswith(".safetensors")]
    assert others == sorted([*wanted, *own])


# --- Stopped, and gone on with --------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of three blocks; not to be changed."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "mixtral"
    MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nothing stopped made of it."""
    folder = tmp_path_factory.mktemp("reference") / "int8"
    quantize(source, folder)
    return folder


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """A source to be changed; the times of its files are those of the other."""
    return Path(shutil.copytree(source, tmp_path / "source"))


class Blocks:
    """Stands for `quantize_block`, counts, and can stop at a block."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[str] = []
        self._stop_at, self._original = stop_at, stream.quantize_block

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name = arguments[3]
        if self._stop_at is not None and name.endswith(f".{self._stop_at}"):
            raise KeyboardInterrupt
        self.seen.append(name)
        return self._original(*arguments, **options)


def stop(source: Path, output: Path, block: int, **options: Any) -> BaseException:
    """Quantize up to a block; how it ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("haq.checkpoint.stream.quantize_block", Blocks(block))
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(source, output, **options)
    return caught.value


def incomplete(output: Path) -> Path:
    return output.with_name(f"{output.name}.incomplete")


def blocks_done(output: Path) -> int:
    return len(json.loads((incomplete(output) / "progress.json").read_text())["parts"]) - 1


@pytest.mark.parametrize("block", range(BLOCKS))
def test_goes_on_after_the_blocks_that_are_done(
    block: int, source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "deep" / "int8"
    error = stop(source, output, block)
    (note,) = error.__notes__
    assert f"{block} blocks are done and kept in `{incomplete(output)}`" in note
    assert names_in(output.parent) == ["int8.incomplete"]
    assert len(list((incomplete(output) / "model").iterdir())) == block + 1
    # What enters the next block, and room for what it gives.
    folders = [f"hidden-{block + 1}", f"hidden-{block + 2}"]
    assert sorted(p.name for p in incomplete(output).glob("hidden-*")) == folders
    assert not any((incomplete(output) / folders[1]).iterdir())

    blocks = Blocks()
    monkeypatch.setattr("haq.checkpoint.stream.quantize_block", blocks)
    report = quantize(source, output)
    assert blocks.seen == [f"model.layers.{i}" for i in range(block, BLOCKS)]
    assert contents(output) == contents(reference)
    assert names_in(output.parent) == ["int8"]
    assert report.complete
    notes = json.loads((reference / "haq.json").read_text())
    assert report == haq.QuantizationReport.from_dict(notes["report"])


def test_stopped_at_every_block_in_turn(source: Path, reference: Path, tmp_path: Path) -> None:
    for block in range(BLOCKS):
        stop(source, tmp_path / "int8", block)
    quantize(source, tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(reference)


@pytest.mark.slow
@pytest.mark.parametrize("exclude", [("lm_head",), ()], ids=["head float", "head int8"])
def test_stopped_before_any_change_of_the_disk(
    exclude: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file that is waited for, each that is replaced, and each directory that is removed."""
    source, folder, moments, stop_at = tmp_path / "source", tmp_path / "outputs", 0, 0
    ARCHITECTURES["opt"]().save_pretrained(source)
    options: dict[str, Any] = {
        "calibration": CALIBRATION[:1],
        "config": haq.QuantizationConfig(smoothing="none", rounding="nearest", exclude=exclude),
    }

    def stopping(original: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(*arguments: Any, **options: Any) -> Any:
            nonlocal moments
            moments += 1
            if moments == stop_at:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return stopped

    monkeypatch.setattr(os, "fsync", stopping(lambda descriptor: None))  # No power is lost here.
    monkeypatch.setattr(os, "replace", stopping(os.replace))
    monkeypatch.setattr(shutil, "rmtree", stopping(shutil.rmtree))
    report = quantize(source, tmp_path / "reference", **options)
    expected, last = contents(tmp_path / "reference"), moments
    assert last > 30
    for number in range(1, last + 1):
        moments, stop_at = 0, number
        with pytest.raises(KeyboardInterrupt):
            quantize(source, folder / "int8", **options)
        moments, stop_at = 0, 0
        assert quantize(source, folder / "int8", **options) == report, number
        assert contents(folder / "int8") == expected, number
        assert names_in(folder) == ["int8"], number
        shutil.rmtree(folder)


def test_again_on_what_is_finished_changes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "int8"
    report = quantize(source, output)
    before, times = contents(output), {p: p.stat().st_mtime_ns for p in output.iterdir()}
    blocks = Blocks()
    monkeypatch.setattr("haq.checkpoint.stream.quantize_block", blocks)
    assert quantize(source, output) == report
    assert blocks.seen == []
    assert contents(output) == before
    assert {p: p.stat().st_mtime_ns for p in output.iterdir()} == times
    assert names_in(tmp_path) == ["int8"]


@pytest.mark.parametrize("change", ["calibration", "configuration"])
def test_what_is_finished_is_not_overwritten_by_another_job(
    change: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "int8"
    quantize(source, output)
    before = contents(output)
    with pytest.raises(FileExistsError, match="must not exist"):
        quantize(source, output, **OTHER[change])
    assert contents(output) == before
    assert names_in(tmp_path) == ["int8"]


def test_without_resume_it_starts_anew(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "int8"
    stop(source, output, 2, calibration=CALIBRATION[:1])
    (incomplete(output) / "model" / "left").write_text("")
    blocks = Blocks()
    monkeypatch.setattr("haq.checkpoint.stream.quantize_block", blocks)
    quantize(source, output, resume=False)
    assert len(blocks.seen) == BLOCKS
    assert contents(output) == contents(reference)
    assert names_in(tmp_path) == ["int8"]


@pytest.mark.parametrize("call", range(2))
def test_stopped_while_it_throws_away_what_was_done(
    call: int, source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, original, calls = tmp_path / "int8", shutil.rmtree, 0
    stop(source, output, 2)

    def rmtree(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise KeyboardInterrupt
        original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, output, resume=False)
    quantize(source, output)
    assert contents(output) == contents(reference)


def test_output_was_removed_after_an_end_in_the_last_step(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "int8"
    stop(source, output, BLOCKS - 1)
    original = os.replace

    def replace(one: Any, other: Any) -> None:
        original(one, other)
        if Path(other) == output:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, output)
    assert names_in(tmp_path) == ["int8", "int8.incomplete"]
    shutil.rmtree(output)
    quantize(source, output)
    assert contents(output) == contents(reference)
    assert names_in(tmp_path) == ["int8"]


# --- Something is different -----------------------------------------------------------------------

OTHER: dict[str, dict[str, Any]] = {
    "calibration": {"calibration": CALIBRATION[:2]},
    "configuration": {"config": haq.QuantizationConfig(smoothing="none")},
}


def newer(file: Path) -> None:
    time = file.stat().st_mtime_ns + 1_000_000_000
    os.utime(file, ns=(time, time))


def touch(folder: Path) -> str:
    shard = min(folder.glob("*.safetensors"))
    newer(shard)
    return f"another source: {shard.name} was"


def change_config(folder: Path) -> str:
    values = json.loads((folder / "config.json").read_text())
    values["rms_norm_eps"] *= 2
    (folder / "config.json").write_text(json.dumps(values))
    return "another source: config.json was"


def add_file(folder: Path) -> str:
    (folder / "added_tokens.json").write_text("{}")
    return "another source: added_tokens.json was None"


@pytest.mark.parametrize("change", [touch, change_config, add_file])
def test_a_source_that_has_changed(
    change: Callable[[Path], str], copied: Path, reference: Path, tmp_path: Path
) -> None:
    output, saved = tmp_path / "int8", tmp_path / "saved"
    shutil.copytree(copied, saved)
    stop(copied, output, 2)
    before = contents(incomplete(output))
    message = change(copied)
    with pytest.raises(ValueError, match=message) as caught:
        quantize(copied, output)
    assert "resume=False" in str(caught.value)
    assert str(incomplete(output)) in str(caught.value)
    assert contents(incomplete(output)) == before
    assert not output.exists()

    shutil.rmtree(copied)
    shutil.copytree(saved, copied)
    quantize(copied, output)
    assert contents(output) == contents(reference)
    assert names_in(tmp_path) == ["int8", "saved", "source"]


@pytest.mark.parametrize("change", OTHER)
def test_a_call_that_has_changed(
    change: str, source: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "int8"
    stop(source, output, 1)
    before = contents(incomplete(output))
    with pytest.raises(ValueError, match=f"of a job with another {change}: "):
        quantize(source, output, **OTHER[change])
    assert contents(incomplete(output)) == before
    quantize(source, output)
    assert contents(output) == contents(reference)


def test_an_attention_mask_that_has_changed(source: Path, tmp_path: Path) -> None:
    ones = torch.ones_like(CALIBRATION[0])
    other = ones.clone()
    other[0, -5:] = 0
    stop(source, tmp_path / "int8", 1, calibration=[{"input_ids": CALIBRATION[0]}])
    for mask in (ones, other):
        batch = {"input_ids": CALIBRATION[0], "attention_mask": mask}
        with pytest.raises(ValueError, match="another calibration"):
            quantize(source, tmp_path / "int8", calibration=[batch])


def test_other_software(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(source, tmp_path / "int8", 1)
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    with pytest.raises(
        ValueError, match=r"another software: transformers was .* and is '5\.99\.0'"
    ):
        quantize(source, tmp_path / "int8")


def test_the_same_source_elsewhere_goes_on(
    source: Path, copied: Path, reference: Path, tmp_path: Path
) -> None:
    stop(source, tmp_path / "int8", 1)
    quantize(copied, tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(reference)


# --- The output -----------------------------------------------------------------------------------


def test_output_that_holds_something(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    output.mkdir()
    (output / "thesis.txt").write_text("all I have")
    for resume in (True, False):
        with pytest.raises(FileExistsError, match="int8"):
            quantize(source, output, resume=resume)
    assert contents(output) == {"thesis.txt": b"all I have"}
    assert names_in(tmp_path) == ["int8"]


def test_output_that_appeared_meanwhile(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    stop(source, output, 1)
    (output / "sub").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="int8"):
        quantize(source, output)
    assert blocks_done(output) == 1
    (output / "sub").rmdir()
    quantize(source, output)
    assert contents(output) == contents(reference)


def test_output_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "int8").write_text("text")
    with pytest.raises(FileExistsError, match="int8"):
        quantize(source, tmp_path / "int8")
    assert contents(tmp_path) == {"int8": b"text"}


def test_output_inside_an_empty_current_directory(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "int8").mkdir()
    monkeypatch.chdir(tmp_path / "int8")
    quantize(source, Path("."))
    monkeypatch.chdir(tmp_path)
    assert contents(tmp_path / "int8") == contents(reference)
    assert names_in(tmp_path) == ["int8"]


def test_two_at_once(source: Path, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    stop(source, output, 1)
    before = contents(incomplete(output))
    with progress_module.only_one(incomplete(output)):
        for resume in (True, False):
            with pytest.raises(RuntimeError, match="Another process works on"):
                quantize(source, output, resume=resume)
        assert contents(incomplete(output)) == before
    quantize(source, output)
    assert contents(output) == contents(reference)


# --- The source -----------------------------------------------------------------------------------


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change the file that holds a tensor."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file


def test_a_shard_is_missing(copied: Path, tmp_path: Path) -> None:
    shard = max(copied.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}` is missing"):
        quantize(copied, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_a_shard_is_cut_short(copied: Path, tmp_path: Path) -> None:
    shard = max(copied.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{shard.name}` is no complete safetensors file"):
        quantize(copied, tmp_path / "int8")


def test_a_tensor_is_missing_in_a_file(copied: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    file = rewrite(copied, name, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{file.name}` must hold the tensor `{name}`"):
        quantize(copied, tmp_path / "int8")


def test_a_tensor_is_missing_everywhere(copied: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((copied / INDEX).read_text())
    rewrite(copied, name, lambda tensors: tensors.pop(name))
    del index["weight_map"][name]
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"must hold `{name}` for a MixtralForCausalLM"):
        quantize(copied, tmp_path / "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_is_not_finite(
    value: float, source: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, output = "model.layers.1.self_attn.q_proj.weight", tmp_path / "int8"
    rewrite(copied, name, lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(ValueError, match=name) as caught:
        quantize(copied, output)
    assert "1 blocks are done" in caught.value.__notes__[0]
    assert blocks_done(output) == 1
    # It is the same the second time, and block 0 is not quantized for it.
    blocks = Blocks()
    monkeypatch.setattr("haq.checkpoint.stream.quantize_block", blocks)
    with pytest.raises(ValueError, match=name):
        quantize(copied, output)
    assert blocks.seen == []
    assert blocks_done(output) == 1


def test_the_embedding_is_not_finite(copied: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    rewrite(copied, name, lambda tensors: tensors[name][90].fill_(float("nan")))
    with pytest.raises(ValueError, match=name):
        quantize(copied, tmp_path / "int8")


def test_quantized_already(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float model, got one quantized.*original"):
        quantize(reference, tmp_path / "int8")
    assert names_in(tmp_path) == []


def test_pickled(copied: Path, tmp_path: Path) -> None:
    for file in [*copied.glob("*.safetensors"), copied / INDEX]:
        file.unlink()
    (copied / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*unpickled"):
        quantize(copied, tmp_path / "int8")


def test_no_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`source` must be the directory"):
        quantize(tmp_path / "nowhere", tmp_path / "int8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json` is missing"):
        quantize(tmp_path / "empty", tmp_path / "int8")
    assert names_in(tmp_path) == ["empty"]


def test_an_unknown_class(copied: Path, tmp_path: Path) -> None:
    values = json.loads((copied / "config.json").read_text())
    values["architectures"] = ["MixtralForTelepathy"]
    (copied / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="MixtralForTelepathy"):
        quantize(copied, tmp_path / "int8")


def test_config_of_another_kind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`config` must be a QuantizationConfig, got dict"):
        quantize(source, tmp_path / "int8", config={"smoothing": "none"})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([CALIBRATION[0], torch.full((1, 8), VOCABULARY)], "tokenizer"),
        ([], "calibration"),
        ([CALIBRATION[0].float()], "calibration"),
        (["text"], "calibration"),
    ],
)
def test_calibration_that_cannot_be_used_is_not_held_against_the_next(
    wrong: Any, message: str, source: Path, reference: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        quantize(source, tmp_path / "int8", calibration=wrong)
    assert not (tmp_path / "int8").exists()
    quantize(source, tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(reference)


def test_a_source_that_was_mended_before_anything_was_done(
    copied: Path, reference: Path, tmp_path: Path
) -> None:
    shard = max(copied.glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        quantize(copied, tmp_path / "int8")
    (tmp_path / "elsewhere").rename(shard)
    quantize(copied, tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(reference)


# --- A full disk, and kills -----------------------------------------------------------------------


def run_script(script: str, *arguments: object) -> Any:
    """What a process of its own prints last, as JSON."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FULL_DISK = """
import json, resource, signal, sys
import torch
torch.set_num_threads(1)
import haq
from pathlib import Path
from tests.checkpoint.test_stream import CALIBRATION

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, folder = sys.argv[1], Path(sys.argv[2])
ends = {}
for name in sys.argv[3:]:
    limit = int(name.split("-")[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        haq.quantize_checkpoint(source, folder / name, CALIBRATION, progress=False)
    except OSError as error:
        ends[name] = [str(error), getattr(error, "__notes__", [])]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_the_disk_is_full(source: Path, reference: Path, tmp_path: Path) -> None:
    first, block = (
        (reference / f"model-0000{i}-of-00004.safetensors").stat().st_size for i in (1, 2)
    )
    # Where the largest file ends, how many blocks were done before, and what is then not written.
    cases = {
        "5000-0": "hidden-1/000000.safetensors",
        f"{first - 1}-0": "model/model-00001-of-00004.safetensors",
        "5000-1": "File too large",  # What is done is noted before anything else.
        f"{block - 1}-1": "model/model-00003-of-00004.safetensors",
    }
    for name in cases:
        if name.endswith("-1"):
            stop(source, tmp_path / name, 1)
    ends = run_script(FULL_DISK, source, tmp_path, *cases)
    assert ends.keys() == cases.keys()
    for name, message in cases.items():
        output = tmp_path / name
        assert message in ends[name][0]
        assert not output.exists()
        if name.endswith("-0"):  # With nothing done nothing is left.
            assert ends[name][1] == []
            assert not (tmp_path / f"{name}.incomplete").exists()
        else:
            assert blocks_done(output) == 1
        quantize(source, output)
        assert contents(output) == contents(reference)
    assert names_in(tmp_path) == sorted(cases)


KILLS = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import haq
import transformers
from pathlib import Path
from tests.checkpoint.test_stream import CALIBRATION, contents, names_in

transformers.MixtralForCausalLM
os.fsync = lambda descriptor: None  # It is for a loss of power, which a kill is not.
config = haq.QuantizationConfig(smoothing="none")
source, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

haq.quantize_checkpoint(source, folder / "warm", CALIBRATION[:2], config, progress=False)

def start(output):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        haq.quantize_checkpoint(source, output, CALIBRATION[:2], config, progress=False)
        code = 0
    finally:
        os._exit(code)  # It shares the buffers of its parent, which are not to be written twice.

def finish(output):
    begin = time.perf_counter()
    _, status = os.waitpid(start(output), 0)
    assert status == 0, status
    return time.perf_counter() - begin

took = min(finish(folder / f"first-{i}") for i in range(3))
expected = contents(folder / "first-0")
choose, killed, done = random.Random(7), 0, {}
for attempt in range(number):
    place = folder / str(attempt)
    place.mkdir()
    output = place / "int8"
    child = start(output)
    time.sleep(choose.uniform(0, 1.1 * took))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    progress = place / "int8.incomplete/progress.json"
    parts = len(json.loads(progress.read_text())["parts"]) if progress.is_file() else -1
    key = "complete" if output.exists() else "not begun" if parts < 0 else f"{parts} parts"
    done[key] = done.get(key, 0) + 1
    finish(output)
    assert contents(output) == expected, attempt
    assert names_in(place) == ["int8"], attempt
assert contents(folder / "first-1") == expected
print(json.dumps({"killed": killed, "seconds": took, "done": done}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
def test_killed_at_any_moment(source: Path, tmp_path: Path) -> None:
    """Fifty times: the same bytes, and nothing beside them."""
    result = run_script(KILLS, source, tmp_path, 50)
    print(result)
    assert result["killed"] >= 30
    # Moments of all kinds: with nothing, with some blocks and with almost all done.
    assert len(result["done"]) >= 4
    quantize(
        source,
        tmp_path / "here",
        calibration=CALIBRATION[:2],
        config=haq.QuantizationConfig(smoothing="none"),
    )
    assert contents(tmp_path / "first-0") == contents(tmp_path / "here")


@pytest.mark.parametrize(
    "calibration", ["wikitext2", CALIBRATION[0], {"input_ids": CALIBRATION[0]}]
)
def test_a_single_batch_is_no_calibration(calibration: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be an iterable of batches, got a single"):
        quantize(source, tmp_path / "output", calibration=calibration)
    assert not (tmp_path / "output.incomplete").exists()


def test_a_call_that_cannot_be_worked_with_leaves_nothing(source: Path, tmp_path: Path) -> None:
    config = haq.QuantizationConfig(exclude=("lm_hed",))
    with pytest.raises(ValueError, match="'lm_hed' matches no module") as caught:
        quantize(source, tmp_path / "output", config=config)
    assert not hasattr(caught.value, "__notes__")
    assert not (tmp_path / "output.incomplete").exists()

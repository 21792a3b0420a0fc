"""An int8 head on disk: what comes back, what other tools are told, and jobs that are stopped."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import haq
from haq import Int8Linear, QuantizationConfig, QuantizationReport
from haq.checkpoint import stream
from haq.checkpoint.files import INDEX
from haq.model.heads import find_head
from tests.architectures import ARCHITECTURES, EXCLUDE, MIXTURES, token_ids
from tests.checkpoint.test_round_trip import assert_same, contents, logits_of
from tests.checkpoint.test_stream import incomplete, names_in, tensors_of
from tests.heads import MORE_HEADS

MODELS: dict[str, Callable[[], PreTrainedModel]] = ARCHITECTURES | MIXTURES | MORE_HEADS
CALIBRATION = [token_ids(2, 24, seed=seed) for seed in range(3)]
TIED = ["opt", "gemma2", "gpt2", "bloom", "cohere", "roberta", "ernie4_5-moe"]


def config_for(name: str, **options: Any) -> QuantizationConfig:
    return QuantizationConfig(**{"exclude": EXCLUDE.get(name, ())} | options)


@functools.cache
def quantized(name: str) -> PreTrainedModel:
    """To be looked at, saved and called only."""
    return haq.quantize_model(MODELS[name](), CALIBRATION, config_for(name), progress=False)


def head_of(model: PreTrainedModel) -> Int8Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear)
    return head


def json_of(folder: Path, file: str = "config.json") -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / file).read_text())
    return values


# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_was_saved_comes_back(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    haq.save_pretrained(model, tmp_path / "int8")
    loaded = haq.from_pretrained(tmp_path / "int8")
    assert_same(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert head_of(loaded).asymmetric == head_of(model).asymmetric
    head = find_head(MODELS[name]())
    report = haq.quantization_report(loaded)
    assert report.head is not None
    assert report.head.name == head
    # Saved again it is the same files.
    haq.save_pretrained(loaded, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "int8")


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_was_tied_is_not_tied_again(name: str, tmp_path: Path) -> None:
    before, model = MODELS[name](), quantized(name)
    assert before.config.tie_word_embeddings is True
    haq.save_pretrained(model, tmp_path / "int8")
    assert json_of(tmp_path / "int8")["tie_word_embeddings"] is False
    loaded = haq.from_pretrained(tmp_path / "int8")
    loaded.tie_weights()
    embeddings = before.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    assert torch.equal(head_of(loaded).weight, head_of(model).weight)
    # On disk are both, and the embeddings are what they were.
    tensors = tensors_of(tmp_path / "int8")
    assert sum(torch.equal(t, embeddings) for t in tensors.values()) == 1
    head = find_head(before)
    assert tensors[f"{head}.weight"].dtype == torch.int8
    assert tensors[f"{head}.weight_scale"].shape == (96, 1)


def in_dtype(name: str, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """As `transformers` loads it: some of it stays float32."""
    model = MODELS[name]()
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", ["opt", "opt-post-norm", "gemma3", "phi", "mixtral"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    model = in_dtype(name, torch.bfloat16, tmp_path / "float")
    haq.quantize_model(model, CALIBRATION, config_for(name), progress=False)
    haq.save_pretrained(model, tmp_path / "int8")
    loaded = haq.from_pretrained(tmp_path / "int8")
    assert_same(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert head_of(loaded).weight_scale.dtype == torch.float32
    # And in another dtype the integers are the same.
    other = haq.from_pretrained(tmp_path / "int8", dtype=torch.float16)
    torch.testing.assert_close(
        head_of(other).state_dict(), head_of(model).state_dict(), rtol=0, atol=0
    )
    assert logits_of(other).dtype == torch.float16


def test_a_mixture_in_two_tiers(tmp_path: Path) -> None:
    model = quantized("mixtral")
    haq.save_pretrained(model, tmp_path / "int8")
    loaded = haq.from_pretrained(tmp_path / "int8", device="cpu", gpu_memory="1GiB")
    assert haq.find_offloader(loaded) is not None
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("limit", ["8KB", "5GB"])
def test_shards(limit: str, tmp_path: Path) -> None:
    haq.save_pretrained(quantized("gemma2"), tmp_path / "int8", max_shard_size=limit)
    assert (tmp_path / "int8" / INDEX).is_file() == (limit == "8KB")
    assert_same(haq.from_pretrained(tmp_path / "int8"), quantized("gemma2"))


# --- What others are told -------------------------------------------------------------------------

NAMES = {
    "gpt-neox": ["embed_out", "lm_head"],  # As published, and as transformers calls it.
    "gpt-neox-japanese": ["embed_out"],
    "bert": ["cls.predictions.decoder"],
    "roberta": ["lm_head.decoder"],
}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_a_target_by_its_name_and_not_ignored(name: str, tmp_path: Path) -> None:
    """Servers take a head for float unless it is named: their heads are embeddings, no linears."""
    haq.save_pretrained(quantized(name), tmp_path / "int8")
    entry = json_of(tmp_path / "int8")["quantization_config"]
    names = NAMES.get(name, ["lm_head"])
    assert entry["config_groups"]["group_0"]["targets"] == ["Linear", *names]
    assert not set(names) & set(entry["ignore"])
    tensors = tensors_of(tmp_path / "int8")
    stored = [n for n in names if f"{n}.weight" in tensors]
    assert len(stored) == 1
    assert tensors[f"{stored[0]}.weight"].dtype == torch.int8


def test_a_float_head_is_ignored_and_no_target(tmp_path: Path) -> None:
    model = haq.quantize_model(MODELS["llama"](), CALIBRATION, progress=False)
    haq.save_pretrained(model, tmp_path / "int8")
    entry = json_of(tmp_path / "int8")["quantization_config"]
    assert entry["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert entry["ignore"] == ["lm_head"]


def test_compressed_tensors_reads_the_configuration(tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    haq.save_pretrained(quantized("gpt-neox"), tmp_path / "int8")
    entry = json_of(tmp_path / "int8")["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(entry)
    (scheme,) = config.config_groups.values()
    assert any(match_name("embed_out", target) for target in scheme.targets)
    assert not any(match_name("embed_out", name) for name in config.ignore)


# It warns that it reads `dequantize` from what it was given and the rest from the checkpoint.
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "phi", "gpt-neox"])
def test_transformers_dequantizes_it(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = quantized(name)
    haq.save_pretrained(model, tmp_path / "int8")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "int8", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    head, theirs = head_of(model), loaded.get_output_embeddings()
    assert torch.equal(theirs.weight, head.weight.float() * head.weight_scale)
    expected = MODELS[name]().get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, expected)
    # Their inputs are float, ours int8.
    got, exact = logits_of(model).double(), logits_of(loaded).double()
    assert 0 < (got - exact).norm() / exact.norm() < 0.05


# --- From disk to disk ----------------------------------------------------------------------------

STREAMED = [
    "opt",
    "opt-post-norm",
    "llama",
    "gemma2",
    "gemma3",
    "gpt2",
    "phi",
    "gpt-neox",
    "bloom",
    "mixtral",
    "deepseek-v3",
    "gpt-oss",
    "jamba",
    "ernie4_5-moe",
    "granite",
    "bert",
    "roberta",
]


def streamed(source: Path, output: Path, name: str = "", **options: Any) -> QuantizationReport:
    config = options.pop("config", config_for(name))
    return haq.quantize_checkpoint(source, output, CALIBRATION, config, progress=False, **options)


def as_in_memory(source: Path, name: str, output: Path) -> PreTrainedModel:
    model = type(MODELS[name]()).from_pretrained(source, dtype="auto")
    haq.quantize_model(model, CALIBRATION, config_for(name), progress=False)
    haq.save_pretrained(model, output)
    return model


def assert_same_checkpoint(folder: Path, other: Path) -> None:
    """But for how tensors are shared out to files."""
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    for file in ("config.json", "generation_config.json"):
        if (other / file).exists():
            assert (folder / file).read_bytes() == (other / file).read_bytes()
    notes = [json_of(each, "haq.json") for each in (folder, other)]
    assert len(notes[0].pop("job")) == 64
    assert notes[0] == notes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_equals_quantize_model_and_save_pretrained(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source, output, other = (tmp_path / n for n in ("source", "output", "other"))
    in_dtype(name, dtype, tmp_path / "float").save_pretrained(source)
    report = streamed(source, output, name)
    assert names_in(tmp_path) == ["float", "output", "source"]
    model = as_in_memory(source, name, other)
    assert_same_checkpoint(output, other)
    assert report == haq.quantization_report(model)
    assert report.complete
    loaded = haq.from_pretrained(output)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_head_that_stays_float_comes_first(tmp_path: Path) -> None:
    """Nothing of what is around the blocks is read twice."""
    source = tmp_path / "source"
    MODELS["opt"]().save_pretrained(source)
    for name, exclude in (("float", ("lm_head",)), ("int8", ())):
        output = tmp_path / name
        stop_in_block(source, output, 0, config=QuantizationConfig(exclude=exclude))
        files = names_in(incomplete(output) / "model")
        assert len(files) == (name == "float")


def test_files_and_index(tmp_path: Path) -> None:
    MODELS["opt"]().save_pretrained(tmp_path / "source")
    streamed(tmp_path / "source", tmp_path / "int8")
    files = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "int8").glob("*.safetensors")) == files
    index = json_of(tmp_path / "int8", INDEX)
    assert index["weight_map"].keys() == tensors_of(tmp_path / "int8").keys()
    around = load_file(tmp_path / "int8" / files[0])
    assert around["lm_head.weight"].dtype == torch.int8
    assert not any(".layers." in name for name in around)


# --- Stopped, and gone on with --------------------------------------------------------------------


def stop_in_block(source: Path, output: Path, block: int, **options: Any) -> None:
    original = stream.quantize_block

    def stopping(*arguments: Any, **more: Any) -> Any:
        if arguments[3].endswith(f".{block}"):
            raise KeyboardInterrupt
        return original(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "quantize_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            streamed(source, output, **options)


@pytest.fixture(scope="module", params=["opt", "gemma2", "mixtral"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A source, and what nothing stopped made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param]().save_pretrained(folder / "source")
    streamed(folder / "source", folder / "int8")
    return folder / "source", folder / "int8"


@pytest.mark.parametrize(
    "where", ["quantize_head", "published_pieces", "write_at_once", "check_finite", "finish"]
)
def test_stopped_in_the_head(
    where: str, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reference = made
    output, calls = tmp_path / "int8", 0
    original = getattr(stream, where)

    def stopping(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        # Pieces are looked at once before, and blocks are two.
        if calls == {"published_pieces": 2, "check_finite": 2}.get(where, 1):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stream, where, stopping)
        with pytest.raises(KeyboardInterrupt) as caught:
            streamed(source, output)
    blocks = 1 if where == "check_finite" else 2
    if where != "finish":  # All is done then, and nothing said.
        assert f"{blocks} blocks are done and kept in" in caught.value.__notes__[0]
    assert names_in(tmp_path) == ["int8.incomplete"]

    # Only what is left is done.
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("quantize_block", "quantize_head"):
            function = getattr(stream, name)

            def counted(*a: Any, function: Any = function, name: str = name, **o: Any) -> Any:
                seen.append(name)
                return function(*a, **o)

            patch.setattr(stream, name, counted)
        report = streamed(source, output)
    left = ["quantize_block"] * (2 - blocks) + ["quantize_head"] * (where != "finish")
    assert seen == left
    assert contents(output) == contents(reference)
    assert names_in(tmp_path) == ["int8"]
    assert report == QuantizationReport.from_dict(json_of(reference, "haq.json")["report"])


def test_stopped_at_every_block_and_in_the_head(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reference = made
    output = tmp_path / "int8"
    for block in range(2):
        stop_in_block(source, output, block)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream, "quantize_head", interrupt)
        with pytest.raises(KeyboardInterrupt):
            streamed(source, output)
    streamed(source, output)
    assert contents(output) == contents(reference)


def test_again_on_what_is_finished_changes_nothing(made: tuple[Path, Path]) -> None:
    source, reference = made
    before = contents(reference)
    report = streamed(source, reference)
    assert report.head is not None
    assert contents(reference) == before


def test_a_job_with_a_float_head_is_not_gone_on_with(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = made
    stop_in_block(source, tmp_path / "int8", 1)
    with pytest.raises(ValueError, match=r"another configuration: exclude was \[\] and is \['lm"):
        streamed(source, tmp_path / "int8", config=QuantizationConfig())


# --- What was written before ----------------------------------------------------------------------


def as_written_before(folder: Path) -> dict[str, Any]:
    """`haq.json` without what is said of heads."""
    notes = json_of(folder, "haq.json")
    for key in ("head", "with_head"):
        notes["report"].pop(key, None)
    (folder / "haq.json").write_text(json.dumps(notes))
    return notes


def test_a_report_that_says_nothing_of_heads(tmp_path: Path) -> None:
    model = haq.quantize_model(MODELS["llama"](), CALIBRATION, progress=False)
    haq.save_pretrained(model, tmp_path / "int8")
    as_written_before(tmp_path / "int8")
    loaded = haq.from_pretrained(tmp_path / "int8")
    assert_same(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_float_head_under_a_configuration_that_excludes_nothing(tmp_path: Path) -> None:
    """As it was made when heads were always float."""
    model = haq.quantize_model(MODELS["gemma2"](), CALIBRATION, progress=False)
    haq.save_pretrained(model, tmp_path / "int8")
    notes = as_written_before(tmp_path / "int8")
    notes["report"]["config"]["exclude"] = []
    (tmp_path / "int8" / "haq.json").write_text(json.dumps(notes))
    loaded = haq.from_pretrained(tmp_path / "int8")
    report = haq.quantization_report(loaded)
    assert report == replace(haq.quantization_report(model), config=QuantizationConfig(exclude=()))
    assert report.complete
    assert report.kept_float == ["lm_head"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded), logits_of(model))

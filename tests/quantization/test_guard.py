"""An int8 model says that `transformers` cannot save it; a float one saves as ever."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

import haq
from haq import quantize_model
from haq.quantization import block as block_module
from haq.quantization import pipeline
from haq.quantization.guard import Int8Guard, guard, unguard
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids

MODELS = ["opt", "llama", "gpt2", "mixtral"]
CALIBRATION = [token_ids(2, 24, seed=seed) for seed in range(3)]


def build(name: str) -> PreTrainedModel:
    return (ARCHITECTURES | MIXTURES)[name]()


@pytest.fixture(scope="module")
def quantized() -> dict[str, PreTrainedModel]:
    """To be looked at and called only."""
    config = haq.QuantizationConfig(smoothing="none")
    return {n: quantize_model(build(n), CALIBRATION, config, progress=False) for n in MODELS}


def interrupted(name: str, monkeypatch: pytest.MonkeyPatch, block: int) -> PreTrainedModel:
    """A model whose quantization stopped at a block."""
    model, calls = build(name), []
    with monkeypatch.context() as patch:

        def interrupt(*arguments: object) -> object:
            calls.append(1)
            if len(calls) > block:
                raise KeyboardInterrupt
            return block_module.quantize_block(*arguments)

        patch.setattr(pipeline, "quantize_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, CALIBRATION, progress=False)
    return model


def assert_does_not_save(model: PreTrainedModel, folder: Path) -> None:
    target = folder / "saved"
    with pytest.raises(ValueError, match=r"haq\.save_pretrained\(model, directory, tokenizer\)"):
        model.save_pretrained(target)
    assert not target.exists() or not any(target.iterdir())
    present = folder / "present"
    present.mkdir()
    (present / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"haq\.from_pretrained"):
        model.save_pretrained(present)
    assert [path.name for path in present.iterdir()] == ["mine.txt"]


def assert_saves(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = token_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_does_not_save(
    name: str, quantized: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    assert_does_not_save(quantized[name], tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_does_not_save(
    name: str, quantized: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    haq.save_pretrained(quantized[name], tmp_path / "int8")
    assert_does_not_save(haq.from_pretrained(tmp_path / "int8"), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_partly_quantized_model_does_not_save(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_does_not_save(interrupted(name, monkeypatch, 1), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_gone_on_with_does_not_save(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = interrupted(name, monkeypatch, 1)
    quantize_model(model, CALIBRATION, progress=False)
    assert_does_not_save(model, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_interrupted_in_its_first_block_saves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = interrupted(name, monkeypatch, 0)
    assert not hasattr(model, "hf_quantizer")
    assert_saves(model, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_refused_saves(name: str, tmp_path: Path) -> None:
    model = build(name)
    config = haq.QuantizationConfig(exclude=("nothing like it",))
    with pytest.raises(ValueError, match="nothing like it"):
        quantize_model(model, CALIBRATION, config, progress=False)
    with pytest.raises(TypeError):
        quantize_model(model, [torch.zeros(1, 4)], progress=False)
    assert_saves(model, tmp_path)


def test_a_model_with_nan_saves(tmp_path: Path) -> None:
    model = build("opt")
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize_model(model, CALIBRATION, progress=False)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def copied(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, PreTrainedModel)
    return again


@pytest.mark.parametrize("way", [copied, pickled])
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_does_not_save_either(
    name: str, way: object, quantized: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    model = quantized[name]
    again = way(model)  # type: ignore[operator]
    assert again.hf_quantizer is not model.hf_quantizer
    assert_does_not_save(again, tmp_path)
    ids = token_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    haq.save_pretrained(again, tmp_path / "int8")
    assert (tmp_path / "int8" / "haq.json").is_file()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_guarded_model_generates_what_one_without_does(
    name: str, options: dict[str, str], quantized: dict[str, PreTrainedModel]
) -> None:
    guarded, ids = quantized[name], token_ids(2, 8)
    free = copy.deepcopy(guarded)
    unguard(free)
    kwargs = {"max_new_tokens": 6, "do_sample": False, **options}
    expected = free.generate(ids, **kwargs)
    assert torch.equal(guarded.generate(ids, **kwargs), expected)
    # The cache is another, the text is not.
    assert torch.equal(guarded.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_a_guarded_model_is_not_for_training_and_can_be_compiled(
    quantized: dict[str, PreTrainedModel],
) -> None:
    quantizer = quantized["opt"].hf_quantizer
    assert isinstance(quantizer, Int8Guard)
    assert isinstance(quantizer, HfQuantizer)
    assert not quantizer.is_trainable
    assert quantizer.is_compileable


def test_unguard_undoes_guard_and_leaves_the_quantizer_of_another() -> None:
    model = build("opt")
    unguard(model)
    guard(model)
    guard(model)
    unguard(model)
    assert not hasattr(model, "hf_quantizer")
    other = object()
    model.hf_quantizer = other
    unguard(model)
    assert model.hf_quantizer is other

"""`quantize_model` on every architecture, and what it must keep when it is done or interrupted."""

import copy
import functools
import gc
import io
import pickle
import threading
import types
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import haq
from haq import QuantizationConfig, quantization_report, quantize_model
from haq.model.blocks import find_blocks
from haq.model.linears import linears
from haq.nn import Int8Linear
from haq.quantization import block as block_module
from haq.quantization import pipeline
from haq.quantization import report as report_module
from haq.quantization import work as work_module
from haq.quantization.report import find_report
from tests.architectures import ARCHITECTURES, LAYERS, token_ids

CALIBRATION = [token_ids(2, 24, seed=seed) for seed in range(4)]


# How many linear layers one block has.
LINEARS = {
    "opt": 6,
    "opt-post-norm": 6,
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3": 7,
    "phi3": 4,
    "gpt-neox": 4,
    "gpt2": 4,
    "phi": 6,
    "gptj": 6,
    "bloom": 4,
}


def quantize(name: str, **options: object) -> PreTrainedModel:
    config = QuantizationConfig(**options)
    return quantize_model(ARCHITECTURES[name](), CALIBRATION, config, progress=False)


@functools.cache
def quantized(name: str) -> PreTrainedModel:
    """With the defaults; to be looked at and called only."""
    return quantize(name)


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    torch.testing.assert_close(other_state, state, rtol=0, atol=0)


# --- Every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_of_every_block_becomes_int8_and_nothing_else_changes(name: str) -> None:
    before, after = ARCHITECTURES[name](), quantized(name)
    prefix, _ = find_blocks(before)
    modules, new_modules = dict(before.named_modules()), dict(after.named_modules())
    assert list(new_modules) == list(modules)
    replaced = 0
    for path, module in modules.items():
        if path.startswith(f"{prefix}.") and isinstance(module, nn.Linear | Conv1D):
            assert type(new_modules[path]) is Int8Linear, path
            replaced += 1
        else:
            assert type(new_modules[path]) is type(module), path
    assert replaced == LAYERS * LINEARS[name]

    # Outside of the blocks every bit is the same, tied heads included.
    kept = {key: value for key, value in before.state_dict().items() if prefix not in key}
    assert len(kept) >= 2
    state = after.state_dict()
    torch.testing.assert_close({key: state[key] for key in kept}, kept, rtol=0, atol=0)
    parameters = dict(after.named_parameters())
    assert all(value.requires_grad for value in parameters.values())
    tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_logits_stay_close(name: str) -> None:
    ids = token_ids(2, 24, seed=99)
    expected, got = (
        logits_of(model, ids).log_softmax(-1) for model in (ARCHITECTURES[name](), quantized(name))
    )
    divergence = (expected.exp() * (expected - got)).sum(-1).mean()
    # Two blocks of random weights, for which int8 is about at its worst. Wrong scales cost 0.1.
    assert 1e-8 < divergence < 2e-3


class Reference(nn.Module):
    """What an int8 layer is: integers times scales, summed in float64."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.asymmetric = layer.asymmetric
        self.weight = layer.weight.double() * layer.weight_scale.double()
        self.bias = None if layer.bias is None else layer.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:  # 256 integers from the smallest value, or zero, to the largest.
            low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
            scale = (high - low) / 255
            first, count = torch.round(low / scale), 255
        else:
            scale = x.abs().amax(-1, keepdim=True) / 127
            first, count = torch.full_like(scale, -127), 254
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        integers = torch.maximum(torch.round(x / scale), first)
        integers = torch.minimum(integers, first + count)
        output = (integers.double() * scale.double()) @ self.weight.T
        return (output if self.bias is None else output + self.bias).to(x.dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_logits_are_those_of_float64_arithmetic(name: str) -> None:
    model = quantized(name)
    reference = copy.deepcopy(model)
    for path, module in model.named_modules():
        if isinstance(module, Int8Linear):
            reference.set_submodule(path, Reference(module))
    ids = token_ids(2, 24, seed=99)
    got, expected = logits_of(model, ids), logits_of(reference, ids)
    # float32 against float64 until, once in a while, an input between two integers goes the other
    # way and moves some logits by a part of the step. The logits are of size 1.
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)
    assert (got - expected).abs().median() < 1e-5
    # A test that would pass for the float model as well would show nothing.
    difference = (logits_of(ARCHITECTURES[name](), ids) - expected).abs()
    assert difference.median() > 1e-4


# --- The same call, the same bytes ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_the_same_call_gives_the_same_bytes_and_the_same_report(name: str) -> None:
    again = quantize(name)
    assert_same_bits(again, quantized(name))
    assert quantization_report(again) == quantization_report(quantized(name))


def test_the_global_random_state_has_no_say_and_is_not_moved() -> None:
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    model = quantize("llama")
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(model, quantized("llama"))


def test_other_calibration_gives_other_weights() -> None:
    other = quantize_model(ARCHITECTURES["llama"](), [token_ids(2, 24, seed=77)], progress=False)
    weight = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(other.state_dict()[weight], quantized("llama").state_dict()[weight])


@pytest.mark.parametrize(
    "batches",
    [
        [{"input_ids": ids} for ids in CALIBRATION],
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in CALIBRATION],
        (ids for ids in CALIBRATION),
        tuple(CALIBRATION),
        torch.utils.data.DataLoader(torch.cat(CALIBRATION), batch_size=2),
    ],
    ids=["mappings", "masks of ones", "generator", "tuple", "data loader"],
)
def test_calibration_in_any_form(batches: object) -> None:
    model = quantize_model(ARCHITECTURES["llama"](), batches, progress=False)
    assert_same_bits(model, quantized("llama"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("opt", torch.int64),
        ("mistral", torch.int32),
        ("gemma2", torch.bool),
        ("bloom", torch.float32),
    ],
)
def test_the_tokens_at_padding_have_no_influence(name: str, dtype: torch.dtype) -> None:
    ids = token_ids(3, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, -4:] = 0
    masked = {"attention_mask": mask.to(dtype)}
    first, second = (
        quantize_model(
            ARCHITECTURES[name](),
            [{"input_ids": torch.where(mask == 1, ids, other)} | masked],
            progress=False,
        )
        for other in (torch.zeros_like(ids), token_ids(3, 24, seed=50))
    )
    assert_same_bits(first, second)
    report = quantization_report(first)
    assert report == quantization_report(second)
    assert report.tokens == {layer.tokens for layer in report.layers}.pop() == 3 * 24 - 9 - 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["opt", "llama", "gemma3"])
def test_a_padded_batch_counts_like_the_same_tokens_without_padding(name: str, side: str) -> None:
    ids = token_ids(2, 24)
    left = 6 if side == "left" else 0
    padded = nn.functional.pad(ids, (left, 6 - left))
    mask = nn.functional.pad(torch.ones_like(ids), (left, 6 - left))
    batch = {"input_ids": padded, "attention_mask": mask}
    model = quantize_model(ARCHITECTURES[name](), [batch], progress=False)
    plain = quantize_model(ARCHITECTURES[name](), [ids], progress=False)
    assert quantization_report(model).tokens == quantization_report(plain).tokens == 48
    # Sums of another length are rounded otherwise, and a weight between two integers may go the
    # other way; hardly any is.
    differing = [
        (model.get_submodule(path).weight != module.weight).float().mean().item()
        for path, module in plain.named_modules()
        if isinstance(module, Int8Linear)
    ]
    assert sum(differing) / len(differing) < 0.01


# --- Dtypes, modes and options --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "gpt2"])
def test_a_16_bit_model_stays_a_16_bit_model(name: str, dtype: torch.dtype) -> None:
    before = ARCHITECTURES[name]().to(dtype)
    model = quantize_model(copy.deepcopy(before), CALIBRATION, progress=False)
    dtypes = {path: parameter.dtype for path, parameter in before.named_parameters()}
    assert {path: dtypes[path] for path, _ in model.named_parameters()} == {
        path: parameter.dtype for path, parameter in model.named_parameters()
    }
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert {layer.weight_scale.dtype for layer in layers} == {torch.float32}
    assert {layer.bias.dtype for layer in layers if layer.bias is not None} <= {torch.float32}
    ids = token_ids(2, 24, seed=99)
    got, expected = logits_of(model, ids), logits_of(before, ids)
    assert got.dtype == dtype
    noise = (got.float() - expected.float()).norm() / expected.float().norm()
    assert noise < 0.1
    # Moving it to another dtype afterwards must not break what is int8.
    assert logits_of(model.float(), ids).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_model_is_returned_in_its_mode(training: bool) -> None:
    model = ARCHITECTURES["gpt2"]().train(training)  # Its blocks have dropout.
    returned = quantize_model(model, CALIBRATION, progress=False)
    assert returned is model
    assert all(module.training == training for module in model.modules())
    assert_same_bits(model, quantized("gpt2"))


def test_inside_inference_mode_it_makes_ordinary_parameters() -> None:
    model = ARCHITECTURES["llama"]()
    with torch.inference_mode():
        quantize_model(model, CALIBRATION, progress=False)
    assert_same_bits(model, quantized("llama"))
    assert model(CALIBRATION[0]).logits.requires_grad


OPTIONS = {
    "search": {"smoothing": "search"},
    "fixed": {"smoothing": "fixed", "smoothing_strength": 0.8},
    "none": {"smoothing": "none"},
    "search, nearest": {"rounding": "nearest"},
    "fixed, nearest": {"smoothing": "fixed", "rounding": "nearest"},
    "none, nearest": {"smoothing": "none", "rounding": "nearest"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_combination_of_options_works_and_is_reported(options: dict[str, object]) -> None:
    model = quantize("opt", **options)
    report = quantization_report(model)
    assert report.config == QuantizationConfig(**options)
    assert {layer.rounding for layer in report.layers} == {report.config.rounding}
    families = {layer.smoothing.split()[0] for layer in report.layers}
    assert (
        families
        <= {"search": {"none", "p4"}, "fixed": {"smoothquant"}, "none": {"none"}}[
            report.config.smoothing
        ]
    )
    ids = token_ids(2, 24, seed=99)
    expected = logits_of(ARCHITECTURES["opt"](), ids)
    assert (logits_of(model, ids) - expected).norm() / expected.norm() < 0.03


def planted(name: str) -> PreTrainedModel:
    """The same function, with one channel of every norm's output a hundred times larger."""
    model = ARCHITECTURES[name]()
    for block in find_blocks(model)[1]:
        for norm, readers in (
            (block.self_attn_layer_norm, ("q_proj", "k_proj", "v_proj")),
            (block.final_layer_norm, ("fc1",)),
        ):
            norm.weight.data[5] *= 100
            norm.bias.data[5] *= 100
            for path, module in block.named_modules():
                if path.rpartition(".")[2] in readers:
                    module.weight.data[:, 5] /= 100
    return model


def test_each_step_pays_where_there_are_outliers() -> None:
    ids = token_ids(4, 24, seed=99)
    expected = logits_of(planted("opt"), ids)
    torch.testing.assert_close(expected, logits_of(ARCHITECTURES["opt"](), ids))

    def error(**options: object) -> float:
        config = QuantizationConfig(**options)
        model = quantize_model(planted("opt"), CALIBRATION, config, progress=False)
        return float((logits_of(model, ids) - expected).norm() / expected.norm())

    nearest = error(smoothing="none", rounding="nearest")
    smoothed = error(rounding="nearest")
    assert smoothed < 0.2 * nearest
    assert error() < smoothed


# --- Exclusions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.v_proj", {"self_attn.v_proj"}),
        ("*.self_attn", {f"self_attn.{name}_proj" for name in "qkvo"}),
        ("*.mlp.*", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("model.layers.?.mlp.[gu]*", {"mlp.gate_proj", "mlp.up_proj"}),
    ],
    ids=["leaf", "parent", "wildcard", "character class"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_excluded_modules_keep_their_bits(
    pattern: str, expected: set[str], dtype: torch.dtype
) -> None:
    before = ARCHITECTURES["llama"]().to(dtype)
    config = QuantizationConfig(exclude=("lm_head", pattern))
    model = quantize_model(copy.deepcopy(before), CALIBRATION, config, progress=False)
    paths = {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in expected}
    assert set(linears(model)) == paths | {"lm_head"}
    for path in paths:
        assert torch.equal(model.get_submodule(path).weight, before.get_submodule(path).weight)
    report = quantization_report(model)
    assert sorted(report.kept_float) == sorted(paths | {"lm_head"})
    assert not paths & {layer.name for layer in report.layers}


def test_one_block_can_be_excluded() -> None:
    before = ARCHITECTURES["llama"]()
    config = QuantizationConfig(exclude=("model.layers.1",))
    model = quantize_model(copy.deepcopy(before), CALIBRATION, config, progress=False)
    torch.testing.assert_close(
        model.model.layers[1].state_dict(), before.model.layers[1].state_dict(), rtol=0, atol=0
    )
    assert_same_bits(model.model.layers[0], quantized("llama").model.layers[0])
    assert [len(block.layers) for block in quantization_report(model).blocks] == [7, 0]


# --- The report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_report_lists_what_happened(name: str) -> None:
    before, model = ARCHITECTURES[name](), quantized(name)
    prefix, _ = find_blocks(before)
    report = quantization_report(model)
    assert report.model == type(before).__name__
    assert report.config == QuantizationConfig()
    assert report.num_blocks == LAYERS
    assert report.complete
    assert report.tokens == 4 * 2 * 24
    assert report.kept_float == [n for n in linears(before) if not n.startswith(f"{prefix}.")]
    assert {layer.name: (layer.out_features, layer.in_features) for layer in report.layers} == {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, Int8Linear)
    }
    assert {(layer.tokens, layer.rounding, layer.note) for layer in report.layers} == {
        (report.tokens, "hessian", "")
    }
    assert all(0 < layer.error_after < 1e-2 for layer in report.layers)


def test_a_layer_whose_input_is_all_zero_works_and_is_reported() -> None:
    model = ARCHITECTURES["opt"]()
    fc1 = model.model.decoder.layers[1].fc1
    with torch.no_grad():
        fc1.weight.zero_()
        fc1.bias.fill_(-1.0)
    ids = token_ids(2, 24, seed=99)
    expected = logits_of(model, ids)
    quantize_model(model, CALIBRATION, progress=False)
    notes = {layer.name: layer.note for layer in quantization_report(model).layers if layer.note}
    assert notes == {
        "model.decoder.layers.1.fc2": "its input was zero for every token: rounded to nearest"
    }
    assert "1 of 12 layers carry a note" in str(quantization_report(model))
    assert (logits_of(model, ids) - expected).norm() / expected.norm() < 0.03


# --- Interrupts -----------------------------------------------------------------------------------


def interrupt_in_second_block(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Quantize the first block only; returns the notes on the exception."""
    with monkeypatch.context() as patch:
        calls: list[str] = []

        def interrupt(*arguments: object) -> object:
            calls.append("called")
            if len(calls) == 2:
                raise KeyboardInterrupt
            return block_module.quantize_block(*arguments)

        patch.setattr(pipeline, "quantize_block", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize_model(model, CALIBRATION, progress=False)
    return caught.value.__notes__


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_interrupted_model_works_and_the_same_call_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = ARCHITECTURES[name](), ARCHITECTURES[name]()
    notes = interrupt_in_second_block(model, monkeypatch)
    assert notes == [
        "haq: 1 of 2 blocks of the model are int8 and work; the others are as they were. The same "
        "call goes on after them; load the model again to start afresh."
    ]
    _, blocks = find_blocks(model)
    assert_same_bits(blocks[0], find_blocks(quantized(name))[1][0])
    assert_same_bits(blocks[1], find_blocks(before)[1][1])
    assert not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = token_ids(1, 12)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    report = quantization_report(model)
    assert not report.complete
    assert "Incomplete: 1 of 2 blocks are int8." in str(report)

    quantize_model(model, CALIBRATION, progress=False)
    assert_same_bits(model, quantized(name))
    assert quantization_report(model) == quantization_report(quantized(name))


def test_an_interrupted_model_is_not_continued_with_another_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ARCHITECTURES["opt"]()
    interrupt_in_second_block(model, monkeypatch)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"partly int8: 1 of 2 blocks.*damping=0\.01.*to go on"):
        quantize_model(model, CALIBRATION, QuantizationConfig(damping=0.02), progress=False)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert len(quantization_report(model).blocks) == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_interrupt_in_the_first_block_leaves_the_model_as_it_was(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    model = ARCHITECTURES["opt"]().train(training)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_block", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize_model(model, CALIBRATION, progress=False)
    assert caught.value.__notes__ == ["haq: the model is as it was, no block was converted."]
    assert_same_bits(model, ARCHITECTURES["opt"]())
    assert model.training is training
    assert find_report(model) is None
    # Nothing remembers the first attempt: another configuration is fine.
    quantize_model(model, CALIBRATION, QuantizationConfig(damping=0.02), progress=False)


def test_an_interrupt_while_inputs_are_caught_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ARCHITECTURES["llama"]()

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.rotary_emb, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize_model(model, CALIBRATION, progress=False)
    assert caught.value.__notes__ == ["haq: the model is as it was, no block was converted."]
    assert_same_bits(model, ARCHITECTURES["llama"]())


def interrupt_at(blocks: nn.ModuleList, index: int, *, after: bool = False) -> None:
    """Raise once when block ``index`` is to be replaced, after which it is or is not."""

    class Interrupted(nn.ModuleList):
        def __setitem__(self, position: int, module: nn.Module) -> None:
            # Stubs stand in for all blocks while inputs are caught.
            int8 = any(isinstance(part, Int8Linear) for part in module.modules())
            if position != index or not int8:
                super().__setitem__(position, module)
                return
            self.__class__ = nn.ModuleList
            if after:
                self[position] = module
            raise KeyboardInterrupt

    blocks.__class__ = Interrupted


def interrupted(model: PreTrainedModel) -> list[str]:
    """The notes on the exception of a call that is interrupted."""
    with pytest.raises(KeyboardInterrupt) as caught:
        quantize_model(model, CALIBRATION, progress=False)
    return caught.value.__notes__


AS_IT_WAS = "haq: the model is as it was, no block was converted."
ALL_DONE = "haq: all 2 blocks of the model are int8 and work: it is done."
SOME_DONE = (
    "haq: {} of 2 blocks of the model are int8 and work; the others are as they were. The same "
    "call goes on after them; load the model again to start afresh."
)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
@pytest.mark.parametrize("after", [False, True], ids=["not replaced", "replaced"])
@pytest.mark.parametrize("index", [0, 1])
def test_an_interrupt_between_the_report_and_the_block(name: str, index: int, after: bool) -> None:
    """A block is int8 if and only if it has its line, whichever of the two came first."""
    model, before = ARCHITECTURES[name](), ARCHITECTURES[name]()
    _, blocks = find_blocks(model)
    interrupt_at(blocks, index, after=after)
    notes = interrupted(model)

    done = index + after
    assert notes == [(AS_IT_WAS, SOME_DONE.format(done), ALL_DONE)[done]]
    for i in range(LAYERS):
        expected = quantized(name) if i < done else before
        assert_same_bits(blocks[i], find_blocks(expected)[1][i])
    report = find_report(model)
    if done:
        assert report.blocks == quantization_report(quantized(name)).blocks[:done]
    else:
        assert report is None
    if done == LAYERS:
        # Nothing is left to do: the note says so, and another call that it is int8.
        with pytest.raises(ValueError, match=r"`model` is already int8"):
            quantize_model(model, CALIBRATION, progress=False)
    else:
        quantize_model(model, CALIBRATION, progress=False)
    assert_same_bits(model, quantized(name))
    assert quantization_report(model) == quantization_report(quantized(name))


def test_an_interrupt_of_the_handling_of_an_interrupt_is_made_good_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ARCHITECTURES["opt"]()
    _, blocks = find_blocks(model)
    interrupt_at(blocks, 1)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_drop_what_is_not_there", lambda *arguments: None)
        interrupted(model)
    # One line too many, as an interrupt at the worst moment leaves it.
    assert len(quantization_report(model).blocks) == 2
    quantize_model(model, CALIBRATION, progress=False)
    assert_same_bits(model, quantized("opt"))
    assert quantization_report(model) == quantization_report(quantized("opt"))


@pytest.mark.parametrize("when", ["in block 1", "before block 1 is replaced"])
def test_a_block_of_which_all_is_excluded_keeps_its_line(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no int8 layer that would show that it is done."""
    config = QuantizationConfig(exclude=("model.layers.0",))
    model, other = ARCHITECTURES["llama"](), ARCHITECTURES["llama"]()

    def interrupt(*arguments: object) -> object:
        if arguments[3] == "model.layers.1":
            raise KeyboardInterrupt
        return block_module.quantize_block(*arguments)

    with monkeypatch.context() as patch:
        if when == "in block 1":
            patch.setattr(pipeline, "quantize_block", interrupt)
        else:
            interrupt_at(find_blocks(model)[1], 1)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize_model(model, CALIBRATION, config, progress=False)
    assert caught.value.__notes__ == [SOME_DONE.format(1)]
    assert [len(block.layers) for block in quantization_report(model).blocks] == [0]
    for each in (model, other):
        quantize_model(each, CALIBRATION, config, progress=False)
    assert_same_bits(model, other)
    assert quantization_report(model) == quantization_report(other)


# --- Copies, threads and the compiler -------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_copies_and_pickles_give_the_same_logits(name: str) -> None:
    model, ids = quantized(name), token_ids(2, 24, seed=99)
    expected = logits_of(model, ids)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stored, weights_only=False),
    ):
        assert torch.equal(logits_of(other, ids), expected)
        assert quantization_report(other) == quantization_report(model)
        assert_same_bits(other, model)


@pytest.mark.parametrize("exclude", [("lm_head",), ()], ids=["head float", "head int8"])
@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "gpt2"])
def test_all_modules_share_the_configuration_of_the_model(
    name: str, exclude: tuple[str, ...]
) -> None:
    """Blocks are copies: what is set in the model's configuration has to reach them, too."""
    model = quantize(name, exclude=exclude)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert len(configs) > LAYERS
    assert all(config is model.config for config in configs)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    ids = token_ids(2, 24, seed=99)
    torch.testing.assert_close(logits_of(other, ids), logits_of(model, ids), rtol=0, atol=5e-3)
    configs = [module.config for module in other.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {"eager"}


def test_a_copy_does_not_share_its_report() -> None:
    other = copy.deepcopy(quantized("opt"))
    quantization_report(other).blocks.clear()
    assert quantization_report(quantized("opt")).complete


@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_threads_get_what_one_gets(name: str) -> None:
    model = quantized(name)
    prompts = [token_ids(2, 20 + i, seed=i) for i in range(2)]
    expected = [logits_of(model, ids) for ids in prompts]
    results: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        results[index] += [logits_of(model, prompts[index]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 20
        assert all(torch.equal(logits, expected[index]) for logits in results[index])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_compiled_model_gives_the_same_logits(name: str, backend: str) -> None:
    torch.compiler.reset()
    model, ids = quantized(name), token_ids(2, 24, seed=99)
    compiled = torch.compile(model, backend=backend)
    assert torch.equal(logits_of(compiled, ids), logits_of(model, ids))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_compiles_a_model() -> None:
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    model, ids = quantized("llama"), token_ids(2, 24, seed=99)
    got = logits_of(torch.compile(model, backend="inductor"), ids)
    # It adds in another order, and an input between two integers may go the other way.
    torch.testing.assert_close(got, logits_of(model, ids), rtol=0, atol=5e-3)


# --- Memory and progress --------------------------------------------------------------------------


def test_only_one_block_is_there_in_float_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float layer of the blocks before is gone when the next block begins.

    Without the help of the garbage collector, which comes when it likes.
    """
    model = ARCHITECTURES["llama"]()
    model.model.layers.extend(ARCHITECTURES["llama"]().model.layers)
    model.config.num_hidden_layers = 4
    originals = [[weakref.ref(m) for m in linears(b).values()] for b in model.model.layers]
    copies: list[list[weakref.ref]] = []
    alive: list[tuple[int, int]] = []

    def deepcopy(module: nn.Module, memo: dict[int, object]) -> nn.Module:
        copied = copy.deepcopy(module, memo)
        copies.append([weakref.ref(m) for m in linears(copied).values()])
        return copied

    def count(references: list[list[weakref.ref]]) -> int:
        return sum(reference() is not None for block in references for reference in block)

    def quantize_block(*arguments: object) -> object:
        done = len(alive)
        alive.append((count(originals[:done]), count(copies)))
        return block_module.quantize_block(*arguments)

    monkeypatch.setattr(work_module, "copy", types.SimpleNamespace(deepcopy=deepcopy))
    monkeypatch.setattr(pipeline, "quantize_block", quantize_block)
    gc.disable()
    try:
        quantize_model(model, CALIBRATION, progress=False)
        assert (count(originals), count(copies)) == (0, 0)
    finally:
        gc.enable()
    assert alive == [(0, 0)] * 4
    assert [len(block) for block in copies] == [7] * 4


def test_hidden_states_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that went into the blocks before are gone."""
    inputs: list[list[weakref.ref]] = []
    alive: list[int] = []

    def quantize_block(block: nn.Module, batches: list, *rest: object) -> object:
        alive.append(sum(hidden() is not None for batch in inputs for hidden in batch))
        inputs.append([weakref.ref(batch.hidden) for batch in batches])
        return block_module.quantize_block(block, batches, *rest)

    monkeypatch.setattr(pipeline, "quantize_block", quantize_block)
    gc.disable()
    try:
        quantize("llama")
    finally:
        gc.enable()
    assert alive == [0, 0]


@pytest.mark.parametrize(("exclude", "total"), [(("lm_head",), LAYERS), ((), LAYERS + 1)])
@pytest.mark.parametrize("progress", [True, False], ids=["shown", "hidden"])
def test_the_bar_counts_blocks_and_the_head(
    progress: bool, exclude: tuple[str, ...], total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[dict] = []
    updates: Counter[str] = Counter()

    class Bar:
        def __init__(self, **options: object) -> None:
            bars.append(options)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *exception: object) -> None:
            updates["closed"] += 1

        def update(self) -> None:
            updates["blocks"] += 1

    monkeypatch.setattr(pipeline.logging, "tqdm", Bar)
    config = QuantizationConfig(exclude=exclude)
    quantize_model(ARCHITECTURES["opt"](), CALIBRATION, config, progress=progress)
    (options,) = bars
    assert (options["total"], options["unit"]) == (total, "block")
    # None: hidden where the output is not a terminal.
    assert options["disable"] is (None if progress else True)
    assert updates == {"blocks": total, "closed": 1}


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    quantize_model(ARCHITECTURES["opt"](), CALIBRATION)
    assert capfd.readouterr() == ("", "")


PUBLIC = {
    "BlockReport": report_module,
    "Comparison": haq.evaluation,
    "Costs": haq.offload.costs,
    "ExpertOffloader": haq.offload.offloader,
    "Int8Experts": haq.nn,
    "Int8Linear": haq.nn,
    "LayerReport": report_module,
    "OffloadConfig": haq.config,
    "OffloadReport": haq.offload.report,
    "Placement": haq.offload.placement,
    "QuantizationConfig": haq.config,
    "QuantizationReport": report_module,
    "RoutingReport": report_module,
    "RoutingStatistics": haq.offload.routing,
    "Simulation": haq.offload.simulation,
    "backends": haq.int8.matmul,
    "calibration_batches": haq.quantization.calibration,
    "channel_magnitudes": haq.evaluation,
    "compare": haq.evaluation,
    "evaluation_tokens": haq.evaluation,
    "find_offloader": haq.offload.offloader,
    "from_pretrained": haq.checkpoint.load,
    "perplexity": haq.evaluation,
    "quantization_report": report_module,
    "quantize_checkpoint": haq.checkpoint.stream,
    "quantize_model": pipeline,
    "routing_trace": haq.offload.routing,
    "save_pretrained": haq.checkpoint.save,
    "simulate": haq.offload.simulation,
    "use_backend": haq.int8.matmul,
}


def test_public_names() -> None:
    assert haq.__all__ == sorted(PUBLIC)
    for name, module in PUBLIC.items():
        assert getattr(haq, name) is getattr(module, name)

"""An int8 head: what becomes of it, what it costs, and what an interrupt leaves."""

import copy
import functools
import io
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OPTModel, PreTrainedModel

from haq import ExpertOffloader, QuantizationConfig, quantization_report, quantize_model
from haq.model.blocks import capture_block_inputs, find_blocks, run_block
from haq.model.heads import find_head
from haq.model.tail import Route, tail_batches
from haq.nn import Int8Linear
from haq.processes import ALONE, Processes
from haq.quantization import head as head_module
from haq.quantization import pipeline
from haq.quantization.head import QuantizedHead, quantize_head
from haq.quantization.report import QuantizationReport, find_report
from tests.architectures import ARCHITECTURES, EXCLUDE, LAYERS, MIXTURES, VOCABULARY, token_ids
from tests.conftest import ModelFactory
from tests.heads import MORE_HEADS
from tests.quantization.test_pipeline import Reference, assert_same_bits, logits_of
from tests.quantization.test_rounding import damped, optimal_brain_surgeon
from tests.test_processes import Two

MODELS: dict[str, Callable[[], PreTrainedModel]] = ARCHITECTURES | MIXTURES | MORE_HEADS
CALIBRATION = [token_ids(2, 24, seed=seed) for seed in range(4)]
UNSEEN = token_ids(2, 24, seed=99)


def quantize(model: str | PreTrainedModel, **options: Any) -> PreTrainedModel:
    """With an int8 head, unless ``exclude`` says otherwise."""
    name = model if isinstance(model, str) else ""
    options = {"exclude": EXCLUDE.get(name, ())} | options
    built = MODELS[model]() if isinstance(model, str) else model
    return quantize_model(built, CALIBRATION, QuantizationConfig(**options), progress=False)


@functools.cache
def quantized(name: str) -> PreTrainedModel:
    """With the defaults and an int8 head; to be looked at and called only."""
    return quantize(name)


@functools.cache
def with_float_head(name: str) -> PreTrainedModel:
    """Likewise, with the head as it was."""
    return quantize(name, exclude=("lm_head", *EXCLUDE.get(name, ())))


def head_of(model: PreTrainedModel) -> Int8Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear)
    return head


def name_of_head(name: str) -> str:
    head = find_head(MODELS[name]())
    assert head is not None
    return head


@contextmanager
def heard(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs ``[T, K]`` and outputs ``[T, N]`` of a module's calls."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, arguments: Any, output: Tensor) -> None:
        calls.append((arguments[0].flatten(0, -2), output.flatten(0, -2)))

    handle = module.register_forward_hook(note)
    yield calls
    handle.remove()


def calls_of(model: PreTrainedModel, module: nn.Module) -> tuple[Tensor, Tensor]:
    """On all of calibration."""
    with heard(module) as calls:
        for ids in CALIBRATION:
            logits_of(model, ids)
    return torch.cat([x for x, _ in calls]), torch.cat([y for _, y in calls])


# --- Every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_head_becomes_int8_and_what_is_before_it_takes_the_scale(name: str) -> None:
    before, other, after = MODELS[name](), with_float_head(name), quantized(name)
    head = name_of_head(name)
    assert type(after.get_submodule(head)) is Int8Linear
    assert head_of(after) is after.get_submodule(head)
    assert head_of(after).weight.shape == before.get_submodule(head).weight.shape
    assert list(dict(after.named_modules())) == list(dict(other.named_modules()))
    # Blocks are those of a model whose head stays float.
    for block, expected in zip(find_blocks(after)[1], find_blocks(other)[1], strict=True):
        assert_same_bits(block, expected)

    # Around them nothing changes but the head, and what made its input.
    prefix, _ = find_blocks(before)
    state, expected = after.state_dict(), before.state_dict()
    around = [key for key in expected if not key.startswith((f"{prefix}.", f"{head}."))]
    changed = {key for key in around if not torch.equal(state[key], expected[key])}
    assert {key.rpartition(".")[2] for key in changed} <= {"weight", "bias"}
    owners = {key.rpartition(".")[0] for key in changed}
    assert len(owners) == (0 if name == "olmo" else 1)
    assert not any("embed" in owner or "wte" in owner for owner in owners)

    embeddings = after.get_input_embeddings().weight
    assert isinstance(embeddings, nn.Parameter)
    assert torch.equal(embeddings, before.get_input_embeddings().weight)
    trained = {key: p.requires_grad for key, p in before.named_parameters()}
    assert {key: p.requires_grad for key, p in after.named_parameters()} == {
        key: trained[key] for key, _ in after.named_parameters()
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_stay_close(name: str) -> None:
    """Beside a model with a float head: in a mixture, what experts are chosen costs more."""
    expected, got = (
        logits_of(model, UNSEEN).log_softmax(-1)
        for model in (with_float_head(name), quantized(name))
    )
    divergence = (expected.exp() * (expected - got)).sum(-1).mean()
    # Wrong scales, or a scale that was folded on one side only, cost 1e-2 and more.
    assert 1e-9 < divergence < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_float64_arithmetic(name: str) -> None:
    """Caps and factors on logits come after the head, those on hidden states before it."""
    model = quantized(name)
    reference = copy.deepcopy(model)
    reference.set_submodule(name_of_head(name), Reference(head_of(model)))
    got, expected = logits_of(model, UNSEEN), logits_of(reference, UNSEEN)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    difference = (logits_of(with_float_head(name), UNSEEN) - expected).abs()
    assert difference.median() > 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_report_says_what_the_head_loses(name: str) -> None:
    """Beside the float head on the same hidden states, in float64."""
    model = quantized(name)
    report = quantization_report(model)
    line = report.head
    assert line is not None
    assert line is report.layers[-1]
    assert line.name == name_of_head(name)
    assert (line.out_features, line.in_features) == tuple(head_of(model).weight.shape)
    assert line.tokens == report.tokens == 4 * 2 * 24
    assert line.rounding == "hessian"
    assert line.note == ""
    assert line.asymmetric == head_of(model).asymmetric
    assert (line.smoothing == "-") == (name == "olmo")
    assert report.complete
    assert report.with_head
    assert line.name not in report.kept_float
    assert line.name in str(report)
    assert QuantizationReport.from_dict(report.to_dict()) == report

    # The same blocks with the float head, which reads what it read before.
    other = with_float_head(name)
    inputs, _ = calls_of(other, other.get_output_embeddings())
    weight = other.get_output_embeddings().weight.detach().double()
    exact = inputs.double() @ weight.T
    _, got = calls_of(model, head_of(model))
    if line.name != "embed_out" and head_of(model).bias is not None:
        exact += head_of(model).bias.double()
    error = float((got - exact).square().sum() / exact.square().sum())
    assert line.error_after == pytest.approx(error, rel=0.02)
    nearest = Reference(Int8Linear.from_float(weight.float()))(inputs).double()
    plain = inputs.double() @ weight.T
    energy = exact.square().sum()
    error = float((nearest - plain).square().sum() / energy)
    assert line.error_before == pytest.approx(error, rel=0.02)
    assert line.error_after < line.error_before


def test_a_head_that_stays_float_is_no_part_of_the_report() -> None:
    report = quantization_report(with_float_head("llama"))
    assert report.head is None
    assert not report.with_head
    assert report.complete
    assert report.kept_float == ["lm_head"]
    assert [layer.name for layer in report.layers if "head" in layer.name] == []


@pytest.mark.parametrize("name", ["phi", "gptj"])
def test_a_bias_comes_along_with_memory_of_its_own(name: str) -> None:
    model, before = quantized(name), MODELS[name]()
    bias = head_of(model).bias
    assert bias is not None
    assert torch.equal(bias, before.lm_head.bias)
    built = MODELS[name]()
    address = built.lm_head.bias.data_ptr()
    assert head_of(quantize(built)).bias.data_ptr() != address


# --- How it is made -------------------------------------------------------------------------------


def rounded_tokens(x: np.ndarray) -> np.ndarray:
    """Every row on a symmetric grid of its own."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def planted(outlier: float = 100) -> PreTrainedModel:
    """The same function, with one channel of what the head reads so many times larger."""
    model = ARCHITECTURES["opt"]()
    norm = model.model.decoder.final_layer_norm
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    norm.weight.data[5] *= outlier
    norm.bias.data[5] *= outlier
    model.lm_head.weight.data[:, 5] /= outlier
    return model


@pytest.mark.parametrize("outlier", [1, 100])
def test_the_integers_are_those_of_the_textbook(outlier: float) -> None:
    """With an outlier most channels are small integers: moments of floats would be others."""
    plain = {"smoothing": "none", "asymmetric_inputs": False}
    model = quantize(planted(outlier), **plain)
    inputs, _ = calls_of(model, head_of(model))
    exact = inputs.double().numpy()
    seen = rounded_tokens(exact)
    weight = planted(outlier).lm_head.weight.detach().double().numpy()
    scale = np.abs(weight).max(1) / 127
    expected, of_floats = (
        optimal_brain_surgeon(weight, scale, damped(x.T @ x / len(x), 0.01)) for x in (seen, exact)
    )
    integers = head_of(model).weight.numpy()
    # Float32 sums may turn what is half a step from both.
    assert (integers == expected).mean() > 0.995
    if outlier > 1:
        assert (integers == of_floats).mean() < 0.9
    np.testing.assert_allclose(head_of(model).weight_scale[:, 0].numpy(), scale, rtol=1e-6)
    nearest = np.rint(weight / scale[:, None])
    assert (integers == nearest).mean() < 0.9
    model = quantize(planted(outlier), **plain, rounding="nearest")
    np.testing.assert_array_equal(head_of(model).weight.numpy(), nearest)
    line = quantization_report(model).head
    assert line is not None
    assert (line.rounding, line.error_before) == ("nearest", pytest.approx(line.error_after))


@pytest.mark.parametrize("name", ["llama", "phi", "mixtral"])
def test_it_makes_no_difference_how_many_rows_are_looked_at_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_ROWS", 7)
    model = quantize(name)
    assert (head_of(model).weight == head_of(quantized(name)).weight).float().mean() > 0.999
    torch.testing.assert_close(head_of(model).weight_scale, head_of(quantized(name)).weight_scale)
    lines = [quantization_report(m).head for m in (model, quantized(name))]
    assert lines[0].smoothing == lines[1].smoothing
    assert lines[0].asymmetric == lines[1].asymmetric
    for error in ("error_before", "error_after"):
        assert getattr(lines[0], error) == pytest.approx(getattr(lines[1], error), rel=1e-3)


class Shapes(TorchDispatchMode):
    """The shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.seen[tuple(tensor.shape)] += 1
        return result


def test_no_logits_and_no_float32_copy_of_the_head(
    tiny_llama: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_ROWS", 60)
    vocabulary = 101  # No other size is.
    model = tiny_llama(vocab_size=vocabulary).bfloat16()
    with Shapes() as shapes:
        quantize(model)
    assert isinstance(head_of(model), Int8Linear)
    assert [s for s in shapes.seen if len(s) > 1 and s[-1] == vocabulary] == []
    # Rows of it, and the tokens' products with them, are there.
    assert {(60, 32), (41, 32), (8 * 24, 60), (8 * 24, 41)} <= shapes.seen.keys()
    with Shapes() as shapes:
        logits_of(tiny_llama(vocab_size=vocabulary), UNSEEN)
    assert shapes.seen[2, 24, vocabulary]


@pytest.mark.parametrize(("smoothing", "limit"), [("search", 0.1), ("fixed", 0.1)])
def test_an_outlier_is_smoothed_away(smoothing: str, limit: float) -> None:
    def line(how: str) -> Any:
        model = quantize(planted(), smoothing=how, smoothing_strength=0.8)
        return quantization_report(model).head

    plain, smoothed = line("none"), line(smoothing)
    assert plain.smoothing == "none"
    assert smoothed.smoothing.split()[0] == {"search": "p4", "fixed": "smoothquant"}[smoothing]
    assert smoothed.error_before == pytest.approx(plain.error_before, rel=0.2)
    assert smoothed.error_after < limit * plain.error_after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["opt", "opt-post-norm", "llama", "gemma2", "gptj", "mixtral"])
def test_a_16_bit_model(name: str, dtype: torch.dtype) -> None:
    before = MODELS[name]().to(dtype)
    other = quantize(copy.deepcopy(before), exclude=("lm_head",))
    model = quantize(copy.deepcopy(before))
    dtypes = {path: parameter.dtype for path, parameter in other.named_parameters()}
    dtypes.pop("lm_head.weight", None)
    dtypes.pop("lm_head.bias", None)
    assert {path: parameter.dtype for path, parameter in model.named_parameters()} == dtypes
    line = quantization_report(model).head
    assert line is not None
    assert line.smoothing.startswith("p4") or name == "opt-post-norm"
    # What the scale was folded into is rounded to 16 bit, and the head makes good for it.
    expected, got = (logits_of(m, UNSEEN).float() for m in (other, model))
    assert (got - expected).norm() / expected.norm() < 0.02
    assert logits_of(model, UNSEEN).dtype == dtype


def test_an_excluded_norm_stays_as_it_is() -> None:
    before = ARCHITECTURES["llama"]()
    model = quantize("llama", exclude=("model.norm",))
    assert torch.equal(model.model.norm.weight, before.model.norm.weight)
    line = quantization_report(model).head
    assert line is not None
    assert (line.smoothing, line.note) == ("-", "not smoothed: `model.norm` is excluded")
    model = quantize("llama", exclude=("model.norm",), smoothing="none")
    assert quantization_report(model).head.note == ""


def test_a_scale_that_does_not_fold_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "same_function", lambda *arguments: False)
    before, model = ARCHITECTURES["llama"](), quantize("llama")
    assert torch.equal(model.model.norm.weight, before.model.norm.weight)
    line = quantization_report(model).head
    assert line is not None
    assert (line.smoothing, line.note) == ("-", "folding changed the model: not smoothed")
    assert line.error_after < line.error_before
    expected = logits_of(with_float_head("llama"), UNSEEN)
    assert (logits_of(model, UNSEEN) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centered", "shifted"])
def test_tokens_have_a_zero_point_where_that_pays(shift: float) -> None:
    def built(**options: Any) -> PreTrainedModel:
        model = ARCHITECTURES["opt"]()
        norm = model.model.decoder.final_layer_norm
        norm.weight.data.fill_(1)
        norm.bias.data.fill_(shift)
        return quantize(model, smoothing="none", **options)

    model = built()
    assert head_of(model).asymmetric == (shift > 0)
    assert not head_of(built(asymmetric_inputs=False)).asymmetric
    if shift:
        lines = [quantization_report(m).head for m in (model, built(asymmetric_inputs=False))]
        assert lines[0].error_after < 0.5 * lines[1].error_after


def test_the_head_alone() -> None:
    before = ARCHITECTURES["llama"]()
    model = quantize("llama", exclude=("model.layers",))
    assert_same_bits(model.model.layers, before.model.layers)
    assert isinstance(head_of(model), Int8Linear)
    report = quantization_report(model)
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert report.complete
    with pytest.raises(ValueError, match="`model` is already int8"):
        quantize(model, exclude=("model.layers",))


def test_an_input_that_is_all_zero() -> None:
    model = ARCHITECTURES["llama"]()
    model.model.norm.weight.data.zero_()
    quantize(model)
    line = quantization_report(model).head
    assert line is not None
    assert line.note == "its input was zero for every token: rounded to nearest"
    assert line.error_after == 0
    assert not logits_of(model, UNSEEN).any()


def test_an_input_that_is_not_finite() -> None:
    model = ARCHITECTURES["llama"]()
    model.model.norm.weight.data.fill_(3e38)
    match = r"input of `lm_head` is NaN or infinite for a calibration batch"
    with pytest.raises(RuntimeError, match=match) as caught:
        quantize(model)
    assert caught.value.__notes__ == [HEAD_LEFT]
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_two_processes_come_to_what_one_comes_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(with_float_head(name))
    blocks = find_blocks(model)[1]
    batches = [{"input_ids": ids} for ids in CALIBRATION]
    inputs = capture_block_inputs(model, blocks, batches)
    for i, block in enumerate(blocks):
        inputs.hidden = [run_block(block, batch) for batch in inputs.of_block(i)]
    given = list(tail_batches(inputs, batches))
    route = Route(model, blocks, "lm_head", inputs.wrap, given[0])
    config = QuantizationConfig(exclude=())

    def work(processes: Processes) -> QuantizedHead:
        return quantize_head(route, given, config, processes=processes)

    first, second = Two(monkeypatch).run(work)
    alone = work(ALONE)
    for found in (first, second):
        assert torch.equal(found.module.weight, first.module.weight)
        assert found.report == first.report
        assert found.report.tokens == 8 * 24
        assert found.report.smoothing == alone.report.smoothing
        assert found.report.error_after == pytest.approx(alone.report.error_after, rel=1e-2)
        equal = (found.module.weight == alone.module.weight).float().mean()
        assert equal > 0.99
    assert torch.equal(alone.module.weight, head_of(quantized(name)).weight)


# --- Which heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exclude", "int8"),
    [
        ("llama", ("lm_head",), False),
        ("llama", ("lm_head*",), False),
        ("llama", ("*head",), False),
        ("llama", ("lm_[a-h]ead", "*.v_proj"), False),
        ("llama", ("*.v_proj",), True),
        ("llama", (), True),
        # The default means the head by whatever name; so does its own name.
        ("gpt-neox-japanese", ("lm_head",), False),
        ("gpt-neox-japanese", ("embed_out",), False),
        ("gpt-neox-japanese", ("embed*",), False),
        ("gpt-neox-japanese", (), True),
        ("bert", ("lm_head",), False),
        ("bert", ("cls",), False),
        ("bert", ("cls.predictions.transform",), True),
        ("roberta", ("lm_head",), False),
    ],
)
def test_patterns(name: str, exclude: tuple[str, ...], int8: bool) -> None:
    model = quantize(name, exclude=exclude)
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear) == int8
    report = quantization_report(model)
    assert report.with_head == int8
    assert (name_of_head(name) in report.kept_float) != int8


def test_the_default_leaves_the_head() -> None:
    model = quantize_model(MODELS["gpt-neox-japanese"](), CALIBRATION, progress=False)
    assert isinstance(model.embed_out, nn.Linear)
    assert quantization_report(model).kept_float == ["embed_out"]


def test_a_model_without_a_head() -> None:
    torch.manual_seed(0)
    model = quantize(OPTModel(ARCHITECTURES["opt"]().config))
    report = quantization_report(model)
    assert not report.with_head
    assert report.complete


def test_a_model_that_does_not_call_its_head_is_left_alone() -> None:
    from tests.model.test_tail import ReadsTheWeight, llama

    model = llama(ReadsTheWeight)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`lm_head` must be called as a module.*\"lm_head\" to"):
        quantize(model)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert find_report(model) is None
    quantize(model, exclude=("lm_head",))


# --- Tied heads -----------------------------------------------------------------------------------

TIED = ["opt", "opt-post-norm", "gemma2", "gpt2", "bloom", "cohere", "roberta", "ernie4_5-moe"]


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, PreTrainedModel)
    return again


def stored(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again, PreTrainedModel)
    return again


@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy, pickled, stored])
@pytest.mark.parametrize("name", TIED)
def test_a_head_that_was_tied_has_a_weight_of_its_own(
    name: str, way: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    before = MODELS[name]()
    assert before.get_output_embeddings().weight is before.get_input_embeddings().weight
    model = way(quantized(name))
    expected = logits_of(quantized(name), UNSEEN)
    model.tie_weights()
    model.tie_weights(recompute_mapping=False)
    assert isinstance(head_of(model), Int8Linear)
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings, before.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(logits_of(model, UNSEEN), expected)
    assert quantization_report(model) == quantization_report(quantized(name))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_resizing_to_the_size_it_has_changes_nothing(name: str) -> None:
    model = copy.deepcopy(quantized(name))
    model.resize_token_embeddings(VOCABULARY)
    assert_same_bits(model, quantized(name))
    assert torch.equal(logits_of(model, UNSEEN), logits_of(quantized(name), UNSEEN))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_resizing_is_refused_by_transformers(name: str) -> None:
    model = copy.deepcopy(quantized(name))
    with pytest.raises(TypeError, match=r"Old language model head is of type .*Int8Linear"):
        model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    assert torch.equal(logits_of(model, UNSEEN), logits_of(quantized(name), UNSEEN))


def test_another_model_with_the_same_configuration_stays_tied() -> None:
    model = MODELS["gemma2"]()
    other = type(model)(model.config)
    quantize(model)
    assert other.config.tie_word_embeddings is True
    other.tie_weights()
    assert other.lm_head.weight is other.model.embed_tokens.weight


# --- As the whole model ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "gemma2", "phi", "mixtral", "gpt-oss"])
def test_the_same_call_gives_the_same_bytes(name: str) -> None:
    again = quantize(name)
    assert_same_bits(again, quantized(name))
    assert quantization_report(again) == quantization_report(quantized(name))


@pytest.mark.parametrize("name", ["opt", "llama", "phi", "mixtral"])
def test_it_generates_in_batches_and_beams(name: str) -> None:
    model, ids = quantized(name), token_ids(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, **options)
    assert tokens.shape == (2, 10)
    with torch.no_grad():
        expected = model(tokens[:, :-1]).logits[:, 5:].argmax(-1)
    assert torch.equal(tokens[:, 6:], expected)
    assert model.generate(ids, num_beams=3, **options).shape == (2, 10)


@pytest.mark.parametrize("name", ["opt", "gemma3"])
def test_padding_has_no_influence(name: str) -> None:
    ids = token_ids(3, 24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, -4:] = 0
    first, second = (
        quantize_model(
            MODELS[name](),
            [{"input_ids": torch.where(mask == 1, ids, other), "attention_mask": mask}],
            QuantizationConfig(exclude=()),
            progress=False,
        )
        for other in (torch.zeros_like(ids), token_ids(3, 24, seed=50))
    )
    assert_same_bits(first, second)
    assert quantization_report(first).head == quantization_report(second).head
    assert quantization_report(first).head.tokens == 3 * 24 - 9 - 4


def test_inside_inference_mode_it_makes_ordinary_parameters() -> None:
    model = ARCHITECTURES["llama"]()
    with torch.inference_mode():
        quantize(model)
    assert_same_bits(model, quantized("llama"))
    assert not model.model.norm.weight.is_inference()
    assert not head_of(model).weight_scale.is_inference()


@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss", "ernie4_5-moe"])
@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_mixture_in_two_tiers_gives_the_same_bits(name: str, resident: str) -> None:
    model = copy.deepcopy(quantized(name))
    logits = logits_of(model, UNSEEN)
    tokens = model.generate(UNSEEN[:, :6], max_new_tokens=4, do_sample=False)
    offloader = ExpertOffloader(model, device="cpu")
    float_head = ExpertOffloader(copy.deepcopy(with_float_head(name)), device="cpu")
    # The budget knows that the head is a quarter: and that a tied one takes memory of its own.
    tied = float_head.model.config.tie_word_embeddings
    size = VOCABULARY * 32
    row_sums = 4 * VOCABULARY * head_of(model).asymmetric
    int8 = size + 4 * VOCABULARY + row_sums
    saved = (0 if tied else 4 * size) - int8
    assert float_head.budget.dense - offloader.budget.dense == saved
    if resident == "none":
        offloader = ExpertOffloader(model, device="cpu", gpu_memory=offloader.budget.needed)
        assert offloader.placement.num_resident == 0
    with offloader:
        assert torch.equal(logits_of(model, UNSEEN), logits)
        again = model.generate(UNSEEN[:, :6], max_new_tokens=4, do_sample=False)
        assert torch.equal(again, tokens)
    assert torch.equal(logits_of(model, UNSEEN), logits)


# --- Interrupts -----------------------------------------------------------------------------------

HEAD_LEFT = (
    "haq: all 2 blocks of the model are int8 and work; the head is as it was. The same call goes "
    "on with it; load the model again to start afresh."
)
ALL_DONE = "haq: all 2 blocks and the head of the model are int8 and work: it is done."


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def assert_goes_on(model: PreTrainedModel, name: str) -> None:
    quantize(model, exclude=EXCLUDE.get(name, ()))
    assert_same_bits(model, quantized(name))
    assert quantization_report(model) == quantization_report(quantized(name))
    assert quantization_report(model).complete


@pytest.mark.parametrize(
    "where",
    [
        "pipeline.quantize_head",
        "pipeline.write_at_once",
        "head.find_producer",
        "head.choose_scale_of_layer",
        "head.update_quantized",
        "head.compensated",
    ],
)
@pytest.mark.parametrize("name", ["opt", "llama", "mixtral"])
def test_an_interrupt_leaves_a_float_head_and_the_same_call_goes_on(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = MODELS[name](), MODELS[name]()
    tied = before.config.tie_word_embeddings
    with monkeypatch.context() as patch:
        patch.setattr(f"haq.quantization.{where}", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(model)
    assert caught.value.__notes__ == [HEAD_LEFT]
    # All that is not int8 is as it was, ties included; the model works.
    assert_same_bits(model, with_float_head(name))
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(logits_of(model, UNSEEN), logits_of(with_float_head(name), UNSEEN))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    report = quantization_report(model)
    assert not report.complete
    assert report.head is None
    assert len(report.blocks) == LAYERS
    assert "Incomplete: 2 of 2 blocks are int8, and the head is not." in str(report)
    with pytest.raises(ValueError, match=r"partly int8: 2 of 2 blocks were quantized with"):
        quantize(model, damping=0.02)
    assert_goes_on(model, name)


def test_an_interrupt_in_a_block_and_then_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["opt"]()
    original, calls = pipeline.quantize_block, []

    def second(*arguments: Any) -> Any:
        calls.append(1)
        return interrupt() if len(calls) == 2 else original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_block", second)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(model)
    assert caught.value.__notes__[0].startswith("haq: 1 of 2 blocks of the model are int8")
    assert "1 of 2 blocks are int8, and the head is not." in str(quantization_report(model))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_head", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(model)
    assert caught.value.__notes__ == [HEAD_LEFT]
    assert_goes_on(model, "opt")


def test_an_interrupt_while_the_way_to_the_head_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = MODELS["opt"]()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Route", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize(model)
    assert caught.value.__notes__ == ["haq: the model is as it was, no block was converted."]
    assert_same_bits(model, MODELS["opt"]())
    assert find_report(model) is None
    assert_goes_on(model, "opt")


class Interrupts:
    """Raises at the given line, counted over all that are run while the head is put in place."""

    def __init__(self, moment: int) -> None:
        self.left, self.active, self.raised = moment, False, False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        place = (frame.f_code.co_filename.rpartition("haq/")[2], frame.f_code.co_name)
        if place == ("quantization/head.py", "places"):
            self.active = True
        ours = "haq/quantization" in frame.f_code.co_filename or place[0] == "model/heads.py"
        if self.active and ours and event == "line" and not self.raised:
            if self.left == 0:
                self.raised = True
                raise KeyboardInterrupt
            self.left -= 1
        return self if ours or place[0].startswith("quantization") else None


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_an_interrupt_at_any_line_that_puts_the_head_in_place(name: str) -> None:
    """It is int8 with everything that belongs to it, or float with nothing changed."""
    model = MODELS[name]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "quantize_head", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(model)
    outcomes: Counter[bool] = Counter()
    for moment in range(1000):
        attempt = copy.deepcopy(model)
        interrupts = Interrupts(moment)
        sys.settrace(interrupts)
        try:
            quantize(attempt)
        except KeyboardInterrupt as error:
            note = getattr(error, "__notes__", [""])[0]
        finally:
            sys.settrace(None)
        if not interrupts.raised:
            break
        done = isinstance(attempt.lm_head, Int8Linear)
        outcomes[done] += 1
        if done:
            assert note in (ALL_DONE, ""), moment  # It may come when all is over.
            assert_same_bits(attempt, quantized(name))
            assert quantization_report(attempt) == quantization_report(quantized(name))
            assert attempt.config.tie_word_embeddings is False
        else:
            assert note == HEAD_LEFT, moment
            assert_same_bits(attempt, model)
            assert attempt.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert outcomes[False] > 10
    assert outcomes[True] >= 1


# --- Progress -------------------------------------------------------------------------------------


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    quantize("opt")
    assert capfd.readouterr() == ("", "")

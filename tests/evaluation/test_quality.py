"""Perplexity and comparison against independent float64 references."""

import contextlib
import copy
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel
from transformers.utils import logging

from haq.evaluation import Comparison, compare, evaluation_tokens, perplexity

FACTORIES = ["tiny_opt", "tiny_llama", "tiny_mixtral"]


@pytest.fixture(params=FACTORIES)
def model(request):
    return request.getfixturevalue(request.param)()


def random_tokens(count, vocabulary=64):
    return torch.randint(vocabulary, (1, count))


def disturbed(model, size=0.05):
    """The same model with noise on every weight."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return other


def log_probabilities(model, window):
    """float64 [L - 1, V], by numpy."""
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double().numpy()
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference_measures(reference, model, ids, sequence_length):
    """Rows (nll of the reference, nll, KL, agreement) of each window, float64."""
    rows = []
    for start in range(0, ids.numel() - sequence_length + 1, sequence_length):
        window = ids.flatten()[start : start + sequence_length]
        p, q = log_probabilities(reference, window), log_probabilities(model, window)
        positions, targets = np.arange(sequence_length - 1), window[1:].numpy()
        rows.append(
            (
                -p[positions, targets].mean(),
                -q[positions, targets].mean(),
                (np.exp(p) * (p - q)).sum(-1).mean(),
                (p.argmax(-1) == q.argmax(-1)).mean(),
            )
        )
    return np.array(rows)


# --- perplexity ----------------------------------------------------------------------------------


# 300 is more positions than are widened to float32 at once, and no multiple of them.
@pytest.mark.parametrize("sequence_length", [2, 17, 300])
def test_perplexity_is_what_transformers_own_loss_says(model, sequence_length):
    ids = random_tokens(5 * sequence_length // 2)
    windows = ids[:, : 2 * sequence_length].view(2, sequence_length)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    got = perplexity(model, ids, sequence_length=sequence_length, progress=False)
    # The same float32 logits, and means of them in another order.
    assert got == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert got != pytest.approx(64, rel=1e-3)  # a model that knows nothing would not tell


def test_the_rest_of_the_text_is_dropped(tiny_llama):
    model, ids = tiny_llama(), random_tokens(50)
    whole = perplexity(model, ids, sequence_length=20, progress=False)
    assert perplexity(model, ids[:, :40], sequence_length=20, progress=False) == whole
    assert perplexity(model, ids[:, :20], sequence_length=20, progress=False) != whole


def test_tokens_may_come_without_a_batch_dimension(tiny_llama):
    model, ids = tiny_llama(), random_tokens(40)
    expected = perplexity(model, ids, sequence_length=20, progress=False)
    assert perplexity(model, ids[0], sequence_length=20, progress=False) == expected


def test_16_bit_logits_are_widened(tiny_llama):
    model, ids = tiny_llama().bfloat16(), random_tokens(120)
    nll = reference_measures(model, model, ids, 40)[:, 1]
    got = perplexity(model, ids, sequence_length=40, progress=False)
    # The same 16-bit logits; a softmax in bfloat16 would be off by 1e-3.
    assert got == pytest.approx(math.exp(nll.mean()), rel=1e-6)


def test_a_hopeless_model_has_an_infinite_perplexity(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data.mul_(1e6)
    assert perplexity(model, random_tokens(40), sequence_length=20, progress=False) == math.inf


@pytest.mark.slow
def test_a_trained_model_has_the_nll_that_others_measured(shared):
    path = shared / "models" / "tiny-opt-outliers"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    text = (shared / "data" / "text" / "wikitext2-test.raw").read_text(encoding="utf-8")
    ids = evaluation_tokens(AutoTokenizer.from_pretrained(path), [text])
    got = perplexity(model, ids[:, : 100 * 512], sequence_length=512, progress=False)
    # Measured by another program, and printed with 5 decimals.
    assert math.log(got) == pytest.approx(5.39680, abs=2e-5)


@pytest.mark.parametrize("function", ["perplexity", "compare"])
def test_the_model_is_left_as_it_was(function, tiny_opt):
    model = tiny_opt(dropout=0.5)
    model.train()
    model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ids = random_tokens(40)
    if function == "perplexity":
        got = perplexity(model, ids, sequence_length=20, progress=False)
        expected = perplexity(model.eval(), ids, sequence_length=20, progress=False)
        assert got == expected  # no dropout
        model.train()
        model.model.decoder.layers[1].eval()
    else:
        assert compare(model, model, ids, sequence_length=20, progress=False).kl == 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model(ids).logits.requires_grad


def test_an_error_in_the_model_leaves_its_mode(tiny_llama):
    model = tiny_llama().train()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="NaN"):
        perplexity(model, random_tokens(40), sequence_length=20, progress=False)
    assert all(module.training for module in model.modules())


def test_neither_a_cache_nor_a_graph_is_kept(tiny_llama):
    model, seen = tiny_llama(), []

    def note(module, args, output):
        seen.append((output.past_key_values, output.logits.requires_grad))

    model.register_forward_hook(note)
    perplexity(model, random_tokens(40), sequence_length=20, progress=False)
    assert seen == [(None, False)]


# --- comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sequence_length", [2, 17, 300])
def test_comparison_matches_numpy(model, sequence_length):
    other = disturbed(model)
    ids = random_tokens(7 * sequence_length // 2)
    got = compare(model, other, ids, sequence_length=sequence_length, progress=False)
    rows = reference_measures(model, other, ids, sequence_length)
    nll_reference, nll, kl, agreement = rows.mean(0)

    def stderr(values):
        return values.std(ddof=1) / math.sqrt(3)

    # float32 log-probabilities of about 5 nats against float64 ones.
    tolerance = 1e-5
    assert got.nll_reference == pytest.approx(nll_reference, abs=tolerance)
    assert got.nll == pytest.approx(nll, abs=tolerance)
    assert got.delta_nll == pytest.approx(nll - nll_reference, abs=tolerance)
    assert got.delta_nll_stderr == pytest.approx(stderr(rows[:, 1] - rows[:, 0]), abs=tolerance)
    assert got.kl == pytest.approx(kl, abs=tolerance)
    assert got.kl_stderr == pytest.approx(stderr(rows[:, 2]), abs=tolerance)
    assert got.top1_agreement == pytest.approx(agreement, abs=1e-12)
    assert (got.windows, got.tokens) == (3, 3 * (sequence_length - 1))
    assert got.kl > 100 * tolerance  # so the tolerance tells right from wrong


def test_the_divergence_is_from_the_reference_to_the_model(tiny_llama):
    model = tiny_llama()
    other, ids = disturbed(model, 0.2), random_tokens(60)
    there = compare(model, other, ids, sequence_length=30, progress=False)
    back = compare(other, model, ids, sequence_length=30, progress=False)
    assert there.kl != pytest.approx(back.kl, rel=1e-2)
    assert there.delta_nll == pytest.approx(-back.delta_nll, abs=1e-6)


def test_a_model_loses_nothing_against_itself(model):
    got = compare(model, model, random_tokens(60), sequence_length=20, progress=False)
    assert (got.delta_nll, got.delta_nll_stderr, got.kl, got.kl_stderr) == (0, 0, 0, 0)
    assert got.top1_agreement == 1


def test_comparison_and_perplexity_agree(tiny_mixtral):
    model = tiny_mixtral()
    other, ids = disturbed(model), random_tokens(60)
    got = compare(model, other, ids, sequence_length=20, progress=False)
    for value, of in ((got.perplexity_reference, model), (got.perplexity, other)):
        assert value == pytest.approx(perplexity(of, ids, sequence_length=20, progress=False))


def test_ids_that_the_model_rules_out_do_not_spoil_the_divergence(tiny_llama):
    model = tiny_llama()

    def rule_out(module, args, output):
        output.logits[..., 63] = -math.inf
        return output

    model.register_forward_hook(rule_out)
    ids = random_tokens(40, vocabulary=63)
    assert compare(model, model, ids, sequence_length=20, progress=False).kl == 0


def test_one_window_has_no_standard_error(tiny_llama):
    model = tiny_llama()
    got = compare(model, disturbed(model), random_tokens(20), sequence_length=20, progress=False)
    assert math.isnan(got.delta_nll_stderr)
    assert math.isnan(got.kl_stderr)
    assert got.kl > 0


def test_a_comparison_reads_well():
    comparison = Comparison(
        nll_reference=math.log(20),
        nll=math.log(20.5),
        delta_nll=math.log(20.5 / 20),
        delta_nll_stderr=1.234e-3,
        kl=0.0321,
        kl_stderr=2.5e-4,
        top1_agreement=0.9876,
        tokens=24384,
        windows=192,
    )
    assert str(comparison).splitlines() == [
        "perplexity              20.0000 -> 20.5000",
        "change of NLL           +2.47e-02 ± 1.2e-03 nats",
        "KL(reference || model)  3.21e-02 ± 2.5e-04 nats",
        "same top-1 token        98.76%",
        "per token, over 24,384 tokens in 192 windows",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        comparison.kl = 0


# --- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, function, model, progress):
    """What `function` writes to stderr, if that is ``stream``."""
    ids = random_tokens(40)
    with contextlib.redirect_stderr(stream):
        if function == "perplexity":
            perplexity(model, ids, sequence_length=20, progress=progress)
        else:
            compare(model, model, ids, sequence_length=20, progress=progress)
    return stream.getvalue()


@pytest.mark.parametrize("function", ["perplexity", "compare"])
def test_progress_is_shown_on_a_terminal_unless_asked_not_to(function, tiny_llama, capsys):
    text = shown(Terminal(), function, tiny_llama(), progress=True)
    assert function in text
    assert "2/2" in text
    assert shown(Terminal(), function, tiny_llama(), progress=False) == ""
    assert shown(io.StringIO(), function, tiny_llama(), progress=True) == ""
    assert capsys.readouterr() == ("", "")


def test_progress_obeys_transformers(tiny_llama):
    logging.disable_progress_bar()
    try:
        assert shown(Terminal(), "perplexity", tiny_llama(), progress=True) == ""
    finally:
        logging.enable_progress_bar()


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "sequence_length", "error", "message"),
    [
        ([1, 2], 2, TypeError, r"`token_ids` must be an int64 tensor, got list\."),
        ({"input_ids": [1]}, 2, TypeError, r"`token_ids` must be an int64 tensor, got dict\."),
        (torch.ones(4), 2, TypeError, r"must be an int64 tensor, got torch\.float32\."),
        (torch.ones(4).int(), 2, TypeError, r"must be an int64 tensor, got torch\.int32\."),
        (torch.ones(2, 4).long(), 2, ValueError, r"of shape \[1, T\] or \[T\].*got \[2, 4\]\."),
        (torch.tensor(1), 2, ValueError, r"of shape \[1, T\] or \[T\], one text, got \[\]\."),
        (torch.ones(4).long(), 1, ValueError, r"`sequence_length` must be at least 2.*, got 1\."),
        (torch.ones(9).long(), 10, ValueError, r"one window of `sequence_length=10`, got 9 tok"),
        (torch.ones(0).long(), 2, ValueError, r"one window of `sequence_length=2`, got 0 tokens"),
        (torch.ones(600).long(), 513, ValueError, r"at most 512, the positions of `\w+`, got 513"),
        (torch.tensor([0, 64]), 2, ValueError, r"from 0 to 63, the vocabulary of `\w+`, got 64\."),
        (torch.tensor([0, -100]), 2, ValueError, r"from 0 to 63, the vocab.* `\w+`, got -100\."),
    ],
)
def test_bad_arguments(ids, sequence_length, error, message, tiny_opt):
    model = tiny_opt()
    with pytest.raises(error, match=message):
        perplexity(model, ids, sequence_length=sequence_length)
    with pytest.raises(error, match=message):
        compare(model, model, ids, sequence_length=sequence_length)


def test_each_model_is_named(tiny_llama):
    small, large = tiny_llama(vocab_size=32), tiny_llama()
    ids = torch.tensor([40, 1])
    with pytest.raises(ValueError, match="vocabulary of `reference`, got 40"):
        compare(small, large, ids, sequence_length=2)
    with pytest.raises(ValueError, match="vocabulary of `model`, got 40"):
        compare(large, small, ids, sequence_length=2)


def test_models_of_two_vocabularies(tiny_llama):
    small, large = tiny_llama(vocab_size=32), tiny_llama()
    with pytest.raises(ValueError, match=r"`model` must have the logits of `reference`, 64, got 3"):
        compare(large, small, torch.tensor([1, 1]), sequence_length=2, progress=False)


def test_nan_is_located(tiny_llama):
    model = tiny_llama()
    broken = copy.deepcopy(model)
    broken.get_input_embeddings().weight.data[60] = math.nan
    ids = random_tokens(50, vocabulary=60)
    ids[0, 25] = 60
    message = r"`{}` must give finite logits, got NaN in window 2 \(tokens 20 to 29\)"
    with pytest.raises(RuntimeError, match=message.format("model")):
        perplexity(broken, ids, sequence_length=10, progress=False)
    with pytest.raises(RuntimeError, match=message.format("model")):
        compare(model, broken, ids, sequence_length=10, progress=False)
    with pytest.raises(RuntimeError, match=message.format("reference")):
        compare(broken, model, ids, sequence_length=10, progress=False)


def test_a_model_without_a_head():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(TypeError, match=r"causal language model, got LlamaModel, whose output has"):
        perplexity(LlamaModel(config), torch.tensor([1, 2]), sequence_length=2, progress=False)


def test_a_model_without_weights(tiny_llama):
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(
        RuntimeError, match=r"`model` must have its weights in memory, got a .*meta"
    ):
        perplexity(model, torch.tensor([1, 2]), sequence_length=2)

"""Perplexity, and what a model loses against a reference."""

import math
import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from haq.evaluation.experts import watching_experts
from haq.evaluation.windows import (
    check_fits,
    cut_windows,
    numbered_windows,
    predictions,
)
from haq.model.modes import evaluating

# Logits are widened to float32 for this many positions at a time: 131 MB for 128k token ids.
_POSITIONS_AT_ONCE = 256


@dataclass(frozen=True)
class Comparison:
    """What a model loses against a reference, in nats per predicted token.

    Standard errors are over the means of the windows, NaN if there is only one window.

    Attributes:
        nll_reference: mean negative log-likelihood under the reference.
        nll: mean negative log-likelihood under the model.
        delta_nll: ``nll - nll_reference``.
        delta_nll_stderr: its standard error.
        kl: mean Kullback-Leibler divergence from the reference to the model, KL(reference, model).
        kl_stderr: its standard error.
        top1_agreement: fraction of tokens for which both predict the same most likely token.
        tokens: predicted tokens, ``windows * (sequence_length - 1)``.
        windows: windows.
        experts_changed: for each mixture-of-experts layer, the share of tokens that go to another
            set of experts than in the reference, all layers before it having had their say.
    """

    nll_reference: float
    nll: float
    delta_nll: float
    delta_nll_stderr: float
    kl: float
    kl_stderr: float
    top1_agreement: float
    tokens: int
    windows: int
    experts_changed: tuple[float, ...] = ()

    @property
    def perplexity_reference(self) -> float:
        """Perplexity of the reference."""
        return _exp(self.nll_reference)

    @property
    def perplexity(self) -> float:
        """Perplexity of the model."""
        return _exp(self.nll)

    def __str__(self) -> str:
        routing = (
            (
                f"tokens to other experts {statistics.fmean(self.experts_changed):.2%} on average "
                f"over {len(self.experts_changed)} layers, at most {max(self.experts_changed):.2%}",
            )
            if self.experts_changed
            else ()
        )
        return "\n".join(
            (
                f"perplexity              {self.perplexity_reference:.4f} -> {self.perplexity:.4f}",
                f"change of NLL           {self.delta_nll:+.2e} ± {self.delta_nll_stderr:.1e} nats",
                f"KL(reference || model)  {self.kl:.2e} ± {self.kl_stderr:.1e} nats",
                f"same top-1 token        {self.top1_agreement:.2%}",
                *routing,
                f"per token, over {self.tokens:,} tokens in {self.windows:,} windows",
            )
        )


def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    sequence_length: int = 2048,
    progress: bool = True,
) -> float:
    """Perplexity of a causal language model: exp of the mean negative log-likelihood per token.

    The text is cut into windows of ``sequence_length`` tokens without overlap; what is left at the
    end is dropped. In each window the tokens after the first are predicted.

    Args:
        model: any causal language model of `transformers`, on any device; left as it was.
        token_ids: int64 ``[1, T]`` or ``[T]``.
        sequence_length: tokens of a window.
        progress: show a bar with the windows done and the time left. It hides when the output is
            not a terminal, and where transformers' progress bars are switched off.

    Raises:
        TypeError: if ``model`` has no logits, or ``token_ids`` is no int64 tensor.
        ValueError: if ``token_ids`` has another shape, is too short for one window or holds ids
            beyond the vocabulary, or if ``sequence_length`` is below 2 or beyond the model's
            positions.
        RuntimeError: if a logit is NaN, or the model is on the meta device.

    Examples:
        A model that knows nothing is as perplexed as its vocabulary is large.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> _ = model.lm_head.weight.data.zero_()
        >>> round(perplexity(model, torch.arange(50), sequence_length=10, progress=False), 3)
        50.0
    """
    windows = cut_windows(token_ids, sequence_length)
    check_fits(model, "model", windows)
    with evaluating(model):
        logits = predictions(model, windows)
        nll = [
            _mean_nll("model", next(logits), window, i).item()
            for i, window in numbered_windows(windows, "perplexity", progress)
        ]
    return _exp(statistics.fmean(nll))


def compare(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    sequence_length: int = 2048,
    progress: bool = True,
) -> Comparison:
    """Compare what two models predict for the same text, token by token.

    The difference of two perplexities on one text is much less certain than the Kullback-Leibler
    divergence between the predictions, which is zero only if they are the same.

    Args:
        reference: the model to measure against, mostly in float; left as it was.
        model: the model to measure, of the same vocabulary; may be on another device.
        token_ids: int64 ``[1, T]`` or ``[T]``, cut into windows as `perplexity` does.
        sequence_length: tokens of a window.
        progress: show a bar with the windows done and the time left. It hides when the output is
            not a terminal, and where transformers' progress bars are switched off.

    Raises:
        TypeError: as for `perplexity`.
        ValueError: as for `perplexity`, or if the models differ in their number of logits.
        RuntimeError: as for `perplexity`.
    """
    windows = cut_windows(token_ids, sequence_length)
    check_fits(reference, "reference", windows)
    check_fits(model, "model", windows)
    rows = []
    with (
        evaluating(reference),
        evaluating(model),
        watching_experts(reference, model) as experts,
    ):
        expectations, predicted = predictions(reference, windows), predictions(model, windows)
        for i, window in numbered_windows(windows, "compare", progress):
            expected = next(expectations)
            logits = next(predicted).to(expected.device)
            if logits.shape != expected.shape:
                raise ValueError(
                    f"`model` must have the logits of `reference`, {expected.shape[-1]}, got "
                    f"{logits.shape[-1]}. Compare models of one vocabulary."
                )
            kl, agreement = _mean_divergence(expected, logits)
            nll_reference = _mean_nll("reference", expected, window, i)
            nll = _mean_nll("model", logits, window, i)
            rows.append(torch.stack([nll_reference, nll, nll - nll_reference, kl, agreement]))
    compared = _comparison(torch.stack(rows), tokens=windows[:, 1:].numel())
    return replace(compared, experts_changed=experts.shares())


def _exp(nll: float) -> float:
    """exp, inf where `math.exp` would overflow: a broken model has a perplexity, too."""
    return torch.tensor(nll, dtype=torch.float64).exp().item()


def _mean_nll(name: str, logits: Tensor, window: Tensor, i: int) -> Tensor:
    """Mean negative log-likelihood of one window.

    Args:
        name: the argument in which the model came.
        logits: ``[L - 1, V]``.
        window: int64 ``[L]``.
        i: its number.

    Returns:
        One float64 number, on the CPU.
    """
    chunks = zip(
        logits.split(_POSITIONS_AT_ONCE),
        window[1:].to(logits.device).split(_POSITIONS_AT_ONCE),
        strict=True,
    )
    nll = [F.cross_entropy(rows.float(), tokens, reduction="none") for rows, tokens in chunks]
    mean = torch.cat(nll).cpu().double().mean()
    if mean.isnan():
        raise RuntimeError(
            f"`{name}` must give finite logits, got NaN in window {i} (tokens {i * len(window)} to "
            f"{(i + 1) * len(window) - 1}). Look for NaN or inf in its weights, or for an "
            f"overflow of its dtype, {logits.dtype}."
        )
    return mean


def _mean_divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Means over positions of KL(reference, model) and of equal top-1 tokens: two float64 numbers.

    Args:
        reference: the reference's logits ``[L - 1, V]``.
        logits: the model's, on the same device.
    """
    divergences, agreements = [], []
    chunks = zip(reference.split(_POSITIONS_AT_ONCE), logits.split(_POSITIONS_AT_ONCE), strict=True)
    for expected, got in chunks:
        log_p = expected.float().log_softmax(-1)
        log_q = got.float().log_softmax(-1)
        p = log_p.exp()
        # A masked-out token has p = 0 and log_p = -inf; its term is 0.
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        divergences.append(terms.sum(-1))
        agreements.append(expected.argmax(-1) == got.argmax(-1))
    mean_kl = torch.cat(divergences).cpu().double().mean()
    return mean_kl, torch.cat(agreements).cpu().double().mean()


def _comparison(rows: Tensor, tokens: int) -> Comparison:
    """Summarize windows: ``rows`` float64 ``[W, 5]``."""
    windows = len(rows)
    nll_reference, nll, delta_nll, kl, agreement = rows.mean(0).tolist()
    stderr = rows.std(0) / math.sqrt(windows) if windows > 1 else torch.full((5,), math.nan)
    return Comparison(
        nll_reference=nll_reference,
        nll=nll,
        delta_nll=delta_nll,
        delta_nll_stderr=stderr[2].item(),
        kl=kl,
        kl_stderr=stderr[3].item(),
        top1_agreement=agreement,
        tokens=tokens,
        windows=windows,
    )

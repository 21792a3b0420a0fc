"""What does int8 cost a trained model, and which step of the method buys what?

Compares a float model with int8 versions of itself on text that calibration never saw: KL(float ||
int8) and the change of the negative log-likelihood, nats per token, with standard errors. Three
baselines that people use, then haq one step after the other. Each is calibrated with several seeds.

The models are `tiny-opt` and `tiny-opt-outliers`, the same function with the activation profile of
a real OPT-1.3B planted in it, of the reference data beside the checkout (HAQ_SHARED). Windows of
128 tokens are what they were trained on; the second table uses the windows of 512 in which other
libraries were measured.

    python benchmarks/quality.py            about 15 minutes on 2 cores
    python benchmarks/quality.py --quick    one seed, few windows: does it run?
"""

import copy
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import haq
from haq import QuantizationConfig
from haq.model.blocks import BlockBatch
from haq.model.groups import Group, find_groups
from haq.model.linears import is_linear
from haq.quantization.hessian import SecondMoment
from haq.quantization.scales import Candidate, search_candidates

SHARED = Path(os.environ.get("HAQ_SHARED", Path(__file__).parents[2] / "shared"))
CALIBRATION = SHARED / "data/text/wikitext103-excerpt.json"
TEXTS = {
    "wikitext2": SHARED / "data/text/wikitext2-test.raw",
    "c4": SHARED / "data/text/c4-sample.txt",
}

# Targets: KL on Wikitext-2 as a fraction of what nearest rounding loses on the clean model, the
# change of NLL, and the best NLL of another library on the planted model at windows of 512.
KL_TARGETS = {"tiny-opt": 0.60, "tiny-opt-outliers": 0.65}
NLL_TARGET = 2e-4
PEER_NLL = 5.39682


# --- the variants --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to quantize: a configuration, and what is swapped inside the method for an ablation."""

    name: str
    config: QuantizationConfig
    changes: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, replacement in self.changes.items():
                stack.enter_context(patch(f"haq.quantization.{name}", replacement))
            yield


def norm_groups(block: torch.nn.Module, batch: BlockBatch) -> list[Group]:
    """Only what a norm produces is smoothed, as in SmoothQuant."""
    return [
        replace(g, producer=None)
        if g.producer is not None and is_linear(block.get_submodule(g.producer.name))
        else g
        for g in find_groups(block, batch)
    ]


def judged_by_layer(
    groups: Callable[..., list[Group]], block: torch.nn.Module, batch: BlockBatch
) -> list[Group]:
    """Scales are chosen by the error of the first layer that reads the input, not the block's."""
    return [replace(g, scope=g.consumers[0]) for g in groups(block, batch)]


def with_maximum() -> list[Candidate]:
    """The same exponents, with the maximum over tokens as the channel statistic."""
    return [
        replace(c, family="smoothquant") if c.family == "p4" else c for c in search_candidates()
    ]


SYMMETRIC = QuantizationConfig(asymmetric_inputs=False)
SEARCH = replace(SYMMETRIC, rounding="nearest")
NEAREST = replace(SEARCH, smoothing="none")


def smoothquant(strength: float) -> QuantizationConfig:
    return replace(SEARCH, smoothing="fixed", smoothing_strength=strength)


def float_inputs(moment: SecondMoment, inputs: Tensor, asymmetric: bool = False) -> None:
    """Second moments of the inputs as they are, not as the int8 product sees them."""
    moment.update(inputs)


# Only what a norm produces is smoothed, in experts, too, as in SmoothQuant.
ONLY_NORMS = {
    "block.find_groups": norm_groups,
    "experts.rescalable_rows": lambda *arguments: None,
}
MAXIMUM = {"work.search_candidates": with_maximum}

VARIANTS = [
    Variant("nearest rounding", NEAREST),
    Variant("SmoothQuant 0.5", smoothquant(0.5), ONLY_NORMS),
    Variant("SmoothQuant 0.8", smoothquant(0.8), ONLY_NORMS),
    Variant(
        "SmoothQuant 0.8 + Hessian of float inputs",
        replace(smoothquant(0.8), rounding="hessian"),
        {
            **ONLY_NORMS,
            "work.update_quantized": float_inputs,
            "experts.update_quantized": float_inputs,
            "work.installed": lambda block, modules: ExitStack(),
        },
    ),
    Variant(
        "haq: search, norm groups, layer error",
        SEARCH,
        {**ONLY_NORMS, **MAXIMUM, "block.find_groups": partial(judged_by_layer, norm_groups)},
    ),
    Variant(
        "+ every exactly rescalable group",
        SEARCH,
        {**MAXIMUM, "block.find_groups": partial(judged_by_layer, find_groups)},
    ),
    Variant("+ judged by the block's error", SEARCH, MAXIMUM),
    Variant("+ 4-norm statistic", SEARCH),
    Variant("+ Hessian of quantized inputs", SYMMETRIC),
    Variant("+ zero points after activations = haq", QuantizationConfig()),
]


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How much is calibrated and evaluated."""

    sequence_length: int
    calibration_windows: int
    windows: int
    seeds: tuple[int, ...]


def quantized(
    model: PreTrainedModel, tokenizer: object, variant: Variant, protocol: Protocol, seed: int
) -> PreTrainedModel:
    samples = haq.calibration_batches(
        tokenizer,
        CALIBRATION,
        num_samples=protocol.calibration_windows,
        sequence_length=protocol.sequence_length,
        seed=seed,
    )
    # Windows of one length go through a model several at a time, for speed.
    batches = list(torch.cat(samples).split(max(1, 1024 // protocol.sequence_length)))
    with variant.active():
        return haq.quantize_model(copy.deepcopy(model), batches, variant.config, progress=False)


def evaluation_text(tokenizer: object, text: str, protocol: Protocol) -> Tensor:
    ids = haq.evaluation_tokens(tokenizer, [TEXTS[text].read_text(encoding="utf-8")])
    return ids[:, : protocol.windows * protocol.sequence_length]


def nothing_more(*arguments: object) -> dict[str, Any]:
    return {}


def measure(
    name: str,
    variants: list[Variant],
    texts: list[str],
    protocol: Protocol,
    more: Callable[..., dict[str, Any]] = nothing_more,
) -> list[dict[str, Any]]:
    """One row for each variant, text and seed; ``more`` adds what else is to be in it."""
    directory = SHARED / "models" / name
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    evaluation = {text: evaluation_text(tokenizer, text, protocol) for text in texts}
    rows = []
    for variant in variants:
        # Rounding to nearest without smoothing sees no calibration data.
        seeds = protocol.seeds[:1] if variant.config == NEAREST else protocol.seeds
        for seed in seeds:
            int8 = quantized(model, tokenizer, variant, protocol, seed)
            for text, ids in evaluation.items():
                result = haq.compare(
                    model, int8, ids, sequence_length=protocol.sequence_length, progress=False
                )
                rows.append(
                    {
                        "model": name,
                        "variant": variant.name,
                        "seed": seed,
                        "text": text,
                        "sequence_length": protocol.sequence_length,
                        "windows": result.windows,
                        "kl": result.kl,
                        "kl_stderr": result.kl_stderr,
                        "delta_nll": result.delta_nll,
                        "delta_nll_stderr": result.delta_nll_stderr,
                        "nll": result.nll,
                        "nll_float": result.nll_reference,
                        "top1_agreement": result.top1_agreement,
                        **more(model, int8, ids, protocol, result),
                    }
                )
        print_variant(name, variant.name, rows)
    return rows


# --- what is printed -----------------------------------------------------------------------------


def mean(rows: list[dict[str, Any]], key: str, **where: object) -> float:
    return statistics.fmean(
        row[key] for row in rows if all(row[k] == value for k, value in where.items())
    )


def print_variant(model: str, variant: str, rows: list[dict[str, Any]]) -> None:
    """KL and change of NLL in 1e-4 nats per token; seeds averaged, +- the standard error."""
    cells = [f"{model:18} {variant:42}"]
    for text in dict.fromkeys(row["text"] for row in rows):
        where = {"model": model, "variant": variant, "text": text}
        kl, kl_stderr, delta, delta_stderr = (
            1e4 * mean(rows, key, **where)
            for key in ("kl", "kl_stderr", "delta_nll", "delta_nll_stderr")
        )
        cells.append(
            f"{text} KL {kl:9.3f} +-{kl_stderr:7.3f} dNLL {delta:8.2f} +-{delta_stderr:6.2f}"
        )
    print("  ".join(cells), flush=True)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured."""
    haq_name, text = VARIANTS[-1].name, "wikitext2"
    nearest = mean(rows, "kl", model="tiny-opt", variant=VARIANTS[0].name, text=text)
    found = []
    for model, limit in KL_TARGETS.items():
        where = {"model": model, "variant": haq_name, "text": text}
        ratio = mean(rows, "kl", **where) / nearest
        delta = mean(rows, "delta_nll", **where)
        found += [
            target(f"{model}: KL over nearest rounding's on the clean model", ratio, limit),
            target(f"{model}: change of NLL, nats", delta, NLL_TARGET),
        ]
    return found


def target(name: str, measured: float, limit: float) -> dict[str, Any]:
    return {"target": name, "measured": measured, "limit": limit, "met": measured <= limit}


def print_targets(found: list[dict[str, Any]]) -> None:
    for row in found:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['target']}: {row['measured']:.6g}, target {row['limit']:.6g}: {verdict}")


def prepare() -> None:
    """Stop early if the data is not there; keep other people's progress bars out of the table."""
    if not SHARED.is_dir():
        sys.exit(f"needs the reference data: {SHARED} is not there (set HAQ_SHARED)")
    logging.disable_progress_bar()


def main() -> None:
    quick = harness.arguments(__doc__).quick
    prepare()
    short = Protocol(128, 128, 192, (0, 1, 2))
    long = Protocol(512, 64, 100, (0, 1, 2))
    if quick:
        short = Protocol(128, 16, 8, (0,))
        long = Protocol(512, 4, 2, (0,))
    facts = harness.card()
    harness.print_card(__doc__, facts)
    print("1e-4 nats per token, mean over seeds")
    rows = [row for name in KL_TARGETS for row in measure(name, VARIANTS, list(TEXTS), short)]
    found = targets(rows)
    at_512 = measure("tiny-opt-outliers", VARIANTS[-1:], ["wikitext2"], long)
    found.append(target("tiny-opt-outliers: NLL at windows of 512", mean(at_512, "nll"), PEER_NLL))
    print_targets(found)
    if not quick:
        harness.write("quality", facts, targets=found, rows=rows + at_512)


if __name__ == "__main__":
    main()

"""The table of the paper: what int8 costs the OPT models and Mixtral-8x7B, in perplexity.

    python examples/reproduce_paper.py --dry-run    # two small models, no network, two minutes
    python examples/reproduce_paper.py --models facebook/opt-125m
    python examples/reproduce_paper.py --device cuda    # everything that fits

Perplexity on Wikitext-2 and C4 in windows of 2048 tokens, by the protocol of the GPTQ paper (arXiv
2210.17323), of the float model and of three int8 versions, weights and activations: rounded to
nearest; smoothed with a fixed strength as SmoothQuant does (arXiv 2211.10438), here on every group
that can be rescaled exactly; and haq. They are calibrated on 128 windows of C4.

Beside it are published perplexities of the float models, to see that the protocol is the same, and
what is reported of the paper (arXiv 2508.07329). Its text and code are not public to us: its
calibration and its baselines are not known, and these are ours.

What is done is in OUT/results.json: started again, the script goes on with what is missing. A
model with safetensors is quantized from disk to disk, one block in memory at a time, and can be
interrupted there, too. What does not fit into memory to be evaluated is left out, and said.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import list_repo_files
from tiny_models.corpus import standard_library
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import haq

OPT = [f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b")]
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"
TINY = [f"tiny_models/{name}" for name in ("opt-python", "mixtral-python")]

SYMMETRIC = haq.QuantizationConfig(asymmetric_inputs=False, rounding="nearest")
METHODS: dict[str, haq.QuantizationConfig | None] = {
    "float": None,
    "nearest": replace(SYMMETRIC, smoothing="none"),
    "fixed": replace(SYMMETRIC, smoothing="fixed"),
    "haq": haq.QuantizationConfig(),
}
# SmoothQuant's own strengths: OPT by its paper, Mixtral by its repository. Others get that of OPT.
STRENGTHS = {"opt": 0.5, "mixtral": 0.8}

# Float models at windows of 2048, by the papers of GPTQ and SparseGPT; and Mixtral-8x7B before and
# after, as reported of the paper.
PUBLISHED = {
    "wikitext2": dict(zip(OPT, (27.65, 22.00, 14.63, 12.47, 10.86, 10.13, 9.56), strict=True)),
    "c4": dict(zip(OPT, (26.56, 22.59, 16.07, 14.32, 12.71, 12.06, 11.45), strict=True)),
}
PAPER = {"wikitext2": (3.840, 3.864), "c4": (7.401, 7.427)}

# What a model needs beside its weights to be evaluated, or to quantize one of its blocks.
HEADROOM = 1.2


@dataclass(frozen=True)
class Protocol:
    """How much is read, and of what; the results of another one are not mixed with these."""

    calibration: str = "c4"
    samples: int = 128
    length: int = 2048
    seed: int = 0
    limit: int | None = None

    def source(self, text: str, split: str) -> Any:
        """A text by its name, as haq takes it."""
        return standard_library(split) if text == "python" else text  # type: ignore[arg-type]


class Results:
    """Rows on disk, the same after any end."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            found = json.loads(file.read_text())
            if found["settings"] != settings:
                sys.exit(f"{file} has results of other settings: pass another --out.")
            self.rows = found["rows"]

    def perplexity(self, model: str, method: str, text: str) -> float | None:
        key = {"model": model, "method": method, "text": text}
        found = (row["perplexity"] for row in self.rows if key.items() <= row.items())
        return next(found, None)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        content = json.dumps({"settings": self._settings, "rows": self.rows}, indent=2)
        self._file.with_suffix(".new").write_text(content + "\n")
        os.replace(self._file.with_suffix(".new"), self._file)


# --- Memory ---------------------------------------------------------------------------------------


def gigabytes(path: str, dtype: torch.dtype) -> dict[str, float]:
    """What the weights take, in float and with int8 blocks: by the shapes, nothing is loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    everything = sum(p.numel() for p in model.parameters())
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1
    )
    size = dtype.itemsize
    return {
        "float": size * everything / 1e9,
        "int8": (matrices + size * (everything - matrices)) / 1e9,
    }


def available(device: str) -> float:
    """Gigabytes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0] / 1e9
    return psutil.virtual_memory().available / 1e9


# --- One model ------------------------------------------------------------------------------------


class Work:
    """Everything about one model that its rows share."""

    def __init__(self, name: str, device: str, protocol: Protocol, folder: Path) -> None:
        self.name, self.device, self.protocol, self.folder = name, device, protocol, folder
        tiny = Path(__file__).parent / name
        self.path = str(tiny) if tiny.is_dir() else name
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        # Half precision is slow on most CPUs.
        on_cpu = torch.device(device).type == "cpu"
        own = AutoConfig.from_pretrained(self.path).dtype or torch.float16
        self.dtype = torch.float32 if on_cpu else own
        self.weights = gigabytes(self.path, self.dtype)
        files = os.listdir(self.path) if tiny.is_dir() else list_repo_files(self.path)
        # The OPT models have to be unpickled: transformers does it, and as a whole.
        self.pickled = not any(file.endswith(".safetensors") for file in files)

    def needs(self, method: str) -> float:
        """Gigabytes to make and to evaluate it."""
        whole = method == "float" or self.pickled
        return HEADROOM * self.weights["float" if whole else "int8"]

    @contextmanager
    def model(self, method: str) -> Iterator[PreTrainedModel]:
        """The float model, or an int8 one; its directory is gone afterwards."""
        config = METHODS[method]
        if config is None:
            yield self._float().to(self.device)
            return
        strength = next((s for family, s in STRENGTHS.items() if family in self.name.lower()), 0.5)
        target = self.folder / f"{self.name.replace('/', '--')}--{method}"
        if not target.is_dir():
            self._quantize(target, replace(config, smoothing_strength=strength))
        yield haq.from_pretrained(target, device=self.device, dtype=self.dtype)
        shutil.rmtree(target)

    def _float(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)

    def _quantize(self, target: Path, config: haq.QuantizationConfig) -> None:
        protocol = self.protocol
        batches = haq.calibration_batches(
            self.tokenizer,
            protocol.source(protocol.calibration, "train"),
            num_samples=protocol.samples,
            sequence_length=protocol.length,
            seed=protocol.seed,
        )
        if not self.pickled:
            haq.quantize_checkpoint(self.path, target, batches, config, device=self.device)
        else:
            model = haq.quantize_model(self._float().to(self.device), batches, config)
            haq.save_pretrained(model, target, self.tokenizer)

    def evaluate(self, method: str, texts: list[str], add: Callable[..., None]) -> None:
        """A row for each text."""
        with self.model(method) as model:
            for text in texts:
                started = time.perf_counter()
                source = self.protocol.source(text, "held_out")
                tokens = haq.evaluation_tokens(self.tokenizer, source)[:, : self.protocol.limit]
                value = haq.perplexity(model, tokens, sequence_length=self.protocol.length)
                seconds = round(time.perf_counter() - started, 1)
                add(
                    model=self.name,
                    method=method,
                    text=text,
                    perplexity=value,
                    tokens=tokens.shape[1] // self.protocol.length * self.protocol.length,
                    weights_gb=round(self.weights["float" if method == "float" else "int8"], 3),
                    evaluation_seconds=seconds,
                )
                print(f"{self.name}, {method}, {text}: {value:.4f} ({seconds:.0f} s)", flush=True)


# --- The table ------------------------------------------------------------------------------------


def table(models: list[str], texts: list[str], results: Results, left_out: dict[Any, str]) -> str:
    """Markdown, with what is published where something is."""
    lines = [
        f"| model | text | {' | '.join(METHODS)} | published float | paper |",
        "| --- | --- |" + " ---: |" * (len(METHODS) + 2),
    ]
    for model in models:
        for text in texts:
            found = {method: results.perplexity(model, method, text) for method in METHODS}
            cells = [
                left_out.get((model, method), "") if value is None else f"{value:.3f}"
                for method, value in found.items()
            ]
            published = PUBLISHED.get(text, {}).get(model)
            cells.append("" if published is None else f"{published:.2f}")
            paper = PAPER.get(text) if model == MIXTRAL else None
            cells.append("" if paper is None else f"{paper[0]:.3f} -> {paper[1]:.3f}")
            lines.append(f"| {model} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="small models, no network")
    parser.add_argument("--models", nargs="+", help="of the hub; all of the table if not given")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--texts", nargs="+", choices=["wikitext2", "c4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="results, and models on their way")
    given = parser.parse_args()
    given.models = given.models or (TINY if given.dry_run else [*OPT, MIXTRAL])
    given.texts = ["python"] if given.dry_run else given.texts or ["wikitext2", "c4"]
    given.out = given.out or Path("build", "paper-dry-run" if given.dry_run else "paper")
    return given


def main() -> None:
    given = arguments()
    protocol = Protocol("python", 8, 256, limit=8192) if given.dry_run else Protocol()
    versions = {name: version(name) for name in ("haq", "torch", "transformers")}
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "results.json", vars(protocol) | versions)
    left_out: dict[Any, str] = {}
    for name in given.models:
        missing = {
            method: [t for t in given.texts if results.perplexity(name, method, t) is None]
            for method in given.methods
        }
        if not any(missing.values()):
            continue
        work = Work(name, given.device, protocol, given.out)
        free = available(given.device)
        needs = ", ".join(f"{method} {work.needs(method):.2f} GB" for method in missing)
        print(f"{name} needs: {needs}; {free:.1f} GB are free", flush=True)
        for method, texts in missing.items():
            if work.needs(method) > free:
                left_out[name, method] = f"needs {work.needs(method):.0f} GB"
            elif texts:
                work.evaluate(method, texts, results.add)
    print(f"\n{table(given.models, given.texts, results, left_out)}")


if __name__ == "__main__":
    main()

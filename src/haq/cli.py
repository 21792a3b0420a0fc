"""The command line: ``haq quantize | inspect | evaluate | profile | generate``.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 it failed
and the message says why, 2 the command was not understood.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from haq.checkpoint.files import TensorFiles, read_json
from haq.checkpoint.format import HAQ_FILE
from haq.checkpoint.load import from_pretrained
from haq.checkpoint.stream import quantize_checkpoint
from haq.config import OffloadConfig, QuantizationConfig
from haq.devices import checked_device
from haq.evaluation import compare, evaluation_tokens, perplexity
from haq.offload.offloader import ExpertOffloader
from haq.offload.routing import RoutingStatistics
from haq.quantization.calibration import calibration_batches
from haq.quantization.report import QuantizationReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Int8 weights and activations for language models of transformers.",
)

_TEXT = '"wikitext2" or "c4" from the hub, or a .txt, .json or .jsonl file'

Device = Annotated[str, typer.Option(help='Where it runs: "cpu", "cuda", "cuda:1".')]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Length = Annotated[
    int | None, typer.Option(help="Tokens per window; 2048, or as many as the model has.")
]


def main() -> None:
    """Run the command line: the ``haq`` that pip installs."""
    app()


def _reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A message and exit code 1 in the place of a traceback, for what users can do about."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        # What safetensors raises is of none of the usual kinds.
        except (
            OSError,
            RuntimeError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            for line in (f"haq: {error}", *getattr(error, "__notes__", ())):
                typer.echo(line, err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            for line in getattr(error, "__notes__", ["haq: interrupted."]):
                typer.echo(line, err=True)
            raise typer.Exit(130) from error

    return wrapped


@app.command()
@_reporting_errors
def quantize(
    source: Annotated[str, typer.Argument(help="Directory of a float model, or its hub name.")],
    output: Annotated[Path, typer.Argument(help="Where to: a new directory.")],
    calibration: Annotated[str, typer.Option(help=f"Text like what it is for: {_TEXT}.")] = (
        "wikitext2"
    ),
    num_samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    sequence_length: Length = None,
    seed: Annotated[int, typer.Option(help="Which windows are taken.")] = 0,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Modules that stay float; can be repeated.")
    ] = None,
    smoothing: Annotated[str, typer.Option(help='"search", "fixed" or "none".')] = "search",
    rounding: Annotated[str, typer.Option(help='"hessian" or "nearest".')] = "hessian",
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option(help="Go on with what is there.")] = True,
    as_json: AsJson = False,
) -> None:
    """Make a model int8, from disk to disk, one block in memory at a time."""
    config = QuantizationConfig(
        smoothing=smoothing,  # type: ignore[arg-type]
        rounding=rounding,  # type: ignore[arg-type]
        exclude=(*QuantizationConfig.exclude, *(exclude or ())),
    )
    batches = calibration_batches(
        AutoTokenizer.from_pretrained(source),
        calibration,
        num_samples=num_samples,
        sequence_length=_length(source, sequence_length),
        seed=seed,
    )
    report = quantize_checkpoint(source, output, batches, config, device=device, resume=resume)
    typer.echo(json.dumps(report.to_dict()) if as_json else f"{report}\n\nSaved in {output}.")


@app.command()
@_reporting_errors
def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint, int8 or float.")],
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint holds, without loading it."""
    found = _contents(directory)
    if as_json:
        typer.echo(json.dumps(found))
        return
    if found["report"] is not None:
        typer.echo(f"{QuantizationReport.from_dict(found['report'])}\n")
    for dtype, (count, size) in found["tensors"].items():
        typer.echo(f"{dtype:5} {count:6,} tensors {size / 1e6:12,.1f} MB")
    typer.echo(f"{found['architecture']}, {found['method']}.")


def _contents(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json")
    entry = config.get("quantization_config") or {}
    tensors: dict[str, list[int]] = {}
    for header in TensorFiles(directory).headers.values():
        total = tensors.setdefault(header.dtype, [0, 0])
        total[0] += 1
        total[1] += header.num_bytes
    notes = read_json(directory / HAQ_FILE) if (directory / HAQ_FILE).is_file() else {}
    method = " ".join(filter(None, (entry.get("quant_method"), entry.get("format"))))
    return {
        "architecture": (config.get("architectures") or ["unknown architecture"])[0],
        "method": method or "not quantized",
        "tensors": tensors,
        "report": notes.get("report"),
    }


@app.command()
@_reporting_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory of an int8 or a float model.")],
    text: Annotated[str, typer.Option(help=f"What to read: {_TEXT}.")] = "wikitext2",
    reference: Annotated[
        str | None, typer.Option(help="The float model, to say what int8 costs.")
    ] = None,
    sequence_length: Length = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than this.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and what a model loses against another."""
    tokens = evaluation_tokens(AutoTokenizer.from_pretrained(model), text)
    tokens = tokens if max_tokens is None else tokens[:, :max_tokens]
    length = _length(model, sequence_length)
    loaded = _load(model, device)
    if reference is None:
        value = perplexity(loaded, tokens, sequence_length=length)
        typer.echo(json.dumps({"perplexity": value}) if as_json else f"perplexity {value:.4f}")
        return
    result = compare(_load(reference, device), loaded, tokens, sequence_length=length)
    typer.echo(json.dumps(asdict(result)) if as_json else str(result))


@app.command()
@_reporting_errors
def generate(
    model: Annotated[str, typer.Argument(help="Directory of an int8 or a float model.")],
    prompt: Annotated[str, typer.Argument(help="What to go on with.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 100,
    sample: Annotated[bool, typer.Option(help="Draw tokens; else the likeliest.")] = False,
    seed: Annotated[int, typer.Option(help="For --sample.")] = 0,
    device: Device = "cpu",
    gpu_memory: Annotated[
        str | None,
        typer.Option(help='Of a mixture of experts on --device, "16GiB"; the rest is on the CPU.'),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="For --gpu-memory: what `haq profile` wrote.")
    ] = None,
) -> None:
    """Let a model write."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    loaded = _load(model, device if gpu_memory is None else "cpu")
    side: AbstractContextManager[ExpertOffloader | None] = nullcontext()
    if gpu_memory is not None:
        length = inputs["input_ids"].shape[1] + max_new_tokens
        side = ExpertOffloader(
            loaded,
            device=device,
            gpu_memory=gpu_memory,
            statistics=None if statistics is None else RoutingStatistics.load(statistics),
            config=OffloadConfig(max_length=length),
        )
    with side as offloader:
        inputs = inputs.to(loaded.device)
        torch.manual_seed(seed)
        write: Callable[..., Tensor] = loaded.generate  # type: ignore[assignment]
        written = write(**inputs, max_new_tokens=max_new_tokens, do_sample=sample)
        typer.echo(tokenizer.decode(written[0], skip_special_tokens=True))
        if offloader is not None:
            typer.echo(f"\n{offloader.report()}", err=True)


@app.command()
@_reporting_errors
def profile(
    model: Annotated[str, typer.Argument(help="Directory of an int8 or a float model.")],
    output: Annotated[Path, typer.Argument(help="Where to: an .npz file.")],
    text: Annotated[str, typer.Option(help=f"Text like what it is for: {_TEXT}.")] = "wikitext2",
    num_samples: Annotated[int, typer.Option(help="Windows of text.")] = 32,
    sequence_length: Length = None,
    seed: Annotated[int, typer.Option(help="Which windows are taken.")] = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Note which experts a mixture chooses, and after which ones: what offloading places by."""
    batches = calibration_batches(
        AutoTokenizer.from_pretrained(model),
        text,
        num_samples=num_samples,
        sequence_length=_length(model, sequence_length),
        seed=seed,
    )
    found = RoutingStatistics.collect(_load(model, device), batches)
    found.save(output)
    if as_json:
        typer.echo(json.dumps({"layers": found.layers, "counts": found.counts.tolist()}))
        return
    for name, row in zip(found.layers, found.popularity, strict=True):
        half = sorted(row, reverse=True)[: len(row) // 2]
        typer.echo(
            f"{name}: half of the experts take {100 * sum(half) / sum(row):.1f} % of choices"
        )
    typer.echo(f"{found.tokens:,} tokens. Saved in {output}.")


def _load(name: str, device: str) -> PreTrainedModel:
    """An int8 model by haq, any other by transformers."""
    folder = Path(name)
    if folder.is_dir() and read_json(folder / "config.json").get("quantization_config"):
        return from_pretrained(folder, device=device)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    model.to(checked_device(device))  # type: ignore[arg-type]
    return model


def _length(name: str, asked: int | None) -> int:
    positions = getattr(AutoConfig.from_pretrained(name), "max_position_embeddings", None) or 2048
    return min(2048, positions) if asked is None else asked


if __name__ == "__main__":
    main()

"""``haq quantize``, ``evaluate``, ``profile`` and ``backends``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from haq.checkpoint.files import TensorFiles
from haq.checkpoint.format import HAQ_FILE
from haq.checkpoint.save import check_new, save_pretrained
from haq.checkpoint.stream import quantize_checkpoint
from haq.cli import terminal
from haq.cli.models import (
    batches_of,
    config_of,
    has_safetensors,
    length_of,
    model_of,
    tokenizer_of,
    tokens_of,
)
from haq.config import QuantizationConfig
from haq.devices import checked_device
from haq.evaluation import compare, perplexity
from haq.int8.matmul import backends as known_backends
from haq.logs import get_logger
from haq.offload.routing import RoutingStatistics
from haq.quantization.pipeline import quantize_model
from haq.quantization.report import QuantizationReport, quantization_report

logger = get_logger(__name__)

# How many of the layers with the largest errors are named.
_WORST = 3


def quantize(
    source: str,
    output: Path,
    calibration: str,
    sequence_length: int | None,
    config: QuantizationConfig,
    *,
    device: str,
    resume: bool,
    as_json: bool,
    **windows: int,
) -> None:
    """Make a model int8 from disk to disk. ``windows`` are options of `calibration_batches`."""
    checked_device(device)
    if not (output / HAQ_FILE).is_file():  # Else it may be what this very call has made.
        check_new(output)
    length = length_of(config_of(source), sequence_length)
    batches = batches_of(source, calibration, "--calibration", sequence_length=length, **windows)
    if has_safetensors(source):
        report = quantize_checkpoint(source, output, batches, config, device=device, resume=resume)
    else:
        report = _quantize_as_a_whole(source, output, batches, config, device)
    size = sum(header.num_bytes for header in TensorFiles(output).headers.values())
    lines = [
        report.summary(),
        *_worst(report),
        "",
        f"Saved in {output}, {size / 1e6:,.1f} MB. Every layer: haq inspect {output}",
    ]
    terminal.result("\n".join(lines), report.to_dict(), as_json)


def _quantize_as_a_whole(
    source: str, output: Path, batches: list[Tensor], config: QuantizationConfig, device: str
) -> QuantizationReport:
    """For weights that `transformers` has to unpickle; nothing of it can be gone on with."""
    logger.info(f"{source} has no safetensors: it is loaded as a whole.")
    model = model_of(source, config_of(source), device)
    quantize_model(model, batches, config)
    save_pretrained(model, output, tokenizer_of(source))
    return quantization_report(model)


def _worst(report: QuantizationReport) -> list[str]:
    layers = sorted(report.layers, key=lambda layer: -layer.error_after)[:_WORST]
    named = [f"  {layer.error_after:.1e}  {layer.name}" for layer in layers]
    return ["Largest relative errors:", *named] if layers else []


def evaluate(
    name: str,
    text: str,
    reference: str | None,
    sequence_length: int | None,
    max_tokens: int | None,
    *,
    device: str,
    as_json: bool,
) -> None:
    """Perplexity of a model, or what it loses against another."""
    checked_device(device)
    config = config_of(name)
    reference_config = None if reference is None else config_of(reference)
    length = length_of(config, sequence_length)
    tokens = tokens_of(name, text, "--text")[:, :max_tokens]
    model = model_of(name, config, device)
    read = {"tokens": tokens.shape[1] // length * length, "sequence_length": length}
    if reference is None or reference_config is None:
        value = perplexity(model, tokens, sequence_length=length)
        shown = f"perplexity {value:.4f} on {read['tokens']:,} tokens in windows of {length:,}"
        terminal.result(shown, {"perplexity": value} | read, as_json)
        return
    result = compare(
        model_of(reference, reference_config, device), model, tokens, sequence_length=length
    )
    values: dict[str, Any] = {
        "perplexity": result.perplexity,
        "perplexity_reference": result.perplexity_reference,
    }
    terminal.result(str(result), values | asdict(result) | {"sequence_length": length}, as_json)


def profile(
    name: str,
    output: Path,
    text: str,
    sequence_length: int | None,
    *,
    device: str,
    as_json: bool,
    **windows: int,
) -> None:
    """Write down which experts are chosen. ``windows`` are options of `calibration_batches`."""
    checked_device(device)
    config = config_of(name)
    length = length_of(config, sequence_length)
    batches = batches_of(name, text, "--text", sequence_length=length, **windows)
    found = RoutingStatistics.collect(model_of(name, config, device), batches)
    found.save(output)
    lines = []
    for layer, row in zip(found.layers, found.popularity, strict=True):
        half = sorted(row, reverse=True)[: len(row) // 2]
        share = 100 * sum(half) / sum(row)
        lines.append(f"{layer}: half of the experts take {share:.1f} % of choices")
    lines.append(f"{found.tokens:,} tokens. Saved in {output}.")
    values = {
        "layers": found.layers,
        "counts": found.counts.tolist(),
        "tokens": found.tokens,
    }
    terminal.result("\n".join(lines), values, as_json)


def backends(as_json: bool) -> None:
    """Which int8 products there are, and which one is used."""
    found = known_backends()
    terminal.result(str(found), [asdict(status) for status in found], as_json)

"""``haq inspect``: what a checkpoint holds, by its headers alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
)

from haq.checkpoint.files import Header, TensorFiles, read_json
from haq.checkpoint.format import HAQ_FILE
from haq.cli import terminal
from haq.cli.models import checked_name, of_hub
from haq.quantization.report import QuantizationReport

# Columns of the report that a narrow terminal does without, the first ones first.
_SPARE = ("shape", "input", "rounding", "tokens", "note", "smoothing")
_WORDS = ("layer", "input", "smoothing", "rounding", "note")


def inspect(name: str, as_json: bool) -> None:
    """Print the report, if haq made the checkpoint, and what its files hold."""
    found = _contents(name)
    size = sum(num_bytes for _, num_bytes in found["tensors"].values())
    lines = []
    if found["report"] is not None:
        report = QuantizationReport.from_dict(found["report"])
        lines += [terminal.table(report.table(), _WORDS, _SPARE), "", report.summary(), ""]
    lines += [
        f"{dtype:5} {count:6,} tensors {num_bytes / 1e6:12,.1f} MB"
        for dtype, (count, num_bytes) in found["tensors"].items()
    ]
    lines.append(f"{found['architecture']}, {found['method']}, {size / 1e6:,.1f} MB.")
    terminal.result("\n".join(lines), found, as_json)


def _contents(name: str) -> dict[str, Any]:
    config, notes, headers = _read(checked_name(name))
    entry = config.get("quantization_config") or {}
    tensors: dict[str, list[int]] = {}
    for header in headers:
        total = tensors.setdefault(header.dtype, [0, 0])
        total[0] += 1
        total[1] += header.num_bytes
    method = " ".join(filter(None, (entry.get("quant_method"), entry.get("format"))))
    return {
        "architecture": (config.get("architectures") or ["unknown architecture"])[0],
        "method": method or "not quantized",
        "tensors": tensors,
        "report": notes.get("report"),
    }


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any], Iterable[Header]]:
    """The config, haq's own notes and the header of every tensor."""
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    if folder is None:
        return of_hub(name, lambda: _from_hub(name))
    config = read_json(folder / "config.json")
    notes = read_json(folder / HAQ_FILE) if (folder / HAQ_FILE).is_file() else {}
    return config, notes, TensorFiles(folder).headers.values()


def _downloaded(name: str) -> Path | None:
    """Where a model of the hub is on this disk, if it is."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _from_hub(name: str) -> tuple[dict[str, Any], dict[str, Any], Iterable[Header]]:
    """The same without downloading a weight: the hub hands out the headers alone."""
    config = read_json(Path(hf_hub_download(name, "config.json")))
    try:
        notes = read_json(Path(hf_hub_download(name, HAQ_FILE)))
    except EntryNotFoundError:
        notes = {}
    try:
        files = get_safetensors_metadata(name).files_metadata
    except NotASafetensorsRepoError as error:
        raise ValueError(f"`{name}` must hold safetensors, and holds none: {error}") from error
    return (
        config,
        notes,
        [
            Header(Path(file), tensor.dtype, tuple(tensor.shape))
            for file, metadata in files.items()
            for tensor in metadata.tensors.values()
        ],
    )

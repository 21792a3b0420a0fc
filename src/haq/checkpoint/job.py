"""What the result of a long job depends on, so that no other is gone on with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from haq.config import QuantizationConfig
from haq.version import own_version


def describe(
    folder: Path, batches: Sequence[Tensor | Mapping[str, Tensor]], config: QuantizationConfig
) -> dict[str, Any]:
    """Sizes and times of weights, contents of JSON files, tokens, configuration and software.

    Args:
        folder: of the source.
        batches: of calibration.
        config: what is to be done.

    Returns:
        JSON values; what is equal gives the same result on the same device.
    """
    weights = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.glob("*.safetensors"))
    }
    texts = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.json"))
    }
    job = {
        "source": weights | texts,
        "calibration": _digest_of_batches(batches),
        "configuration": config.to_dict(),
        "software": {
            "haq": own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    values: dict[str, Any] = json.loads(json.dumps(job))  # As it will be read: no tuples.
    return values


def _digest_of_batches(batches: Sequence[Tensor | Mapping[str, Tensor]]) -> str:
    seen = hashlib.sha256()
    for batch in batches:
        tensors = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        for name in ("input_ids", "attention_mask"):
            tensor = tensors.get(name) if isinstance(tensors, Mapping) else None
            if isinstance(tensor, Tensor):
                seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                seen.update(tensor.cpu().contiguous().numpy().tobytes())
    return seen.hexdigest()


def digest(values: object) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

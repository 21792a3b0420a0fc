"""From the tensors on disk to a model whose parameters are only shapes."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from haq.checkpoint.files import TensorFiles
from haq.checkpoint.format import Stored
from haq.logs import get_logger
from haq.model.published import tied_names
from haq.nn import Int8Linear

logger = get_logger(__name__)


def check_headers(stored: Sequence[Stored], files: TensorFiles, model: PreTrainedModel) -> None:
    """Whether all tensors are there, of the right shape and kind, before any is read.

    Args:
        stored: what the model needs.
        files: what is on disk.
        model: for messages, and for the names that are tied.

    Raises:
        ValueError: a tensor is missing or another, or is a zero point; the message names its file.
    """
    for tensor in stored:
        header = files.headers.get(tensor.name)
        if header is None:
            raise ValueError(
                f"The checkpoint must hold `{tensor.name}` for a {type(model).__name__}, and no "
                f"file of it does: {', '.join(sorted(map(str, files.paths)))}."
            )
        right = header.dtype == "I8" if tensor.int8 else header.is_float
        if not right or header.shape != tensor.shape:
            raise ValueError(
                f"`{tensor.name}` in `{header.file}` must be {'int8' if tensor.int8 else 'float'} "
                f"{list(tensor.shape)}, got {header.dtype} {list(header.shape)}."
            )
    known = {tensor.name for tensor in stored} | set(tied_names(model))
    others = sorted(set(files.headers) - known)
    points = [name for name in others if name.endswith("zero_point")]
    if points:
        raise ValueError(
            f"`{points[0]}` in `{files.headers[points[0]].file}` is a zero point: haq runs "
            "symmetric weights only."
        )
    if others:
        logger.warning(
            f"{len(others)} tensors of the checkpoint belong to nothing in a "
            f"{type(model).__name__} and were not loaded: {', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}."
        )


def fill(
    model: PreTrainedModel,
    stored: Sequence[Stored],
    files: TensorFiles,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    progress: bool = False,
) -> None:
    """Read every tensor to where it belongs, module by module.

    Args:
        model: with parameters on the meta device; those that are stored will be in memory.
        stored: what to read.
        files: what it is read from.
        device: where it goes.
        dtype: of what is float; as it is on disk if None.
        progress: show a bar with the modules read and the time left.

    Raises:
        ValueError: a value of an int8 layer cannot be; the message names tensor and file.
    """
    by_owner = _by_owner(stored)
    # None: shown on a terminal or in a notebook, not in a file.
    disable = None if progress else True
    bar = logging.tqdm(by_owner.items(), desc="Loading", unit="module", disable=disable)
    for owner, tensors in bar:
        module = model.get_submodule(owner)
        values = _read(tensors, module, files)
        if isinstance(module, Int8Linear):
            here = {name: value.to(device) for name, value in values.items()}
            module.load_state_dict(here, strict=True, assign=True)
        else:
            for name, value in values.items():
                own = getattr(module, name).dtype
                cast = value if dtype is None else value.to(_kept(model, f"{owner}.{name}", own))
                _set(module, name, cast.to(device))
    files.close()
    model._apply(lambda t: t if t.is_meta else t.to(device))  # Buffers that are not stored.


def _by_owner(stored: Sequence[Stored]) -> dict[str, list[Stored]]:
    """In the order of the first tensor of each module, all of a module together."""
    by_owner: dict[str, list[Stored]] = {}
    for tensor in stored:
        by_owner.setdefault(tensor.key.rpartition(".")[0], []).append(tensor)
    return by_owner


def _read(tensors: Sequence[Stored], module: nn.Module, files: TensorFiles) -> dict[str, Tensor]:
    """Values by their name in the module, each with memory of its own."""
    int8 = isinstance(module, Int8Linear)
    values: dict[str, Tensor] = {}
    for tensor in tensors:
        leaf = tensor.key.rpartition(".")[2]
        read = files.read(tensor.name)
        if int8 and not tensor.int8:
            read = read.float()  # Scales and biases of int8 layers are float32 in every model.
            _check_values(tensor, read, files.headers[tensor.name].file)
        if leaf not in values:
            own = getattr(module, leaf)
            values[leaf] = torch.empty(own.shape, dtype=read.dtype)
        tensor.put(read, values[leaf])
    return values


def _check_values(tensor: Stored, values: Tensor, file: Path) -> None:
    """What an int8 layer would refuse as well, without knowing the name or the file."""
    right, must = values.isfinite(), "finite"
    if tensor.key.endswith("weight_scale"):
        right, must = right & (values > 0), "finite and positive"
    if not bool(right.all()):
        raise ValueError(
            f"`{tensor.name}` in `{file}` must be {must}, got {values[~right][0].item()}."
        )


def _kept(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter: float32 for what `transformers` keeps in it, as it says."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    matches = (re.search(pattern.replace("*", ".*"), name) for pattern in kept)
    return torch.float32 if any(matches) else dtype


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value)
    else:
        module._buffers[name] = value

"""`save_pretrained`: an int8 model to a directory."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from haq.checkpoint.files import INDEX
from haq.checkpoint.format import (
    FORMAT_VERSION,
    HAQ_FILE,
    Stored,
    float_modules,
    int8_heads,
    quantization_entry,
    stored_tensors,
)
from haq.model.experts import check_in_one_place
from haq.model.published import published_pieces, skeleton, tied_names
from haq.nn import Int8Experts, Int8Linear
from haq.quantization.report import QuantizationReport, find_report
from haq.version import own_version


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_shard_size: str = "5GB",
) -> None:
    """Write an int8 model as a directory that `haq.from_pretrained` and vLLM read.

    It is a directory of transformers: ``config.json`` with a ``quantization_config`` of
    compressed-tensors, safetensors under the names that published checkpoints have, the generation
    config, the tokenizer. What only haq needs, the report and which inputs have zero points, is in
    ``haq.json`` beside them. It appears when it is complete, and not before. In memory is one shard
    beside the model.

    Args:
        model: what `haq.quantize_model` returned.
        directory: where to; it must not exist, or be empty.
        tokenizer: saved with it, if given.
        max_shard_size: how large the tensors of a file are together, but for one that is larger by
            itself: "5GB", "500MB".

    Raises:
        TypeError: ``model`` is no model of transformers, or ``tokenizer`` no tokenizer.
        RuntimeError: an `ExpertOffloader` is attached.
        ValueError: it has no int8 layers, or weights on the meta device.
        FileExistsError: the directory holds something, or is a file.
        OSError: it cannot be written to, or the disk is full. Nothing of the checkpoint is left
            behind.

    Examples:
        >>> save_pretrained(model, "mixtral-int8", tokenizer)  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a `transformers` model, got {type(model).__name__}.")
    check_in_one_place(model)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(
            f"`tokenizer` must be a tokenizer of `transformers`, got {type(tokenizer).__name__}."
        )
    if not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError(
            f"`model` must be int8, got a {type(model).__name__} in float. Call "
            "`haq.quantize_model(model, calibration)` first, or `model.save_pretrained` for float."
        )
    on_meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if on_meta is not None:
        raise ValueError(f"`model` must have its weights in memory, `{on_meta}` is on meta.")
    twin = skeleton(type(model), copy.deepcopy(model.config))
    _check_ties(model, twin)
    pieces = published_pieces(twin)
    with new_directory(directory) as folder:
        # What is small first: what fails there does not cost the time that tensors take.
        ignore, asymmetric = float_modules(model, pieces), sorted(asymmetric_layers(model))
        heads = int8_heads(model, pieces)
        write_configs(folder, model, model.dtype, ignore, heads, asymmetric, find_report(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_tensors(folder, model, stored_tensors(model, pieces), max_shard_size)


@contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside ``directory`` that takes its place when the block has ended."""
    target = Path(directory).resolve()  # "." has no name, and a link is no directory to replace.
    check_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # It was made for its owner alone.
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_new(target: Path) -> None:
    """Refuse a directory that holds something.

    Raises:
        FileExistsError: it does, or it is a file.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"`{target}` must not exist, or be an empty directory: it would be overwritten. Choose "
            "another, or remove it."
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(
    folder: Path, model: PreTrainedModel, stored: list[Stored], max_shard_size: str
) -> None:
    """All tensors, in as many files as it takes, and the index if that is more than one."""
    values = _State(model)
    shapes = {s.name: torch.empty(s.shape, dtype=values.dtype(s), device="meta") for s in stored}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    by_name = {s.name: s for s in stored}
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, take_tensors(model, [by_name[name] for name in names]))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def take_tensors(model: nn.Module, stored: Sequence[Stored]) -> dict[str, Tensor]:
    """Tensors as they are written, by their names on disk, on the CPU."""
    values = _State(model)
    return {tensor.name: values.take(tensor) for tensor in stored}


class _State:
    """Values of the model's state by key, an int8 weight unpacked when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: tuple[str, Tensor] | None = None

    def dtype(self, stored: Stored) -> torch.dtype:
        return torch.int8 if stored.int8 else self._value(stored.key).dtype

    def take(self, stored: Stored) -> Tensor:
        return stored.take(self._value(stored.key)).detach().cpu()

    def _value(self, key: str) -> Tensor:
        # Gate and up are two tensors on disk and one here, which is unpacked once.
        if self._last is None or self._last[0] != key:
            self._last = key, _find(self._model, key)
        return self._last[1]


def write_safetensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """One file of tensors.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(
            f"`{file}` could not be written: {error}. Is there room on the disk?"
        ) from error


def write_configs(
    folder: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    ignore: Sequence[str],
    heads: Sequence[str],
    asymmetric: Sequence[str],
    report: QuantizationReport | None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """``config.json``, ``generation_config.json`` and ``haq.json``.

    Args:
        folder: where to.
        model: has both configurations; its weights are not looked at.
        dtype: of what is float.
        ignore: names on disk of the modules that stay float.
        heads: names of an int8 head.
        asymmetric: layers whose inputs have zero points, and experts whose second ones do.
        report: how the model was made, if that is known.
        notes: more for ``haq.json``.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.quantization_config = quantization_entry(ignore, heads)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    values = {
        "format": FORMAT_VERSION,
        "asymmetric": list(asymmetric),
        "report": None if report is None else report.to_dict(),
        "made_with": {
            "haq": own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **notes,
    }
    write_json(folder / HAQ_FILE, values)


def asymmetric_layers(model: PreTrainedModel) -> Iterator[str]:
    """Layers whose inputs have zero points, and experts whose second ones do."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Experts):
            first = module.down[0]
            if isinstance(first, Int8Linear) and first.asymmetric:
                yield name
        elif isinstance(module, Int8Linear) and module.asymmetric:
            owner = name.rpartition(".")[0].rpartition(".")[0]
            if not isinstance(model.get_submodule(owner), Int8Experts):
                yield name


def write_json(file: Path, values: dict[str, Any]) -> None:
    """An object as JSON that people can read, the same bytes for the same values."""
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _check_ties(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """What the configuration says is one tensor must be one."""
    for name, original in tied_names(twin).items():
        one, other = (_find(model, n) for n in (name, original))
        if one is not other and not torch.equal(one, other):
            raise ValueError(
                f"`{name}` and `{original}` must be one tensor, as `model.config` says, and "
                "differ. Set `model.config.tie_word_embeddings = False` to save both."
            )


def _find(model: nn.Module, name: str) -> Tensor:
    """A parameter, a buffer, or the weight of an int8 layer, which is neither."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value

"""`from_pretrained`: a directory to an int8 model, which is never in float."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from haq.checkpoint.files import TensorFiles, read_json
from haq.checkpoint.format import (
    FORMAT_VERSION,
    HAQ_FILE,
    Stored,
    check_entry,
    stored_tensors,
)
from haq.model.experts import Activation, is_fused_experts, unfused_shapes
from haq.model.linears import bias_view, is_linear, weight_view
from haq.model.published import Piece, published_pieces, skeleton, tied_names
from haq.nn import Int8Experts, Int8Linear
from haq.quantization.guard import guard
from haq.quantization.report import QuantizationReport, attach_report

logger = logging.get_logger(__name__)


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    gpu_memory: str | int | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load an int8 model that `haq.save_pretrained` wrote, and run it in int8.

    Checkpoints of other tools in the same form (llm-compressor's W8A8) load as well. No float copy
    of an int8 weight ever exists: in memory are the model and one file. The logits are those of the
    model that was saved, bit for bit.

    Args:
        directory: of the checkpoint.
        device: where the model goes.
        gpu_memory: reserved for a model in two tiers of memory; not there yet.
        dtype: of what is float; as it was saved if None.

    Returns:
        The model, in eval mode. `haq.quantization_report` tells how it was made, if haq made it.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: something in it is damaged, of another method or does not fit the architecture;
            the message names the file and the tensor.
        NotImplementedError: ``gpu_memory`` was given.

    Examples:
        >>> model = from_pretrained("mixtral-int8")  # doctest: +SKIP
    """
    if gpu_memory is not None:
        raise NotImplementedError(
            "`gpu_memory` is for a model in two tiers of memory, which haq cannot run yet. Load it "
            'on one device: `device="cpu"` or `device="cuda"`.'
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` must be a float dtype such as torch.bfloat16, got {dtype!r}.")
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` must be the directory of a checkpoint, and is none.")
    check_entry(
        read_json(folder / "config.json").get("quantization_config"), folder / "config.json"
    )
    files, notes = TensorFiles(folder), _notes(folder)
    with _blamed_on(folder / "config.json"):
        # What a checkpoint brings is data: none of its code is run, nor is anybody asked.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    kind = model_class(config, folder)
    with _blamed_on(folder / "config.json"):
        with _by_default(dtype):
            model = skeleton(kind, config)
        pieces = published_pieces(model)
    with _blamed_on(folder / HAQ_FILE):
        values = notes.get("report")
        report = None if values is None else QuantizationReport.from_dict(values)
    generation = _generation_config(folder)
    asymmetric = set(notes.get("asymmetric", ()))
    int8 = _put_int8_modules(model, pieces, files, asymmetric)
    stored = stored_tensors(model, pieces)
    check_headers(stored, files, model)
    for name in sorted(asymmetric - int8):
        raise ValueError(
            f"`{folder / HAQ_FILE}` has `{name}` in `asymmetric`, which is no int8 layer of the "
            f"model in `{folder / 'config.json'}`: one of them is damaged."
        )
    fill(model, stored, files, torch.device(device), dtype)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    model.config.name_or_path = str(folder)
    guard(model)
    if report is not None:
        attach_report(model, report)
    return model


@contextmanager
def _by_default(dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters are made in ``dtype``, but for those that the architecture makes in another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _blamed_on(file: Path) -> Iterator[None]:
    """Values that make no sense fail anywhere and with anything: say where they came from."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"`{file}` is damaged: {type(error).__name__}: {error}") from error


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    read_json(file)
    with _blamed_on(file):
        return GenerationConfig.from_pretrained(folder)


def _notes(folder: Path) -> dict[str, Any]:
    """What haq wrote beside the checkpoint; nothing, if another tool made it."""
    file = folder / HAQ_FILE
    if not file.is_file():
        return {}
    notes = read_json(file)
    if notes.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"`{file}` must have the format {FORMAT_VERSION}, got {notes.get('format')!r}: it is "
            "damaged, or of a newer haq."
        )
    names = notes.get("asymmetric")
    # Names that are not text drop out of the set as a second one of the same does.
    if not isinstance(names, list) or len({n for n in names if isinstance(n, str)}) < len(names):
        raise ValueError(
            f"`{file}` must have a list of different layers in `asymmetric`, got {names!r}: it is "
            "damaged."
        )
    return notes


def model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    names = config.architectures or []
    one = len(names) == 1 and isinstance(names[0], str)
    kind = getattr(transformers, names[0], None) if one else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise ValueError(
            f"`{folder / 'config.json'}` must name one model class of transformers "
            f"{transformers.__version__} in `architectures`, got {names}."
        )
    return kind


def _put_int8_modules(
    model: PreTrainedModel, pieces: Sequence[Piece], files: TensorFiles, asymmetric: set[str]
) -> set[str]:
    """Shapes of int8 modules in the place of what is int8 on disk; returns where."""
    by_owner: dict[str, list[Piece]] = {}
    int8 = set()
    for piece in pieces:
        by_owner.setdefault(piece.parameter.rpartition(".")[0], []).append(piece)
    for owner, owned in by_owner.items():
        module = model.get_submodule(owner)
        matrices = [piece for piece in owned if piece.parameter.endswith(("weight", "_proj"))]
        if is_fused_experts(module) and _is_int8(owner, matrices, files):
            model.set_submodule(owner, _int8_experts(module, owner in asymmetric))
            int8.add(owner)
        elif is_linear(module) and matrices and _is_int8(owner, matrices, files):
            number, channels = weight_view(module).shape
            has_bias = bias_view(module) is not None
            model.set_submodule(
                owner, _int8_linear(number, channels, has_bias, owner in asymmetric)
            )
            int8.add(owner)
    return int8


def _is_int8(owner: str, matrices: Sequence[Piece], files: TensorFiles) -> bool:
    """Whether a layer is int8 on disk: any of its matrices, for they are all or none.

    One with a scale was to be, whatever its dtype.
    """
    # Experts that are published in one are each by themselves in this form.
    names = {p.name for p in matrices} | {f"{owner}.0.down_proj.weight"}
    int8 = {n for n in names if n in files.headers and files.headers[n].dtype == "I8"}
    return bool(int8) or any(f"{n}_scale" in files.headers for n in names)


def _int8_linear(number: int, channels: int, has_bias: bool, asymmetric: bool) -> Int8Linear:
    return Int8Linear(
        torch.empty(number, channels, dtype=torch.int8, device="meta"),
        torch.empty(number, 1, device="meta"),
        torch.empty(number, device="meta") if has_bias else None,
        asymmetric=asymmetric,
    )


def _int8_experts(experts: nn.Module, asymmetric: bool) -> Int8Experts:
    number, up, down, has_bias = unfused_shapes(experts)
    return Int8Experts(
        [_int8_linear(*up, has_bias, False) for _ in range(number)],
        [_int8_linear(*down, has_bias, asymmetric) for _ in range(number)],
        Activation(experts),
    )


def check_headers(stored: Sequence[Stored], files: TensorFiles, model: PreTrainedModel) -> None:
    """Whether all tensors are there, of the right shape and kind, before any is read."""
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
) -> None:
    """Read every tensor to where it belongs, module by module."""
    owners = groupby(_by_owner(stored), key=lambda tensor: tensor.key.rpartition(".")[0])
    for owner, tensors in owners:
        module = model.get_submodule(owner)
        values = _read(list(tensors), module, files)
        if isinstance(module, Int8Linear):
            here = {name: value.to(device) for name, value in values.items()}
            _load(module, owner, here, files)
        else:
            for name, value in values.items():
                own = getattr(module, name).dtype
                cast = value if dtype is None else value.to(_kept(model, f"{owner}.{name}", own))
                _set(module, name, cast.to(device))
    files.close()
    model._apply(lambda t: t if t.is_meta else t.to(device))  # Buffers that are not stored.


def _by_owner(stored: Sequence[Stored]) -> Iterator[Stored]:
    """In the order of the first tensor of each module, all of a module together."""
    by_owner: dict[str, list[Stored]] = {}
    for tensor in stored:
        by_owner.setdefault(tensor.key.rpartition(".")[0], []).append(tensor)
    for tensors in by_owner.values():
        yield from tensors


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


def _load(module: Int8Linear, owner: str, values: dict[str, Tensor], files: TensorFiles) -> None:
    """Fill an int8 layer: it checks what it is given."""
    try:
        module.load_state_dict(values, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"`{owner}` cannot be loaded from `{next(iter(files.headers.values())).file.parent}`: "
            f"{error}"
        ) from error


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

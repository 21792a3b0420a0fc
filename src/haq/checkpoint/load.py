"""`from_pretrained`: a directory to an int8 model, which is never in float."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from haq.checkpoint.files import TensorFiles, read_json
from haq.checkpoint.fill import check_headers, fill
from haq.checkpoint.format import FORMAT_VERSION, HAQ_FILE, check_entry, stored_tensors
from haq.devices import checked_device
from haq.model.experts import Activation, is_fused_experts, unfused_shapes
from haq.model.fast import use_fast_parts
from haq.model.linears import bias_view, is_linear, weight_view
from haq.model.published import Piece, published_pieces, skeleton
from haq.nn import Int8Experts, Int8Linear
from haq.offload.budget import parse_memory
from haq.offload.offloader import ExpertOffloader
from haq.quantization.guard import guard
from haq.quantization.report import QuantizationReport, attach_report


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    gpu_memory: str | int | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load an int8 model that `haq.save_pretrained` wrote, and run it in int8.

    Checkpoints of other tools in the same form (llm-compressor's W8A8) load as well. No float copy
    of an int8 weight ever exists: in memory are the model and one file. The logits are those of the
    model that was saved, bit for bit.

    Args:
        directory: of the checkpoint.
        device: where the model goes: the CPU if None, the GPU if None with ``gpu_memory``.
        gpu_memory: for a mixture of experts, what it may use of the GPU: "16GiB" or a number of
            bytes. The model comes with an `ExpertOffloader` attached, which `haq.find_offloader`
            gives; experts that do not fit are computed on the CPU.
        dtype: of what is float; as it was saved if None.

    Returns:
        The model, in eval mode. `haq.quantization_report` tells how it was made, if haq made it.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        TypeError: ``dtype`` is no float dtype.
        ValueError: ``device`` is not there; ``gpu_memory`` is too small, or the model has no
            experts; or something in the directory is damaged, of another
            method or does not fit the architecture: the message names the file and the tensor.
        RuntimeError: the GPU has less memory free than ``gpu_memory``.

    Examples:
        >>> model = from_pretrained("mixtral-int8")  # doctest: +SKIP
    """
    if gpu_memory is not None:  # What is wrong with it is said before anything is read.
        parse_memory(gpu_memory)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` must be a float dtype such as torch.bfloat16, got {dtype!r}.")
    wanted = checked_device(device or ("cpu" if gpu_memory is None else "cuda"))
    place = wanted if gpu_memory is None else torch.device("cpu")
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}` must be the directory of a checkpoint, and is none.")
    check_entry(
        read_json(folder / "config.json").get("quantization_config"), folder / "config.json"
    )
    files, notes = TensorFiles(folder), _notes(folder)
    model = float_model(folder, dtype)
    del model.config.quantization_config
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
    fill(model, stored, files, place, dtype, progress=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    if dtype is not None:
        model.config.dtype = dtype
    guard(model)
    use_fast_parts(model)
    if report is not None:
        attach_report(model, report)
    if gpu_memory is not None:
        ExpertOffloader(model, device=wanted, gpu_memory=gpu_memory).attach()
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
        raise ValueError(
            f"`{file}` is damaged, or of another transformers than {transformers.__version__}: "
            f"{type(error).__name__}: {error}"
        ) from error


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


def float_model(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The float model of a checkpoint's ``config.json``, as `skeleton` makes it.

    Args:
        folder: of the checkpoint.
        dtype: of its parameters; the default dtype if None.

    Raises:
        ValueError: the file is damaged, or names no class of transformers.
    """
    file = folder / "config.json"
    with _blamed_on(file):
        # What a checkpoint brings is data: none of its code is run, nor is anybody asked.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = _class_of(config, file)
    with _blamed_on(file), _by_default(dtype):
        return skeleton(kind, config)


def _class_of(config: PretrainedConfig, file: Path) -> type[PreTrainedModel]:
    names = config.architectures or []
    one = len(names) == 1 and isinstance(names[0], str)
    kind = getattr(transformers, names[0], None) if one else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise ValueError(
            f"`{file}` must name one model class of transformers "
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

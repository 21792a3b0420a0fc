"""The tensors of a directory of safetensors files: where they are, what they are, their values.

Nothing is ever unpickled, and every header is read before any tensor is.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Header:
    """What the header of a file says of a tensor.

    Attributes:
        file: where it is.
        dtype: as safetensors writes it: "I8", "F32", "BF16".
        shape: of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it is one of the float types that a model computes in."""
        return self.dtype in ("F64", "F32", "F16", "BF16")

    @property
    def num_bytes(self) -> int:
        """What its values take."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


class TensorFiles:
    """The safetensors of a checkpoint, one file or many with an index.

    Args:
        directory: of the checkpoint.
        only: a single file of it, without an index.

    Attributes:
        headers: of every tensor, by its name.
        paths: of the files.

    Raises:
        FileNotFoundError: there is no checkpoint, or a file of its index is missing.
        ValueError: the index or a header is damaged, a file is cut short, a name is not in the file
            that the index says, or the index leads out of the directory.
    """

    def __init__(self, directory: Path, only: str | None = None) -> None:
        self._open: tuple[Path, Any] | None = None
        self.headers: dict[str, Header] = {}
        files = _files(directory) if only is None else {directory / only: None}
        self.paths = list(files)
        for file, names in files.items():
            self._add(file, names)

    def _add(self, file: Path, expected: list[str] | None) -> None:
        handle = self._handle(file)
        names = list(handle.keys())
        missing = sorted(set(expected or ()).difference(names))
        if missing:
            raise ValueError(
                f"`{file}` must hold the tensor `{missing[0]}`, as the index says, and does not "
                f"({len(missing)} of {len(expected or ())} are missing). Get the file again, or "
                "the index that belongs to it."
            )
        for name in names if expected is None else expected:
            part = handle.get_slice(name)
            self.headers[name] = Header(file, str(part.get_dtype()), tuple(part.get_shape()))

    def read(self, name: str) -> Tensor:
        """The values of a tensor. They may live in the file: copy what is to stay."""
        header = self.headers[name]
        try:
            values = self._handle(header.file).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"`{name}` in `{header.file}` cannot be read: {error}.") from error
        assert isinstance(values, Tensor)
        return values

    def close(self) -> None:
        """Let go of the file that was read last."""
        self._open = None

    def _handle(self, file: Path) -> Any:
        """One file at a time is mapped, so that not the whole checkpoint counts as memory."""
        if self._open is None or self._open[0] != file:
            self._open = None
            try:
                self._open = (file, safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"`{file}` is no complete safetensors file: {error}. It is damaged or was cut "
                    "short: get it again."
                ) from error
        return self._open[1]


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """The files with the names that the index expects in each; None where there is no index."""
    index = directory / INDEX
    if index.is_file():
        return _indexed(directory, index)
    single = directory / SINGLE
    if single.is_file():
        return {single: None}
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    hint = (
        f" It has `{pickled[0].name}`, which would have to be unpickled: haq does not. Load it "
        "with `transformers` and save it again."
        if pickled
        else ""
    )
    raise FileNotFoundError(
        f"`{directory}` must hold `{INDEX}` or `{SINGLE}`, and has neither.{hint}"
    )


def _indexed(directory: Path, index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"`{index}` must have a `weight_map` from tensors to files.")
    files: dict[Path, list[str] | None] = {}
    for name, value in weight_map.items():
        if not isinstance(value, str) or not _is_file_name(value):
            raise ValueError(
                f"`{index}` must lead to files beside it, but has {value!r} for `{name}`."
            )
        file = directory / value
        if not file.is_file():
            raise FileNotFoundError(
                f"`{file}` is missing: `{index.name}` says that it holds `{name}`. Get the file, "
                "or the whole checkpoint again."
            )
        names = files.setdefault(file, [])
        assert names is not None
        names.append(name)
    return files


def _is_file_name(value: str) -> bool:
    return value not in ("", "..") and "\0" not in value and Path(value).name == value


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` is missing: `{file.parent}` is no complete checkpoint.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{file}` must hold an object, got {type(values).__name__}.")
    return values

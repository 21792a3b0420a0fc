"""Routing statistics on disk: the arrays of one file, and the counts that others write as JSON.

Nothing is ever unpickled, and a file is replaced in one step.
"""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

VERSION = 1

_AGAIN = "Collect the statistics again."


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to a compressed npz under exactly this name, whatever it ends with.

    Raises:
        OSError: it cannot be written; what was there is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:  # given a name, numpy would add ".npz" to it
            np.savez_compressed(file, allow_pickle=False, version=np.int64(VERSION), **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_archive(data: bytes) -> bool:
    """Whether a file's bytes are, or were, what `write_arrays` writes."""
    return data.startswith(b"PK")


def read_arrays(path: Path, data: bytes, like: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The arrays in the bytes of a file from `write_arrays`.

    Args:
        path: for messages.
        data: the bytes.
        like: the dtype and the shape of each, as ``"int64 L E"``: equal letters are equal sizes,
            a digit is a size, "str" any text.

    Raises:
        ValueError: the file is damaged, of a newer version, something else, or an array is missing,
            of another dtype or shape, negative, or not finite.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            values: dict[str, NDArray[Any]] = dict(archive)
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"`{path}` is damaged: {error}. {_AGAIN}") from error
    version = values.get("version")
    if version is None or version.dtype != np.int64 or version.shape != () or version < 1:
        raise ValueError(
            f"`{path}` must be a file from `RoutingStatistics.save`, got an archive of "
            f"{sorted(values)}."
        )
    if version > VERSION:
        raise ValueError(
            f"`{path}` must be of version {VERSION} or earlier, got {version}: a newer haq wrote "
            f"it. Update haq, or c{_AGAIN[1:]}"
        )
    sizes: dict[str, int] = {}
    for name, form in like.items():
        if name not in values:
            raise ValueError(f"`{path}` is damaged: `{name}` is missing. {_AGAIN}")
        _check(path, name, values[name], form, sizes)
    return values


def _check(path: Path, name: str, array: NDArray[Any], form: str, sizes: dict[str, int]) -> None:
    dtype, *letters = form.split()
    right = array.ndim == len(letters) and (
        array.dtype.kind == "U" if dtype == "str" else array.dtype == dtype
    )
    if right:
        for letter, size in zip(letters, array.shape, strict=True):
            right &= size == sizes.setdefault(letter, int(letter) if letter.isdigit() else size)
    if not right:
        wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ValueError(
            f"`{path}` is damaged: `{name}` must be {dtype} [{wanted}], got {array.dtype} "
            f"{list(array.shape)}. {_AGAIN}"
        )
    if dtype == "int64" and array.size and array.min() < 0:
        raise ValueError(f"`{path}` is damaged: `{name}` has negative numbers. {_AGAIN}")
    if dtype == "float64" and not np.isfinite(array).all():
        raise ValueError(f"`{path}` is damaged: `{name}` has NaN or infinity. {_AGAIN}")


def json_counts(path: Path, data: bytes) -> list[Any]:
    """The list of layers in the bytes of a JSON file.

    Raises:
        ValueError: there is none.
    """
    expected = (
        f"`{path}` must be a file from `RoutingStatistics.save`, or JSON: a list of all layers "
        "with a list of counts for each, or an object with one as 'expert_popularity'"
    )
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected}; it is neither: {error}.") from error
    counts = values.get("expert_popularity") if isinstance(values, dict) else values
    if not isinstance(counts, list):
        got = f"an object with {list(values)}" if isinstance(values, dict) else repr(values)
        raise ValueError(
            f"{expected}, got {got:.200}. Pass counts from elsewhere to "
            "`RoutingStatistics.from_counts`, for all layers that have experts."
        )
    return counts


def table_of(counts: ArrayLike) -> NDArray[np.int64]:
    """Counts as int64 ``[L, E]``.

    Raises:
        ValueError: they are no whole numbers, no table, none at all, or negative.
    """
    try:
        table = np.asarray(counts)
    except ValueError:  # lists of different lengths
        table = np.empty(0, object)
    if table.ndim != 2 or not table.size or table.dtype.kind not in "iu":
        ragged = table.dtype == object
        got = "something else" if ragged else f"{table.dtype} {list(table.shape)}"
        raise ValueError(
            "`counts` must be a table of whole numbers, one row for each layer and one column for "
            f"each expert, got {got}. Every layer needs a count for every expert."
        )
    whole = table.astype(np.int64)
    if whole.min() < 0:
        layer, expert = np.argwhere(whole < 0)[0]
        raise ValueError(
            f"`counts` must not be negative, got {table[layer, expert]} for expert {expert} of "
            f"layer {layer}. They are numbers of tokens."
        )
    return whole

"""Text that every machine with Python already has: the standard library's own source files."""

import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "held_out"]

# Test suites are not shipped by every distribution; the rest are not part of the library.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
# `encodings` is left out because most of it is generated character tables: very long, almost
# free to predict, and so a flattering share of any perplexity.  The files below are written
# when Python is built or installed and name the machine it was built on.
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_HELD_OUT_PERCENT = 10


def standard_library(split: Split) -> list[str]:
    """Return the text of each file of one split, ordered by the file's relative path.

    A file's split depends on its relative path alone, so a file never changes sides from one
    machine or one Python version to the next; its content may differ between versions.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, not {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in _source_files(root):
        text = _read(root / name) if _split_of(name) == split else None
        if text:
            texts.append(text)
    if not texts:
        raise RuntimeError(
            f"no Python source files of the {split} split under {root}: this Python may be "
            "shipped as bytecode or in a zip file; use one installed with its .py files "
            "(python.org, your distribution's full package, pyenv, conda or uv)"
        )
    return texts


@functools.cache  # Beside the library there may be thousands of files to pass over.
def _source_files(root: Path) -> list[str]:
    """List the relative paths, with forward slashes, of the source files that count."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if not _is_skipped(path))


def _is_skipped(path: Path) -> bool:
    folders = path.parts[:-1]
    # config-3.11-x86_64-linux-gnu and the like: build settings, named after the platform.
    in_build_folder = any(folder.startswith("config-") for folder in folders)
    in_skipped = not _SKIPPED_FOLDERS.isdisjoint(folders)
    return in_build_folder or in_skipped or path.name.startswith(_SKIPPED_PREFIXES)


def _split_of(name: str) -> Split:
    # hash() is salted anew in every process; a digest is the same everywhere.
    digest = hashlib.sha256(name.encode()).digest()
    is_held_out = int.from_bytes(digest[:8], "big") % 100 < _HELD_OUT_PERCENT
    return "held_out" if is_held_out else "train"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None

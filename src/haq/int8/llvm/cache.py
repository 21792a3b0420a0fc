"""Compiled kernels on disk: the next process need not compile them.

They lie where a user's caches do, or where ``HAQ_KERNEL_CACHE`` says; empty, it says nowhere. A
kernel is found by all that it was made from, so that an old one is never taken for another.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

_VARIABLE = "HAQ_KERNEL_CACHE"

# For one version of haq and one processor there are a dozen or two.
_MOST_FILES = 256

_DIGEST = 32


def key_of(*parts: str) -> str:
    """The name of what is made from these.

    Examples:
        >>> key_of("a", "b") == key_of("ab")
        False
    """
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(key: str) -> bytes | None:
    """What was saved by this name; None if nothing was, or if it is not what it was."""
    folder = _folder()
    if folder is None:
        return None
    try:
        stored = (folder / key).read_bytes()
    except OSError:
        return None
    # A part of a kernel would not fail, it would crash.
    digest, content = stored[:_DIGEST], stored[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def save(key: str, content: bytes) -> None:
    """Keep something, if there is a place to write to. Whole: no other process sees a part."""
    folder = _folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as room:
            file = Path(room, key)
            file.write_bytes(hashlib.sha256(content).digest() + content)
            file.replace(folder / key)
        _forget_the_oldest(folder)


def _forget_the_oldest(folder: Path) -> None:
    files = [file for file in folder.iterdir() if file.is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime)[:-_MOST_FILES]:
        file.unlink(missing_ok=True)


def _folder() -> Path | None:
    asked = os.environ.get(_VARIABLE)
    if asked is not None:
        return Path(asked) if asked else None
    caches = os.environ.get("XDG_CACHE_HOME")
    if not caches:
        try:
            caches = str(Path.home() / ".cache")
        except RuntimeError:  # A user without a home, as in containers.
            return None
    return Path(caches, "haq", "kernels")

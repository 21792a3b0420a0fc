"""What is done of a long job, on disk, so that it can go on after any end.

Beside the directory to be made stands another with the same name and ``.incomplete``. In it are the
files that are finished (``model``), the hidden states that enter the next block (``hidden-N``), and
``progress.json``, which is replaced in one step: it alone says what counts.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from haq.checkpoint.files import read_json
from haq.checkpoint.save import check_new, write_json, write_safetensors
from haq.processes import ALONE, Processes

_PROGRESS = "progress.json"


class Progress:
    """The state of one job.

    Args:
        folder: the ``.incomplete`` directory; made if it is not there.
        job: everything that the result depends on, as JSON values.
        processes: that work on it and see the same disk. The first writes what all have in common.

    Attributes:
        job: as given.
        model: where finished files go.
        parts: what was noted of each finished part, in order.

    Raises:
        ValueError: what is there is of another job; the message says in what they differ.
    """

    def __init__(self, folder: Path, job: dict[str, Any], processes: Processes = ALONE) -> None:
        self._folder = folder
        self._processes = processes
        self.job = job
        self.model = folder / "model"
        self.parts: list[dict[str, Any]] = []
        if processes.first:
            self._begin()
        processes.wait()
        self.parts = self._read()

    def _begin(self) -> None:
        if self.model.is_dir():  # Without it, it is finished and only was not removed.
            self.parts = self._read()
        self.model.mkdir(parents=True, exist_ok=True)
        self._write()
        self._clean()

    def _read(self) -> list[dict[str, Any]]:
        """What was noted of this job; nothing if it begins."""
        file = self._folder / _PROGRESS
        if not file.is_file():
            return []
        known = read_json(file)
        parts: list[dict[str, Any]] = known["parts"]
        if parts or not self._processes.first:  # With nothing done there is nothing to lose.
            self._check_same(known["job"], len(parts))
        return parts

    def commit(
        self, part: dict[str, Any], hidden: Sequence[Tensor] | None, number: int
    ) -> list[Tensor]:
        """A part is done: note it, and keep what enters the next one.

        Args:
            part: JSON values.
            hidden: what enters the next part, for each batch of this process; None if a `keeper`
                put it on disk.
            number: of the batches of all processes.

        Returns:
            The hidden states of all batches, as they are on disk.
        """
        folder = self._hidden(len(self.parts) + 1)
        start = self._processes.slice(number).start
        for index, tensor in enumerate(hidden or ()):
            _write_hidden(folder, start + index, tensor)
        self._processes.wait()
        self.parts.append(part)
        if self._processes.first:
            to_disk(folder)
            to_disk(self.model)
            self._write()
            self._clean()
        self._processes.wait()
        return self.hidden()

    def hidden(self) -> list[Tensor]:
        """What enters the next part, batch by batch, in memory only while it is looked at."""
        files = sorted(self._hidden(len(self.parts)).glob("*.safetensors"))
        return [safe_open(file, framework="pt").get_tensor("hidden") for file in files]

    def keeper(self, number: int) -> Callable[[Tensor], Tensor]:
        """Puts what enters the first part on disk, batch after batch; those of others are empty."""
        own, count = self._processes.slice(number), itertools.count()

        def keep(tensor: Tensor) -> Tensor:
            index = next(count)
            if not own.start <= index < own.stop:
                return tensor[:0]
            return _write_hidden(self._hidden(1), index, tensor)

        return keep

    def _hidden(self, done: int) -> Path:
        return self._folder / f"hidden-{done}"

    def _write(self) -> None:
        temporary = self._folder / f"{_PROGRESS}.tmp"
        write_json(temporary, {"job": self.job, "parts": self.parts})
        to_disk(temporary)
        os.replace(temporary, self._folder / _PROGRESS)
        to_disk(self._folder)

    def _clean(self) -> None:
        """Remove what an interrupt left, and make room for what enters the next part."""
        for folder in self._folder.glob("hidden-*"):
            if folder != self._hidden(len(self.parts)):
                shutil.rmtree(folder)
        files = {part["file"] for part in self.parts}
        for file in self.model.iterdir():
            if file.name not in files:
                file.unlink()
        self._hidden(len(self.parts) + 1).mkdir()

    def _check_same(self, job: dict[str, Any], done: int) -> None:
        for key, value in self.job.items():
            before = job.get(key)
            if before != value:
                raise ValueError(
                    f"`{self._folder}` holds {done} parts of a job with another {key}: "
                    f"{_difference(before, value)}. Make the same call to go on with it, or pass "
                    "`resume=False` to start anew."
                )


def _difference(before: object, now: object) -> str:
    """What differs, the first key of it if both are mappings."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
        return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    return f"it was {before!r} and is {now!r}"


def _write_hidden(folder: Path, index: int, tensor: Tensor) -> Tensor:
    file = folder / f"{index:06}.safetensors"
    write_safetensors(file, {"hidden": tensor.cpu()})
    to_disk(file)
    values: Tensor = safe_open(file, framework="pt").get_tensor("hidden")
    return values


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse to work on a folder on which another process works.

    Raises:
        RuntimeError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"Another process works on `{folder}`. Wait for it, or choose another output."
            ) from error
        yield
    finally:
        os.close(descriptor)


def finish(folder: Path, output: Path) -> None:
    """Put the finished directory in its place, and forget how it was made."""
    check_new(output)
    for file in (folder / "model").iterdir():
        to_disk(file)
    to_disk(folder / "model")
    os.replace(folder / "model", output)
    to_disk(output.parent)
    shutil.rmtree(folder)

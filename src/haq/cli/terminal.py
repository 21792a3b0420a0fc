"""What a command shows: results, errors in place of tracebacks, and nothing that nobody asked for.

Nothing heavy is imported here: ``haq --help`` is there at once.
"""

import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from io import TextIOWrapper
from typing import Any

import typer

# What stands between two columns of a table.
_GAP = "  "


def told(command: Callable[..., None]) -> Callable[..., None]:
    """A message and an exit code in the place of a traceback, for what users can do about."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, TextIOWrapper):  # A model writes more than some terminals can.
            sys.stdout.reconfigure(errors="replace")
        try:
            with _quietly():
                command(*args, **kwargs)
        except BrokenPipeError:  # `haq inspect ... | head`: who reads has had enough.
            raise
        # What safetensors raises is of none of the usual kinds, and importing it takes a while.
        except Exception as error:
            if not isinstance(
                error, ImportError | MemoryError | OSError | RuntimeError | TypeError | ValueError
            ) and not type(error).__module__.startswith("safetensors"):
                raise
            _tell(error, f"haq: {error}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _tell(error, *(() if hasattr(error, "__notes__") else ("haq: interrupted.",)))
            raise typer.Exit(130) from error

    return wrapped


def _tell(error: BaseException, *lines: str) -> None:
    for line in (*lines, *getattr(error, "__notes__", ())):
        typer.echo(line, err=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """No bars where nobody looks, and no warnings of libraries; haq's own come through.

    TRANSFORMERS_VERBOSITY and ``python -W`` bring them back.
    """
    from transformers.utils import logging as theirs

    ours, hub = logging.getLogger("haq"), logging.getLogger("huggingface_hub")
    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    levels = ours.level, hub.level
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        theirs.set_verbosity_error()
        hub.setLevel(logging.ERROR)
        ours.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    if not sys.stderr.isatty():
        theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(verbosity)
        ours.setLevel(levels[0])
        hub.setLevel(levels[1])
        if bars:
            theirs.enable_progress_bar()


def result(text: str, values: Any, as_json: bool) -> None:
    """Print what a command found: for people, or all of it on one line for programs.

    Args:
        text: for people.
        values: what `json.dumps` takes. NaN and infinity, which JSON has not, become null.
        as_json: for whom.

    Examples:
        >>> result("", {"error": float("nan")}, as_json=True)
        {"error": null}
    """
    typer.echo(json.dumps(_finite(values), allow_nan=False) if as_json else text)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def on_terminal() -> bool:
    """Whether a person reads the results."""
    return sys.stdout.isatty()


def width() -> int | None:
    """How many columns there are; None where lines may be as long as they like."""
    return shutil.get_terminal_size().columns if on_terminal() else None


def table(rows: Sequence[Sequence[str]], left: Sequence[str], spare: Sequence[str]) -> str:
    """Columns as wide as they need to be; on a terminal, no more of them than fit.

    Args:
        rows: the names of the columns, and the rows.
        left: columns that are words: to the left. The others are numbers, to the right.
        spare: columns that may be left out, those that go first in front. One that has the same in
            every row, or nothing, goes before all of them.

    Returns:
        The lines. The last one says what was left out, if anything was.
    """
    names, limit = list(rows[0]), width()
    gone: list[str] = []
    same = [n for n in spare if len({row[names.index(n)] for row in rows[1:]}) == 1]
    order = [*same, *(name for name in spare if name not in same)]
    lines = _lines(rows, names, left)
    while limit is not None and max(map(len, lines)) > limit and order:
        gone.append(order.pop(0))
        lines = _lines(rows, [name for name in names if name not in gone], left)
    lines.insert(1, "-" * max(map(len, lines)))
    if gone:
        lines += ["", f"Too wide for this terminal, and left out: {', '.join(gone)}."]
    return "\n".join(lines)


def _lines(rows: Sequence[Sequence[str]], shown: Sequence[str], left: Sequence[str]) -> list[str]:
    columns = [[row[list(rows[0]).index(name)] for row in rows] for name in shown]
    aligned = []
    for name, cells in zip(shown, columns, strict=True):
        longest = max(map(len, cells))
        aligned.append([c.ljust(longest) if name in left else c.rjust(longest) for c in cells])
    return [_GAP.join(cells).rstrip() for cells in zip(*aligned, strict=True)]

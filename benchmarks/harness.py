"""One way to time, in turn, and to write down what was found.

A shared machine changes from one minute to the next, its memory by a factor of two. So everything
that will be compared is timed in turn, round by round, and ratios are taken within a round. Rounds
in which other processes worked are repeated: with every core in use by a product, one more process
does not slow it down a little, it makes all threads wait. The numbers are the median over the
rounds and the range of the middle half of them. `roofline` has the speed of the memory.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

# Each sample lasts about this long, so that the kernel's clock ticks tell who worked meanwhile.
SECONDS_PER_SAMPLE = 0.03

# A round is repeated if other processes took a larger share of the CPU than this, but there are at
# most this many times the rounds asked for.
MAX_SHARE_OF_OTHERS = 0.03
MAX_REPEATS = 3

# However little time there is, so many rounds are taken.
FEWEST_ROUNDS = 5

# Threads of OpenMP spin for a few milliseconds after their work, those of one library on the cores
# that the next one to be timed wants.
SECONDS_OF_REST = 0.005

DISTURBED = "Other processes were at work"

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def middle_half(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high

    def times_faster_than(self, other: "Timing") -> float:
        """The median, over the rounds, of how many times faster."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def to_dict(self) -> dict[str, float]:
        low, high = self.middle_half
        return {"median_ms": self.median * 1e3, "low_ms": low * 1e3, "high_ms": high * 1e3}


def time_in_turn(
    runs: Mapping[str, Run], rounds: int = 21, most_seconds: float = math.inf
) -> dict[str, Timing]:
    """Time every run in every round, in the order given.

    Args:
        runs: what to call, by name. Each call is one unit of the result.
        rounds: how often; at least 20 for a median that means something.
        most_seconds: begin no further round after so many seconds, but for the first few.
    """
    start = time.perf_counter()
    calls = {name: _calls_per_sample(run) for name, run in runs.items()}
    measured: list[tuple[float, dict[str, float]]] = []
    undisturbed = 0
    while undisturbed < rounds and len(measured) < MAX_REPEATS * rounds:
        if len(measured) >= FEWEST_ROUNDS and time.perf_counter() - start > most_seconds:
            rounds = min(rounds, len(measured))
            break
        others = OtherWork()
        seconds = {name: seconds_per_call(run, calls[name]) for name, run in runs.items()}
        measured.append((others.share(), seconds))
        undisturbed += measured[-1][0] <= MAX_SHARE_OF_OTHERS
    if undisturbed < rounds:
        print(f"{DISTURBED} in all but {undisturbed} of {len(measured)} rounds!")
    best = sorted(measured, key=lambda item: item[0])[:rounds]
    return {name: Timing(tuple(seconds[name] for _, seconds in best)) for name in runs}


class OtherWork:
    """The CPU time that other processes take, from now on; on Linux, elsewhere always none."""

    def __init__(self) -> None:
        self._start = self._ticks()

    def share(self) -> float:
        """Share of all cores since the start, what the hypervisor took away included."""
        total, others = (now - then for now, then in zip(self._ticks(), self._start, strict=True))
        return others / total if total else 0.0

    @staticmethod
    def _ticks() -> tuple[float, float]:
        try:
            ticks = [int(field) for field in Path("/proc/stat").read_text().split(None, 9)[1:9]]
        except OSError:
            return 0.0, 0.0
        user, nice, system, _idle, _waiting, *rest = ticks
        own = os.times()
        own_ticks = (own.user + own.system) * os.sysconf("SC_CLK_TCK")
        return sum(ticks), user + nice + system + sum(rest) - own_ticks


def _calls_per_sample(run: Run) -> int:
    seconds = seconds_per_call(run)  # The first call allocates.
    if seconds < 1:
        seconds = min(seconds_per_call(run) for _ in range(3 if seconds < 0.1 else 1))
    return max(1, round(SECONDS_PER_SAMPLE / seconds))


def seconds_per_call(run: Run, calls: int = 1) -> float:
    """One sample, after a rest."""
    time.sleep(SECONDS_OF_REST)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def rotating(runs: Sequence[Run]) -> Run:
    """Call the runs one after the other, each time the next, so that no cache serves them all."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def arguments(
    description: str, values: Mapping[str, str] | None = None, **flags: str
) -> argparse.Namespace:
    """What every benchmark understands, and options of its own with their help.

    Args:
        description: the script's docstring.
        values: options that take a value.
        flags: options that do not.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    for name, text in (values or {}).items():
        parser.add_argument(f"--{name}", help=text)
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--threads", type=int, help="CPU threads; torch decides if not given")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def card() -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or folders."""
    return {
        "machine": {
            "cpu": _cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "vnni": torch.cpu._is_vnni_supported(),
            "bfloat16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def print_card(description: str, facts: Mapping[str, Any]) -> None:
    print(description.strip().splitlines()[0])
    print()
    for name in ("machine", "versions"):
        print(f"{name:9}", ", ".join(f"{key} {value}" for key, value in facts[name].items()))
    print(f"{'commit':9} {facts['commit']}")
    print()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in (head, *rows):
        numbers = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *numbers]))
    print()


def milliseconds(timing: Mapping[str, Any]) -> str:
    """Median and middle half of ``Timing.to_dict()``: ``2.41 (2.38-2.50)``."""
    digits = 2 if timing["median_ms"] >= 1 else 3
    middle, low, high = (f"{timing[key]:.{digits}f}" for key in ("median_ms", "low_ms", "high_ms"))
    return f"{middle} ({low}-{high})"


def first_line(error: BaseException) -> str:
    """What a table has room for: ``ImportError: No module named 'torchao'``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def target(name: str, value: float, at_least: float) -> dict[str, Any]:
    """Say whether a target is met, and by how much it is not."""
    verdict = "met" if value >= at_least else f"MISSED by {100 * (1 - value / at_least):.0f} %"
    print(f"{name}: {value:.2f}, target {at_least:g}: {verdict}")
    return {"name": name, "value": value, "target": at_least, "met": value >= at_least}


def write(name: str, facts: Mapping[str, Any], folder: Path = RESULTS, **content: Any) -> None:
    """Write ``NAME.json`` into the folder."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, **facts, **content}, indent=2)
    (folder / f"{name}.json").write_text(text + "\n")


def write_speed(name: str, facts: Mapping[str, Any], **content: Any) -> None:
    """Write ``NAME.json``; what a CPU with other instructions does is another matter.

    Without VNNI int8 is slower, without those for bfloat16 its baseline, and where matrices are
    multiplied (AMX) both have another kind: each has a folder.
    """
    machine, folder = facts["machine"], RESULTS
    if not machine["vnni"]:
        folder = RESULTS / "without_vnni"
    elif not machine["bfloat16"]:
        folder = RESULTS / "without_bfloat16"
    elif machine["amx"]:
        folder = RESULTS / "with_amx"
    write(name, facts, folder, **content)

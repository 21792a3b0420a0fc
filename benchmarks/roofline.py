"""How fast the memory can be read here; rows and tables that put a share of it beside times.

A product of a few tokens waits for its weight. So every row may say how many bytes a run has to
read, and what share that is of what the memory gave in the same round: 1 cannot be surpassed.
"""

import contextlib
import itertools
import mmap
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Run, Timing
from torch import Tensor

# Runs whose names begin so are what the others are compared with, the fastest of them.
BASELINE = "bf16"

# Of the last cache of processors that do not say.
_USUAL_CACHE = 32 * 2**20

# Buffers and weights that are read in turn take so many times the cache, and so many bytes: what of
# them is still there when their turn comes again is then little, whatever the cache chose to keep.
_TIMES_THE_CACHE = 4
_LARGE = 256 * 2**20


def cache_bytes() -> int:
    """Size of all last caches of this machine together."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        shared_by = (index / "shared_cpu_list").read_text()
        sizes[shared_by] = int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return sum(sizes.values()) or _USUAL_CACHE


BEYOND_CACHE = max(_LARGE, _TIMES_THE_CACHE * cache_bytes())


def rotating(runs: Sequence[Run]) -> Run:
    """Call the runs one after the other, each time the next, so that no cache serves them all."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def copies_beyond_cache(bytes_each: int) -> int:
    """How many weights of that size to rotate."""
    return max(2, -(-BEYOND_CACHE // bytes_each))


class MemoryRead:
    """Reads a buffer that no cache holds, in more than one way: the best of a round is the bound.

    The ways are sums, which compute so little that two threads add up 200 GB/s of what is in the
    cache; a maximum would end at 60. The buffer is on huge pages where the system has them, which
    read a tenth faster than others: weights on ordinary ones have a share below 1.
    """

    def __init__(self) -> None:
        self._floats = _buffer(BEYOND_CACHE)
        integers = self._floats.view(torch.int64)
        self.runs: dict[str, Run] = {"read floats": self._floats.sum, "read integers": integers.sum}

    def bytes_per_second(self, timings: Mapping[str, Timing]) -> list[float]:
        """In each round in which the `runs` were among those that were timed in turn."""
        rounds = zip(*(timings[name].seconds for name in self.runs), strict=True)
        return [self._floats.nbytes / min(seconds) for seconds in rounds]


def _buffer(size: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.ones(size // 4)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A kernel without them.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).fill_(1)


def row(
    labels: Mapping[str, Any],
    timings: Mapping[str, Timing],
    bytes_read: Mapping[str, int] | None = None,
    read: MemoryRead | Sequence[float] = (),
    failures: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What every benchmark writes of runs that were timed in turn.

    Args:
        labels: what was run.
        timings: by name of the run. Those that begin with "bf16" are what the others are compared
            with, the fastest of them.
        bytes_read: what a run has to read, for those that wait for the memory.
        read: whose runs are among the timings; or bytes per second of the memory in each round.
        failures: why a run is not among the timings, by name.
    """
    if isinstance(read, MemoryRead):
        bandwidth = read.bytes_per_second(timings)
        timings = {name: timing for name, timing in timings.items() if name not in read.runs}
    else:
        bandwidth = read
    baselines = [name for name in timings if name.startswith(BASELINE)]
    fastest = min(baselines, key=lambda name: timings[name].median, default=None)
    runs: dict[str, Any] = {}
    for name, timing in timings.items():
        runs[name] = timing.to_dict()
        if fastest is not None and name not in baselines:
            runs[name]["times_bf16"] = timing.times_faster_than(timings[fastest])
        if bytes_read and name in bytes_read:
            runs[name] |= _share(timing, bytes_read[name], bandwidth)
    top = {"roofline_gb_per_s": statistics.median(bandwidth) / 1e9} if bandwidth else {}
    failed = {"failed": dict(failures)} if failures else {}
    return {**labels, **top, "runs": runs, **failed}


def _share(timing: Timing, size: int, bandwidth: Sequence[float]) -> dict[str, float]:
    rates = [size / seconds for seconds in timing.seconds]
    shares = [rate / top for rate, top in zip(rates, bandwidth, strict=True)]
    return {
        "bytes_read": size,
        "gb_per_s": statistics.median(rates) / 1e9,
        "share_of_roofline": statistics.median(shares),
    }


def print_rows(rows: Sequence[Mapping[str, Any]], more: Mapping[str, str] | None = None) -> None:
    """One line for each run of each row; then what failed.

    Args:
        rows: of `row`.
        more: columns beside the usual ones: what a run calls them by their heads, in milliseconds.
    """
    more = more or {}
    labels = [key for key in rows[0] if key not in ("roofline_gb_per_s", "runs", "failed")]
    head = [*labels, "run", "ms", *more, "times bf16", "GB/s", "memory, GB/s", "share"]
    cells = []
    for each in rows:
        top = {"top": each["roofline_gb_per_s"]} if "roofline_gb_per_s" in each else {}
        for name, run in each["runs"].items():
            numbers = {**run, **(top if "share_of_roofline" in run else {})}
            cells.append(
                [
                    *(str(each[label]) for label in labels),
                    name,
                    harness.milliseconds(run),
                    *(_cell(numbers, key, 2) for key in more.values()),
                    _cell(numbers, "times_bf16", 2),
                    _cell(numbers, "gb_per_s", 1),
                    _cell(numbers, "top", 1),
                    _cell(numbers, "share_of_roofline", 2),
                ]
            )
    harness.print_table(head, cells)
    for each in rows:
        for name, reason in each.get("failed", {}).items():
            print(", ".join(str(each[label]) for label in labels), f"- {name}: {reason}")


def _cell(numbers: Mapping[str, float], key: str, digits: int) -> str:
    return f"{numbers[key]:.{digits}f}" if key in numbers else ""

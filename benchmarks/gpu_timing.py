"""How long work takes on a CUDA device, one call after the other and all together in a CUDA graph.

In a graph no launch is waited for, so it shows what the device needs; as called from Python it
shows what a program without graphs gets. Both are timed in turn with everything that they will be
compared with, and with a copy on the device, whose bandwidth is the roofline.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import harness
import roofline
import torch

ROUNDS = 9
CALLS_PER_SAMPLE = 20

# More than twice the cache of today's largest GPUs.
CACHE_BYTES = 256 * 2**20

Run = Callable[[], object]


def seconds(run: Run, calls: int = CALLS_PER_SAMPLE) -> float:
    """Per call, on the device's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls / 1e3


def in_one_graph(runs: Sequence[Run]) -> Run:
    """All runs as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in (*runs, *runs):  # The first calls measure, compile, allocate and learn.
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def measure(
    labels: dict[str, Any],
    candidates: Mapping[str, Sequence[Run]],
    bytes_read: Mapping[str, int] | None = None,
    reset: Run = lambda: None,
) -> dict[str, Any]:
    """Time calls in turn, one by one as they are and all together in a CUDA graph.

    Args:
        labels: what is computed.
        candidates: by name, the same call for each of several weights, each with an input of its
            own: what layers make of a tensor that they share is made once. Those whose names begin
            with "bf16" are baselines, of which the fastest counts.
        bytes_read: what a call reads.
        reset: called before each sample.

    Returns:
        A row of the calls in a graph; how long they take from Python is beside it.
    """
    source = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    copying = partial(torch.empty_like(source).copy_, source)
    eager = {name: roofline.rotating(runs) for name, runs in candidates.items()}
    graphs = {}
    for name, runs in candidates.items():
        reset()
        graphs[name] = in_one_graph(runs)

    def sample(run: Run) -> float:
        reset()
        return seconds(run)

    for run in (copying, *graphs.values(), *eager.values()):
        sample(run)
    rounds = [
        (
            sample(copying),
            {name: sample(run) for name, run in eager.items()},
            {name: sample(run) / len(candidates[name]) for name, run in graphs.items()},
        )
        for _ in range(ROUNDS)
    ]
    timings = {
        name: harness.Timing(tuple(graph[name] for _, _, graph in rounds)) for name in candidates
    }
    # A copy reads and writes; a weight is only read.
    bandwidth = [2 * CACHE_BYTES / copying_takes for copying_takes, _, _ in rounds]
    row = roofline.row(labels, timings, bytes_read, bandwidth if bytes_read else ())
    for name, run in row["runs"].items():
        run["eager_ms"] = statistics.median(eager[name] for _, eager, _ in rounds) * 1e3
    return row


class TimeLimit:
    """Work that is begun while there is time, and named where there is none left.

    Args:
        limit: in seconds, from now on.

    Attributes:
        skipped: what was not begun.
    """

    def __init__(self, limit: float) -> None:
        self._end = time.perf_counter() + limit
        self.skipped: list[str] = []

    def run(self, name: str, work: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of some work; none if it is too late to begin it."""
        if time.perf_counter() > self._end:
            print(f"skipped, there is no time left: {name}", flush=True)
            self.skipped.append(name)
            return []
        start = time.perf_counter()
        rows = work()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return rows

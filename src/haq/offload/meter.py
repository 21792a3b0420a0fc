"""What the lanes did and when: counted for each layer, timed on both sides by one clock."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

Lane = Literal["gpu", "cpu"]
Clock = Callable[[], float]

# Spans that are kept for the picture of the lanes, and calls whose GPU times are still events.
_SPANS = 8192
_PENDING = 512


@dataclass(frozen=True)
class Span:
    """One lane at work on one layer, in seconds since the start or the last reset."""

    layer: int
    lane: Lane
    start: float
    end: float


@dataclass
class LayerCounts:
    """Sums over the calls of one layer.

    Attributes:
        calls: of the layer.
        tokens: that went through it.
        hits: choices of an expert that was on the GPU: resident, or in a spare slot.
        copied: choices of an expert that was brought to the GPU for it.
        misses: choices of an expert that ran on the CPU.
        round_trips: calls that needed the CPU.
        gpu_seconds: from the first product on the GPU to the last.
        cpu_seconds: of the experts on the CPU.
        overlap_seconds: in which both were at work.
        shorter_seconds: of whichever lane was shorter, call by call: what could overlap.
    """

    calls: int = 0
    tokens: int = 0
    hits: int = 0
    copied: int = 0
    misses: int = 0
    round_trips: int = 0
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    overlap_seconds: float = 0.0
    shorter_seconds: float = 0.0


@dataclass
class Call:
    """One call of one layer, on its way.

    Attributes:
        layer: which.
        tokens: in it.
        hits: choices by where the expert ran, as in `LayerCounts`.
        copied: likewise.
        misses: likewise.
        gpu: when that lane started and ended; None if it had nothing to do.
        cpu: likewise.
    """

    layer: int
    tokens: int
    hits: int = 0
    copied: int = 0
    misses: int = 0
    gpu: "tuple[Mark, Mark] | None" = None
    cpu: tuple[float, float] | None = None


@dataclass(frozen=True)
class Mark:
    """A moment of the GPU lane: seconds, or an event that the GPU has not come to yet."""

    seconds: float
    event: torch.cuda.Event | None = None


@dataclass
class Meter:
    """Counts and times of all layers.

    Args:
        layers: how many.
        device: of the GPU lane. Times of a GPU are taken by its own events.
        clock: of the CPU, in seconds.
    """

    layers: int
    device: torch.device
    clock: Clock = time.perf_counter
    counts: list[LayerCounts] = field(default_factory=list)
    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=_SPANS))

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything; time starts anew."""
        self.counts = [LayerCounts() for _ in range(self.layers)]
        self.spans.clear()
        self._pending: list[Call] = []
        self._last: tuple[int, float] | None = None
        self.pace = 0.0
        self._base = self._event()
        if self._base is not None:
            self._base.synchronize()
        self._start = self.clock()

    def begin(self, layer: int) -> None:
        """A layer begins: `pace` follows the seconds from one to the next, attention included."""
        now = self.clock()
        if self._last is not None and self._last[0] == layer - 1:
            seconds = now - self._last[1]
            self.pace = seconds if self.pace == 0 else 0.9 * self.pace + 0.1 * seconds
        self._last = layer, now

    def mark(self) -> Mark:
        """Now, on the GPU's side."""
        event = self._event()
        return Mark(0.0 if event is not None else self.clock(), event)

    def add(self, call: Call) -> None:
        """A call that has ended, as far as the CPU is concerned."""
        self._pending.append(call)
        if self._base is None or len(self._pending) >= _PENDING:
            self.settle()

    def settle(self) -> None:
        """Turn events into seconds."""
        if self._base is not None and self._pending:
            torch.cuda.synchronize(self.device)
        for call in self._pending:
            self._count(call)
        self._pending = []

    def _count(self, call: Call) -> None:
        counts = self.counts[call.layer]
        counts.calls += 1
        counts.tokens += call.tokens
        counts.hits += call.hits
        counts.copied += call.copied
        counts.misses += call.misses
        counts.round_trips += call.cpu is not None
        spans = []
        if call.gpu is not None:
            start, end = (self._seconds(mark) for mark in call.gpu)
            spans.append(Span(call.layer, "gpu", start, end))
            counts.gpu_seconds += end - start
        if call.cpu is not None:
            start, end = (seconds - self._start for seconds in call.cpu)
            spans.append(Span(call.layer, "cpu", start, end))
            counts.cpu_seconds += end - start
        if len(spans) == 2:
            gpu, cpu = spans
            counts.overlap_seconds += max(0.0, min(gpu.end, cpu.end) - max(gpu.start, cpu.start))
            counts.shorter_seconds += min(gpu.end - gpu.start, cpu.end - cpu.start)
        self.spans.extend(spans)

    def _seconds(self, mark: Mark) -> float:
        if mark.event is None or self._base is None:
            return mark.seconds - self._start
        return float(self._base.elapsed_time(mark.event)) / 1e3

    def _event(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

"""What an offloader did, for people and for machines."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from haq.offload.budget import format_bytes
from haq.offload.meter import LayerCounts, Span


@dataclass(frozen=True)
class OffloadReport:
    """Counts and seconds since the start, or since `ExpertOffloader.reset`.

    Attributes:
        layers: names of the experts modules.
        resident: how many experts of each are on the GPU.
        counts: what each layer did; see `haq.offload.meter.LayerCounts`.
        copied_bytes: brought into spare slots.
        prefetches_used: experts that were brought before they were asked for, and then were.
        prefetches_wasted: those that made room before anybody asked.
        peak_bytes: most memory of the GPU that torch had allocated; 0 on a CPU.
        promised_bytes: what it was to stay under; None without a budget.
        notes: what did not go as configured.
        spans: both lanes over time, the last thousands of them: `haq.plotting.plot_lanes`.
    """

    layers: tuple[str, ...]
    resident: tuple[int, ...]
    counts: tuple[LayerCounts, ...]
    copied_bytes: int
    prefetches_used: int
    prefetches_wasted: int
    peak_bytes: int
    promised_bytes: int | None
    notes: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def hit_rate(self) -> float:
        """Share of all choices whose expert was on the GPU; 1 if there were none."""
        return _share(sum(c.hits for c in self.counts), sum(map(_choices, self.counts)))

    @property
    def overlap(self) -> float:
        """Of the time in which both lanes could have worked, the share in which they did."""
        shorter = sum(c.shorter_seconds for c in self.counts)
        return _share(sum(c.overlap_seconds for c in self.counts), shorter, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`; without the spans."""
        values = asdict(self)
        del values["spans"]
        return values | {"hit_rate": self.hit_rate, "overlap": self.overlap}

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", *_table(self._rows())])

    def _summary(self) -> Iterator[str]:
        seconds = [
            sum(getattr(c, f"{lane}_seconds") for c in self.counts) for lane in ("gpu", "cpu")
        ]
        yield (
            f"{100 * self.hit_rate:.1f} % of choices on the GPU; GPU lane {seconds[0]:.2f} s, CPU "
            f"lane {seconds[1]:.2f} s, {100 * self.overlap:.0f} % of the shorter one overlapped"
        )
        yield (
            f"{format_bytes(self.copied_bytes)} copied; prefetches: {self.prefetches_used} used, "
            f"{self.prefetches_wasted} wasted"
        )
        if self.peak_bytes:
            promised = self.promised_bytes
            of = "" if promised is None else f" of {format_bytes(promised)}"
            yield f"peak memory {format_bytes(self.peak_bytes)}{of}"
        yield from (f"note: {note}" for note in self.notes)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield ("layer", "resident", "tokens", "hit %", "copied", "on CPU", "GPU ms", "CPU ms")
        for name, resident, c in zip(self.layers, self.resident, self.counts, strict=True):
            calls = max(c.calls, 1)
            yield (
                name,
                str(resident),
                str(c.tokens),
                f"{100 * _share(c.hits, _choices(c)):.1f}",
                str(c.copied),
                str(c.misses),
                f"{1e3 * c.gpu_seconds / calls:.3f}",
                f"{1e3 * c.cpu_seconds / calls:.3f}",
            )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # In IPython on a terminal, in the place of all fields.

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        cells = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
        )
        summary = "<br>".join(self._summary())
        return f"<p>{summary}</p><table><tr>{cells}</tr>{body}</table>"


def _choices(counts: LayerCounts) -> int:
    return counts.hits + counts.copied + counts.misses


def _share(part: float, whole: float, of_nothing: float = 1.0) -> float:
    return part / whole if whole else of_nothing


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines: Sequence[tuple[str, ...]] = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]

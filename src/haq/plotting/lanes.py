"""Both lanes of an offloader over time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haq.offload.meter import Span
from haq.offload.report import OffloadReport
from haq.plotting.figures import (
    LABEL_POINTS,
    TICK_POINTS,
    TITLE_POINTS,
    WIDTH,
    check_kind,
    empty_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each lane from the top: its fill for layers of even and of odd number, its edges, its hatching.
_LANES = {
    "gpu": (("#6f9fc8", "#bcd4e8"), "#1d3f5e", ""),
    "cpu": (("#f2b26b", "#fbe2c4"), "#a85f14", "///"),
}
_BAR_HEIGHT = 0.8

# Bars that are narrower than this on average, in points, would be hidden by edges and hatching.
_NARROW = 2.5


def plot_lanes(report: OffloadReport, *, last: int | None = None) -> "Figure":
    """When each lane worked on which layer.

    Neighbouring layers have different shades, and bars that are wide enough the layer's number.

    Args:
        report: of an offloader that has generated something. It keeps the last few thousand spans.
        last: so many spans, the latest ones; None for all there are. A token has one or two in
            every layer.

    Returns:
        A row for each lane, over milliseconds since the first span that is shown. The overlap in
        the title is that of the whole report.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is something else.
        ValueError: nothing was measured, or ``last`` is not positive.

    Examples:
        >>> figure = plot_lanes(offloader.report(), last=128)  # doctest: +SKIP
        >>> figure.savefig("lanes.png")  # doctest: +SKIP
    """
    check_kind("report", report, OffloadReport, "offloader.report()")
    if last is not None and last < 1:
        raise ValueError(
            f"`last` must be a positive number of spans, or None for all, got {last!r}."
        )
    if not report.spans:
        raise ValueError(
            "`report` must have spans to draw, got none. Ask for a report after the model has "
            "generated something."
        )
    spans = report.spans if last is None else report.spans[-last:]
    figure = empty_figure(WIDTH, 2.2)
    axes = figure.subplots()
    numbered = _draw_bars(axes, spans)
    overlap = f"{100 * report.overlap:.0f} % of the shorter lane overlapped"
    hits = f"{100 * report.hit_rate:.0f} % of choices on the GPU"
    axes.set_title(f"{overlap}, {hits}", fontsize=TITLE_POINTS)
    unit = "ms since the first span shown" + ("; numbers are layers" if numbered else "")
    axes.set_xlabel(unit, fontsize=LABEL_POINTS)
    axes.set_yticks(range(len(_LANES)), [lane.upper() for lane in _LANES])
    axes.set_ylim(len(_LANES) - 0.5, -0.5)  # the first lane at the top
    axes.tick_params(labelsize=LABEL_POINTS)
    return figure


def _draw_bars(axes: "Axes", spans: Sequence[Span]) -> bool:
    """All bars, and layers' numbers in those that are wide enough; whether there are any."""
    first = min(span.start for span in spans)
    total = max(span.end for span in spans) - first
    axes.set_xlim(0, max(1e3 * total, 1e-3))
    points = 72 * 0.88 * WIDTH / max(total, 1e-6)  # per second: axes take most of the figure
    wide = points * sum(span.end - span.start for span in spans) / len(spans) > _NARROW
    numbered = False
    for row, (lane, (fills, edge, hatch)) in enumerate(_LANES.items()):
        for odd, fill in enumerate(fills):
            bars = [s for s in spans if s.lane == lane and s.layer % 2 == odd]
            axes.broken_barh(
                [(1e3 * (s.start - first), 1e3 * (s.end - s.start)) for s in bars],
                (row - _BAR_HEIGHT / 2, _BAR_HEIGHT),
                facecolor=fill if wide else fills[0],
                edgecolor=edge,
                linewidth=0.6 if wide else 0.0,
                hatch=hatch if wide else "",
            )
        for span in spans:
            text = str(span.layer)
            if span.lane == lane and points * (span.end - span.start) > TICK_POINTS * len(text):
                middle = 1e3 * ((span.start + span.end) / 2 - first)
                box = {"facecolor": fills[1], "linewidth": 0, "pad": 1}
                axes.text(
                    middle, row, text, fontsize=TICK_POINTS, ha="center", va="center", bbox=box
                )
                numbered = True
    return numbered

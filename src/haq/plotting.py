"""Pictures of an offloader's two lanes, and of how a mixture of experts routes.

They need matplotlib, which haq does not install. Every function returns a
`matplotlib.figure.Figure` and shows nothing: ``figure.savefig("lanes.png")`` writes it, and a
notebook shows it after ``%matplotlib inline``. They can be told apart without colours, too.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from haq.offload.meter import Span
from haq.offload.report import OffloadReport
from haq.offload.routing import RoutingStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Inches, and points: 72 to the inch.
_WIDTH = 10.0
_TITLE_POINTS = 10
_LABEL_POINTS = 8
_TICK_POINTS = 7

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
        ValueError: nothing was measured, or ``last`` is not positive.

    Examples:
        >>> figure = plot_lanes(offloader.report(), last=128)  # doctest: +SKIP
        >>> figure.savefig("lanes.png")  # doctest: +SKIP
    """
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
    figure = _figure(_WIDTH, 2.2)
    axes = figure.subplots()
    numbered = _draw_bars(axes, spans)
    overlap = f"{100 * report.overlap:.0f} % of the shorter lane overlapped"
    hits = f"{100 * report.hit_rate:.0f} % of choices on the GPU"
    axes.set_title(f"{overlap}, {hits}", fontsize=_TITLE_POINTS)
    unit = "ms since the first span shown" + ("; numbers are layers" if numbered else "")
    axes.set_xlabel(unit, fontsize=_LABEL_POINTS)
    axes.set_yticks(range(len(_LANES)), [lane.upper() for lane in _LANES])
    axes.set_ylim(len(_LANES) - 0.5, -0.5)  # the first lane at the top
    axes.tick_params(labelsize=_LABEL_POINTS)
    return figure


def plot_routing(statistics: RoutingStatistics) -> "Figure":
    """How often each expert is chosen.

    Args:
        statistics: of the routing.

    Returns:
        A map of layers and experts. Its unit: 1 for an expert that is chosen as often as if all
        experts of its layer were chosen equally often; that is marked on the scale.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> statistics = RoutingStatistics.load("routing.npz")  # doctest: +SKIP
        >>> plot_routing(statistics).savefig("routing.png")  # doctest: +SKIP
    """
    even = statistics.experts_per_token / statistics.num_experts
    return _heat_map(
        statistics.popularity / even,
        unit="times as often as on average",
        rows=("layer", _short_names(statistics.layers)),
        columns=("expert", _numbers(statistics)),
        title=f"How often experts are chosen, of {statistics.tokens:,} tokens",
    )


def plot_transitions(statistics: RoutingStatistics, layer: int, ahead: int = 1) -> "Figure":
    """Which experts of a later layer are chosen after which ones of an earlier one.

    Args:
        statistics: of the routing, with transitions.
        layer: the earlier one, by its number among the layers with experts.
        ahead: how many of them the later one is behind it: 1, 2 or 3.

    Returns:
        A map of the experts of both layers. Its unit: 1 for an expert that is chosen as often
        after that one as it is on the whole; that is marked on the scale. What little was seen of
        is drawn towards 1, as in `RoutingStatistics.scores`. Experts of the later layer that were
        never chosen stay white.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no such layers, or no transitions between them are known.

    Examples:
        >>> figure = plot_transitions(statistics, layer=0)  # doctest: +SKIP
        >>> figure.savefig("transitions.png")  # doctest: +SKIP
    """
    experts = range(statistics.num_experts)
    # Of one expert they sum to 1, and the popularity to that of a token's experts.
    scores = np.array([statistics.scores(layer, [expert], ahead) for expert in experts])
    if not statistics.transitions[ahead - 1, layer].any():
        raise ValueError(
            f"`statistics` must have transitions from layer {layer} to {layer + ahead}, got none. "
            "Popularity counts have none; `RoutingStatistics.collect` counts them."
        )
    popularity = statistics.popularity[layer + ahead]
    known = np.where(popularity > 0, popularity, np.nan)
    names, numbers = _short_names(statistics.layers), _numbers(statistics)
    earlier, later = f"layer {names[layer]}", f"layer {names[layer + ahead]}"
    return _heat_map(
        scores * statistics.experts_per_token / known,
        unit="times as often as on the whole",
        rows=(f"expert of {earlier}", numbers),
        columns=(f"expert of {later}", numbers),
        title=f"What {later} chooses after {earlier}",
    )


# --- Parts ----------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, of which pyplot knows nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`haq.plotting` needs matplotlib, which is not installed. Run `pip install matplotlib`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_bars(axes: "Axes", spans: Sequence[Span]) -> bool:
    """All bars, and layers' numbers in those that are wide enough; whether there are any."""
    first = min(span.start for span in spans)
    total = max(span.end for span in spans) - first
    axes.set_xlim(0, max(1e3 * total, 1e-3))
    points = 72 * 0.88 * _WIDTH / max(total, 1e-6)  # per second: axes take most of the figure
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
            if span.lane == lane and points * (span.end - span.start) > _TICK_POINTS * len(text):
                middle = 1e3 * ((span.start + span.end) / 2 - first)
                box = {"facecolor": fills[1], "linewidth": 0, "pad": 1}
                axes.text(
                    middle, row, text, fontsize=_TICK_POINTS, ha="center", va="center", bbox=box
                )
                numbered = True
    return numbered


def _heat_map(
    values: NDArray[np.float64],
    *,
    unit: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    title: str,
) -> "Figure":
    """Values ``[R, C]`` from 0 up, with 1 marked on the scale; NaN stays white.

    Args:
        values: what is drawn.
        unit: of the values.
        rows: what they are, and the name of each.
        columns: likewise.
        title: of the figure.
    """
    count, across = values.shape
    width = min(max(0.3 * across, 3.0), 8.0)
    # Few rows are higher than many.
    height = min(max(min(0.3 * count, 4.0), 0.16 * count, 1.5), 8.0)
    figure = _figure(width + 1.8, height + 0.9)
    axes = figure.subplots()
    largest = max(float(np.nanmax(values)), 1.0)
    # From dark to light without a turn, so that it survives a printer without colours.
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(unit, fontsize=_LABEL_POINTS)
    bar.ax.tick_params(labelsize=_TICK_POINTS)
    bar.ax.axhline(1, color="white", linewidth=3)
    bar.ax.axhline(1, color="black", linewidth=1)
    longest = max(map(len, columns[1]))
    _label(axes.yaxis, *rows, room=72 * height / count, needed=1.5 * _TICK_POINTS)
    _label(axes.xaxis, *columns, room=72 * width / across, needed=(longest + 1) * _TICK_POINTS)
    axes.set_title(title, fontsize=_TITLE_POINTS)
    return figure


def _label(axis: "Axis", title: str, names: Sequence[str], *, room: float, needed: float) -> None:
    """Names along an axis; with less room for each than is needed, every second, fifth, tenth."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    step = next(step for step in steps if step * room >= needed)
    shown = range(0, len(names), step)
    axis.set_ticks(list(shown), [names[number] for number in shown], fontsize=_TICK_POINTS)
    axis.set_label_text(title, fontsize=_LABEL_POINTS)


def _numbers(statistics: RoutingStatistics) -> list[str]:
    return [str(expert) for expert in range(statistics.num_experts)]


def _short_names(names: Sequence[str]) -> list[str]:
    """What tells names apart: "0" and "10" of "layers.0.experts" and "layers.10.experts"."""
    # A number is not cut in two.
    start = re.sub(r"\d+$", "", _common_start(names))
    end = re.sub(r"\d+$", "", _common_start([name[::-1] for name in names]))
    short = [name[len(start) : len(name) - len(end)] for name in names]
    return short if all(short) else list(names)


def _common_start(names: Sequence[str]) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)

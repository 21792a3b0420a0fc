"""What rounding costs every layer, before and after everything that is done about it."""

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from haq.plotting.figures import (
    LABEL_POINTS,
    TICK_POINTS,
    TITLE_POINTS,
    WIDTH,
    check_kind,
    empty_figure,
)
from haq.quantization.report import LayerReport, QuantizationReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 3

# The two steps: their shift along the blocks, their name, and what they look like.
_STEPS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "before": (
        -0.12,
        "before: to nearest, not smoothed",
        {"color": "#a85f14", "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    ),
    "after": (0.12, "after", {"color": "#1d3f5e", "linestyle": "-", "marker": "s"}),
}
_SMALLEST_MARKER, _LARGEST_MARKER = 2.0, 4.0

Layers = dict[int, list[LayerReport]]
"""The layers of one kind, by the number of their block: several where they are of experts."""


def plot_errors(report: QuantizationReport) -> "Figure":
    """The relative error of every layer, before and after.

    It is |Y' - Y|^2 / |Y|^2 of the layer's output on real inputs: before, without smoothing and
    rounded to nearest; after, as the model is now.

    Args:
        report: of a quantized model; `haq.quantization_report` has it.

    Returns:
        A panel for each kind of layer, over the numbers of the blocks, with one logarithmic scale
        for all. Where there is a layer for each expert, the markers are their means, as in the
        report, and thin lines reach from the smallest to the largest. Errors of zero are not
        drawn: no token reached the layer. A head in int8 stands behind the last block.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is something else.
        ValueError: nothing is int8 in it.

    Examples:
        >>> figure = plot_errors(haq.quantization_report(model))  # doctest: +SKIP
        >>> figure.savefig("errors.png")  # doctest: +SKIP
    """
    check_kind("report", report, QuantizationReport, "haq.quantization_report(model)")
    kinds = _by_kind(report)
    if not kinds:
        raise ValueError(
            "`report` must have int8 layers to draw, got none. Ask for a report after a block has "
            "been quantized."
        )
    columns = min(len(kinds), _MOST_COLUMNS)
    rows = math.ceil(len(kinds) / columns)
    figure = empty_figure(WIDTH, 1.0 + 1.9 * rows)
    room = 72 * 0.9 * WIDTH / columns / report.num_blocks  # points for a block
    markersize = min(max(0.6 * room, _SMALLEST_MARKER), _LARGEST_MARKER)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (kind, layers) in zip(panels, kinds.items(), strict=False):
        _draw_errors(axes, layers, markersize)
        axes.set_title(kind, fontsize=LABEL_POINTS)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    last = max(report.num_blocks - 1, *(max(layers) for layers in kinds.values()))
    _label(panels[0], last)
    for axes in panels[max(len(kinds) - columns, 0) : len(kinds)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("block", fontsize=LABEL_POINTS)
    figure.supylabel("relative squared error of the output", fontsize=LABEL_POINTS)
    title = f"Error of the layers of {report.model}"
    figure.suptitle(title, fontsize=TITLE_POINTS, x=0.01, horizontalalignment="left")
    labels = {label for _, label, _ in _STEPS.values()}
    lines = [line for line in panels[0].lines if line.get_label() in labels]
    figure.legend(handles=lines, loc="outside upper right", ncols=2, fontsize=LABEL_POINTS)
    return figure


def _by_kind(report: QuantizationReport) -> dict[str, Layers]:
    """Layers by their names without numbers: "self_attn.q_proj", "mlp.experts.*.down_proj"."""
    kinds: dict[str, Layers] = {}
    numbers = {layer.name: i for i, block in enumerate(report.blocks) for layer in block.layers}
    for layer in report.layers:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        _, _, inside = name.partition(".*.")
        number = numbers.get(layer.name, report.num_blocks)
        kinds.setdefault(inside or name, {}).setdefault(number, []).append(layer)
    return kinds


def _draw_errors(axes: "Axes", layers: Layers, markersize: float) -> None:
    for step, (shift, label, style) in _STEPS.items():
        errors = [[float(getattr(layer, f"error_{step}")) for layer in m] for m in layers.values()]
        places = np.array(list(layers)) + shift
        # A logarithm has no place for zero.
        means = [float(np.mean(some)) or np.nan for some in errors]
        axes.plot(places, means, label=label, markersize=markersize, linewidth=1, **style)
        if any(len(some) > 1 for some in errors):
            low = [min((e for e in some if e > 0), default=np.nan) for some in errors]
            high = [max(some) or np.nan for some in errors]
            axes.vlines(places, low, high, color=style["color"], linewidth=0.8)
    axes.tick_params(labelsize=TICK_POINTS)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)


def _label(axes: "Axes", last: int) -> None:
    """The scales, which all panels share."""
    from matplotlib.ticker import MaxNLocator

    axes.set_yscale("log")
    axes.set_xlim(-0.6, last + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))

"""Outlier channels of a layer's input, and what smoothing made of them."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haq.plotting.figures import LABEL_POINTS, TICK_POINTS, TITLE_POINTS, WIDTH, empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FILL, _EDGE = "#9dbfdd", "#1d3f5e"

# Of the largest magnitude: what is smaller is cut off. An int8 step is a 127th of it.
_SMALLEST = 1e-4

# Points: among ten thousand channels, an outlier has no room but the line around it.
_LINE = 0.7


def plot_channels(before: ArrayLike, after: ArrayLike, *, layer: str = "") -> "Figure":
    """How large each channel of a layer's input gets, before and after quantizing.

    A token has one step for all of its channels, so a channel far above the others takes their
    precision away. Smoothing moves such ranges into the weights.

    Args:
        before: largest magnitude of each channel in the float model, ``[K]``, such as
            `haq.channel_magnitudes` gives it.
        after: the same in the quantized model, ``[K]``.
        layer: its name, for the title.

    Returns:
        Two rows of K steps over the same logarithmic scale, in the order of the channels. The
        dashed line is the median of the channels that are not zero. What is below a ten thousandth
        of the largest is cut off.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the two are not of one shape ``[K]``, or hold a number that is negative or not
            finite, or nothing but zeros.

    Examples:
        >>> name = "model.decoder.layers.3.fc1"
        >>> before = haq.channel_magnitudes(reference, calibration, name)  # doctest: +SKIP
        >>> after = haq.channel_magnitudes(model, calibration, name)  # doctest: +SKIP
        >>> plot_channels(before, after, layer=name).savefig("channels.png")  # doctest: +SKIP
    """
    rows = {"before": _magnitudes("before", before), "after": _magnitudes("after", after)}
    if len(rows["before"]) != len(rows["after"]):
        raise ValueError(
            "`before` and `after` must be of one layer, got "
            f"{len(rows['before'])} and {len(rows['after'])} channels."
        )
    figure = empty_figure(WIDTH, 4.2)
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    largest = max(values.max() for values in rows.values())
    smallest = min(values[values > 0].min() for values in rows.values())
    low = max(smallest / 2, _SMALLEST * largest)
    for axes, (name, values) in zip(panels, rows.items(), strict=True):
        _draw_channels(axes, name, values, low)
    panels[0].set_yscale("log")
    panels[0].set_ylim(low, 1.5 * largest)
    panels[0].set_xlim(-0.5, len(rows["before"]) - 0.5)
    panels[1].set_xlabel("channel", fontsize=LABEL_POINTS)
    figure.supylabel("largest magnitude of the input", fontsize=LABEL_POINTS)
    if layer:
        figure.suptitle(f"Input of {layer}", fontsize=TITLE_POINTS)
    return figure


def _magnitudes(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`{name}` must be one magnitude for each channel, [K], got shape {list(array.shape)}. "
            "`haq.channel_magnitudes(model, calibration, layer)` gives it."
        )
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        channel = int(wrong.argmax())
        raise ValueError(
            f"`{name}` must hold finite magnitudes that are not negative, got {array[channel]} in "
            f"channel {channel}."
        )
    if not array.any():
        raise ValueError(
            f"`{name}` must hold a channel that is not zero, got {len(array)} zeros. No token "
            "reached the layer, or all of its inputs are zero."
        )
    return array


def _draw_channels(axes: "Axes", name: str, values: NDArray[np.float64], low: float) -> None:
    edges = np.arange(len(values) + 1) - 0.5
    axes.stairs(
        np.maximum(values, low),
        edges,
        baseline=low,
        fill=True,
        facecolor=_FILL,
        edgecolor=_EDGE,
        linewidth=_LINE,
    )
    median = float(np.median(values[values > 0]))
    axes.axhline(median, color="black", linewidth=1, linestyle="--")
    times = values.max() / median
    axes.set_title(
        f"{name}: the largest, channel {values.argmax()}, is {times:.3g} times the median",
        fontsize=TITLE_POINTS,
    )
    axes.tick_params(labelsize=TICK_POINTS)

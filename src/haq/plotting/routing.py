"""How a mixture of experts routes, as maps."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from haq.offload.routing import RoutingStatistics
from haq.plotting.figures import LABEL_POINTS, TICK_POINTS, TITLE_POINTS, check_kind, empty_figure

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


_SOURCE = "haq.RoutingStatistics.collect(model, batches)"


def plot_routing(statistics: RoutingStatistics) -> "Figure":
    """How often each expert is chosen.

    Args:
        statistics: of the routing.

    Returns:
        A map of layers and experts. Its unit: 1 for an expert that is chosen as often as if all
        experts of its layer were chosen equally often; that is marked on the scale.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``statistics`` is something else.

    Examples:
        >>> statistics = RoutingStatistics.load("routing.npz")  # doctest: +SKIP
        >>> plot_routing(statistics).savefig("routing.png")  # doctest: +SKIP
    """
    check_kind("statistics", statistics, RoutingStatistics, _SOURCE)
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
        TypeError: ``statistics`` is something else.
        ValueError: there are no such layers, or no transitions between them are known.

    Examples:
        >>> figure = plot_transitions(statistics, layer=0)  # doctest: +SKIP
        >>> figure.savefig("transitions.png")  # doctest: +SKIP
    """
    check_kind("statistics", statistics, RoutingStatistics, _SOURCE)
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
    figure = empty_figure(width + 1.8, height + 0.9)
    axes = figure.subplots()
    largest = max(float(np.nanmax(values)), 1.0)
    # From dark to light without a turn, so that it survives a printer without colours.
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(unit, fontsize=LABEL_POINTS)
    bar.ax.tick_params(labelsize=TICK_POINTS)
    bar.ax.axhline(1, color="white", linewidth=3)
    bar.ax.axhline(1, color="black", linewidth=1)
    longest = max(map(len, columns[1]))
    _label(axes.yaxis, *rows, room=72 * height / count, needed=1.5 * TICK_POINTS)
    _label(axes.xaxis, *columns, room=72 * width / across, needed=(longest + 1) * TICK_POINTS)
    axes.set_title(title, fontsize=TITLE_POINTS)
    return figure


def _label(axis: "Axis", title: str, names: Sequence[str], *, room: float, needed: float) -> None:
    """Names along an axis; with less room for each than is needed, every second, fifth, tenth."""
    steps = (step * 10**power for power in range(9) for step in (1, 2, 5))
    step = next(step for step in steps if step * room >= needed)
    shown = range(0, len(names), step)
    axis.set_ticks(list(shown), [names[number] for number in shown], fontsize=TICK_POINTS)
    axis.set_label_text(title, fontsize=LABEL_POINTS)


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

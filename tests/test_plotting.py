"""Pictures against what they show: bars and cells by hand, and no label on top of another."""

import importlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from haq.offload.meter import LayerCounts, Span
from haq.offload.report import OffloadReport
from haq.offload.routing import RoutingStatistics
from haq.plotting import plot_lanes, plot_routing, plot_transitions

# Much of matplotlib is typed as one of several things.
Figure = Any
Axes = Any
Axis = Any


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")


def report(spans: Sequence[Span], layers: int = 2) -> OffloadReport:
    """Of which 0.6 of 0.8 s overlapped and 3 of 4 choices were hits, whatever the spans."""
    counts = LayerCounts(calls=1, hits=3, misses=1, overlap_seconds=0.6, shorter_seconds=0.8)
    nothing = (LayerCounts(),) * (layers - 1)
    names = tuple(f"layer {layer}" for layer in range(layers))
    return OffloadReport(
        layers=names,
        resident=(1,) * layers,
        counts=(counts, *nothing),
        copied_bytes=0,
        prefetches_used=0,
        prefetches_wasted=0,
        peak_bytes=0,
        promised_bytes=None,
        notes=(),
        spans=tuple(spans),
    )


def tokens(layers: int, number: int) -> list[Span]:
    """A long span of the CPU and a short one of the GPU in every layer, one layer after another."""
    spans = []
    for call in range(layers * number):
        start = 7.0 + 4e-3 * call
        spans.append(Span(call % layers, "gpu", start + 1e-4, start + 5e-4))
        spans.append(Span(call % layers, "cpu", start, start + 3e-3))
    return spans


def random_statistics(
    layers: int, experts: int, chosen: int, names: Sequence[str] | None = None
) -> RoutingStatistics:
    """400 tokens whose choice in a layer depends on that of the layer before."""
    rng = np.random.default_rng(0)
    statistics = RoutingStatistics(names or layers, experts, chosen)
    before: list[NDArray[np.int64]] = []
    tilt = rng.normal(size=(layers, experts, experts))
    for layer in range(layers):
        first = before[0][:, 0] if before else np.zeros(400, dtype=np.int64)
        noisy = tilt[layer, first] + rng.gumbel(size=(400, experts))
        index = np.argsort(-noisy, axis=1)[:, :chosen]
        statistics.add(layer, index, None, before[:3])
        before.insert(0, index)
    return statistics


def axes_of(figure: Figure) -> Axes:
    return figure.axes[0]


def drawn(figure: Figure) -> Figure:
    """With everything in its place."""
    backend: Any = importlib.import_module("matplotlib.backends.backend_agg")
    backend.FigureCanvasAgg(figure).draw()
    return figure


def bars(figure: Figure) -> set[tuple[int, float, float, str]]:
    """Row, start and end in ms, and hatching of every bar."""
    found = set()
    for collection in axes_of(figure).collections:
        for path in collection.get_paths():
            low, high = np.asarray(path.vertices).min(0), np.asarray(path.vertices).max(0)
            row, hatch = round(float(low[1] + high[1]) / 2), collection.get_hatch() or ""
            found.add((row, round(float(low[0]), 6), round(float(high[0]), 6), hatch))
    return found


def image(figure: Figure) -> NDArray[np.float64]:
    (found,) = axes_of(figure).images
    return np.ma.filled(np.ma.asarray(found.get_array(), dtype=float), np.nan)


def names(axis: Axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# --- Lanes ----------------------------------------------------------------------------------------


def test_bars_are_the_spans(matplotlib: Any) -> None:
    spans = [
        Span(0, "cpu", 2.000, 2.004),
        Span(0, "gpu", 2.001, 2.002),
        Span(1, "gpu", 2.005, 2.0065),
    ]
    figure = plot_lanes(report(spans))
    expected = {(1, 0.0, 4.0, "///"), (0, 1.0, 2.0, ""), (0, 5.0, 6.5, "")}
    assert bars(figure) == expected
    axes = axes_of(figure)
    assert names(axes.yaxis) == ["GPU", "CPU"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # row 0 at the top
    assert axes.get_xlim() == pytest.approx((0, 6.5))
    assert axes.get_title() == "75 % of the shorter lane overlapped, 75 % of choices on the GPU"
    assert axes.get_xlabel().startswith("ms ")


def test_neighbouring_layers_differ_without_colours(matplotlib: Any) -> None:
    figure = plot_lanes(report(tokens(4, 1), 4))
    grey = np.array([0.299, 0.587, 0.114])
    lightness = {}
    for collection in axes_of(figure).collections:
        (fill,) = {tuple(colour) for colour in np.asarray(collection.get_facecolor())}
        lightness[fill] = float(np.array(fill[:3]) @ grey)
        assert collection.get_linewidth()[0] > 0
    blue, light_blue, orange, light_orange = lightness.values()
    assert light_blue - blue > 0.15
    assert light_orange - orange > 0.15


def test_last_spans_only(matplotlib: Any) -> None:
    spans = tokens(4, 5)
    # The last three: the CPU's of a layer, 3 ms, and both of the next, 4 ms later.
    found = bars(plot_lanes(report(spans, 4), last=3))
    assert found == {(1, 0.0, 3.0, "///"), (0, 4.1, 4.5, ""), (1, 4.0, 7.0, "///")}
    assert len(bars(plot_lanes(report(spans, 4), last=10**6))) == len(spans)


@pytest.mark.parametrize(("layers", "number"), [(4, 2), (32, 1), (48, 1), (32, 2), (120, 1)])
def test_numbers_fit_their_bars(matplotlib: Any, layers: int, number: int) -> None:
    spans = tokens(layers, number)
    figure = drawn(plot_lanes(report(spans, layers)))
    axes = axes_of(figure)
    first = min(span.start for span in spans)
    centres = {}
    for span in spans:
        start, end = 1e3 * (span.start - first), 1e3 * (span.end - first)
        centres[round((start + end) / 2, 6), int(span.lane == "cpu")] = span, start, end
    for text in axes.texts:
        x, y = text.get_position()
        span, start, end = centres[round(float(x), 6), int(y)]
        assert text.get_text() == str(span.layer)
        left, right = axes.transData.transform([(start, 0), (end, 0)])[:, 0]
        extent = text.get_window_extent()
        assert left <= extent.x0
        assert extent.x1 <= right
    if layers == 4:
        assert len(axes.texts) >= layers * number  # at least those of the long bars
    assert axes.get_xlabel().endswith("numbers are layers") == bool(axes.texts)


def test_thousands_of_spans_stay_visible(matplotlib: Any) -> None:
    figure = plot_lanes(report(tokens(32, 100), 32))
    assert len(bars(figure)) == 6400
    assert not axes_of(figure).texts
    assert {width for c in axes_of(figure).collections for width in c.get_linewidth()} == {0}
    assert {c.get_hatch() or "" for c in axes_of(figure).collections} == {""}


def test_one_lane_and_one_moment(matplotlib: Any) -> None:
    figure = drawn(plot_lanes(report([Span(0, "gpu", 1.0, 1.0)])))
    assert bars(figure) == {(0, 0.0, 0.0, "")}
    assert names(axes_of(figure).yaxis) == ["GPU", "CPU"]


def test_no_spans() -> None:
    with pytest.raises(ValueError, match=r"`report` must have spans .*, got none\. Ask for"):
        plot_lanes(report([]))


@pytest.mark.parametrize("last", [0, -1])
def test_last_must_be_positive(last: int) -> None:
    with pytest.raises(ValueError, match=f"`last` must be a positive number of spans.*got {last}"):
        plot_lanes(report(tokens(2, 1)), last=last)


# --- Routing --------------------------------------------------------------------------------------


def test_cells_of_routing(matplotlib: Any) -> None:
    counts = np.array([[60, 20, 10, 10], [0, 0, 0, 0], [0, 100, 50, 50]])
    figure = plot_routing(RoutingStatistics.from_counts(counts, experts_per_token=2))
    # 1 for a quarter of the choices; where nothing was seen, all are as likely.
    expected = np.array([[2.4, 0.8, 0.4, 0.4], [1, 1, 1, 1], [0, 2, 1, 1]])
    np.testing.assert_allclose(image(figure), expected)
    axes: Axes
    scale: Axes
    axes, scale = figure.axes
    assert names(axes.yaxis) == ["0", "1", "2"]
    assert names(axes.xaxis) == ["0", "1", "2", "3"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "expert")
    assert scale.get_ylabel() == "times as often as on average"
    assert axes.get_title() == "How often experts are chosen, of 50 tokens"
    assert scale.get_ylim() == pytest.approx((0, 2.4))
    assert [list(line.get_ydata()) for line in scale.lines] == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([f"model.layers.{i}.mlp.experts" for i in (1, 9, 10)], ["1", "9", "10"]),
        ([f"model.layers.{i}.mlp.experts" for i in (10, 11, 12)], ["10", "11", "12"]),
        (["0.ffn1", "0.ffn11"], ["1", "11"]),
        (["layer 11", "layer 21"], ["11", "21"]),
        (["encoder.experts", "decoder.experts"], ["en", "de"]),
        (["experts", "experts.more"], ["experts", "experts.more"]),
        (["model.layers.0.mlp.experts"], ["model.layers.0.mlp.experts"]),
    ],
)
def test_names_of_layers(matplotlib: Any, given: list[str], expected: list[str]) -> None:
    statistics = RoutingStatistics(given, num_experts=2, experts_per_token=1)
    assert names(axes_of(plot_routing(statistics)).yaxis) == expected


@pytest.mark.parametrize(
    ("layers", "experts"), [(1, 2), (3, 64), (32, 8), (48, 128), (94, 128), (300, 512)]
)
def test_labels_do_not_overlap(matplotlib: Any, layers: int, experts: int) -> None:
    given = [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    statistics = RoutingStatistics(given, experts, 2)
    figure = drawn(plot_routing(statistics))
    check_labels(figure)


@pytest.mark.parametrize("experts", [2, 8, 64, 128, 512])
def test_labels_of_transitions_do_not_overlap(matplotlib: Any, experts: int) -> None:
    figure = drawn(plot_transitions(random_statistics(2, experts, 2), 0))
    check_labels(figure)


def check_labels(figure: Figure) -> None:
    """Tick labels have some space between them, and everything is within the figure."""
    axes, scale = figure.axes
    for axis, side in ((axes.xaxis, "x"), (axes.yaxis, "y"), (scale.yaxis, "y")):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        labels = [label for place, label in ticks if low <= place <= high]  # others are not drawn
        extents = [label.get_window_extent() for label in labels]
        intervals = sorted((getattr(e, f"{side}0"), getattr(e, f"{side}1")) for e in extents)
        for (_, end), (start, _) in itertools.pairwise(intervals):
            assert start - end > 1, [label.get_text() for label in labels]
        assert labels
        for text in (*labels, axes.title, axis.label):
            extent = text.get_window_extent()
            assert figure.bbox.x0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, text.get_text()
            assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1, text.get_text()


# --- Transitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_cells_of_transitions(matplotlib: Any, ahead: int) -> None:
    statistics = random_statistics(5, 6, 2, [f"model.layers.{i}.mlp" for i in range(1, 6)])
    figure = plot_transitions(statistics, 1, ahead)
    after = statistics.transitions[ahead - 1, 1].astype(float)
    shares = statistics.counts[1 + ahead] / statistics.counts[1 + ahead].sum()
    # Half a choice for each of six experts, in proportion to how often they are chosen anyway.
    smoothed = (after + 3 * shares) / (after.sum(1, keepdims=True) + 3)
    np.testing.assert_allclose(image(figure), smoothed / shares)
    axes, scale = figure.axes
    assert axes.get_ylabel() == "expert of layer 2"
    assert axes.get_xlabel() == f"expert of layer {2 + ahead}"
    assert axes.get_title() == f"What layer {2 + ahead} chooses after layer 2"
    assert scale.get_ylabel() == "times as often as on the whole"


def test_experts_that_were_never_chosen(matplotlib: Any) -> None:
    statistics = RoutingStatistics(2, num_experts=3, experts_per_token=1)
    first, second = np.array([[0], [0], [1]]), np.array([[0], [0], [2]])
    statistics.add(0, first, None)
    statistics.add(1, second, None, before=[first])
    found = image(drawn(plot_transitions(statistics, 0)))
    # Choices of 0, 1, 2 after 0: 2 + 1, -, 0 + 0.5 of 3.5; after 1: 0 + 1, -, 1 + 0.5 of 2.5.
    expected = np.array([[9 / 7, 3 / 7], [0.6, 1.8], [1, 1]])
    np.testing.assert_allclose(found[:, [0, 2]], expected)
    assert np.isnan(found[:, 1]).all()


def test_no_transitions() -> None:
    statistics = RoutingStatistics.from_counts([[1, 2], [3, 4]], experts_per_token=1)
    message = r"transitions from layer 0 to 1, got none.*`RoutingStatistics.collect` counts them"
    with pytest.raises(ValueError, match=message):
        plot_transitions(statistics, 0)


@pytest.mark.parametrize(
    ("layer", "ahead", "name"),
    [(3, 1, "layer"), (-1, 1, "layer"), (2, 1, "ahead"), (0, 4, "ahead")],
)
def test_layers_that_are_not_there(layer: int, ahead: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be in"):
        plot_transitions(random_statistics(3, 4, 1), layer, ahead)


# --- matplotlib -----------------------------------------------------------------------------------


def all_figures() -> list[Figure]:
    statistics = random_statistics(3, 4, 2)
    lanes = plot_lanes(report(tokens(2, 2)))
    return [lanes, plot_routing(statistics), plot_transitions(statistics, 1)]


def test_figures_can_be_saved_and_nothing_is_global(matplotlib: Any, tmp_path: Path) -> None:
    managers: Any = importlib.import_module("matplotlib._pylab_helpers")
    before = dict(matplotlib.rcParams)
    for number, figure in enumerate(all_figures()):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    assert not managers.Gcf.figs
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    statistics = random_statistics(2, 4, 2)
    message = r"needs matplotlib.*`pip install matplotlib`"
    with pytest.raises(ImportError, match=message):
        plot_lanes(report(tokens(2, 1)))
    with pytest.raises(ImportError, match=message):
        plot_routing(statistics)
    with pytest.raises(ImportError, match=message):
        plot_transitions(statistics, 0)


@pytest.mark.parametrize(
    ("draw", "source"),
    [
        (plot_lanes, r"OffloadReport, got int\. `offloader\.report\(\)`"),
        (plot_routing, r"RoutingStatistics, got int\. `haq\.RoutingStatistics\.collect"),
        (lambda other: plot_transitions(other, 0), "RoutingStatistics, got int"),
    ],
)
def test_something_else(draw: Any, source: str) -> None:
    with pytest.raises(TypeError, match=source):
        draw(7)

"""Pictures of channels and of layers' errors against the numbers that they were given."""

import copy
import importlib
import itertools
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from haq import QuantizationConfig, QuantizationReport
from haq.plotting import plot_channels, plot_errors
from haq.quantization.report import BlockReport, LayerReport

# Much of matplotlib is typed as one of several things.
Figure = Any
Axes = Any


@pytest.fixture(autouse=True)
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")


def drawn(figure: Figure) -> Figure:
    """With everything in its place."""
    backend: Any = importlib.import_module("matplotlib.backends.backend_agg")
    backend.FigureCanvasAgg(figure).draw()
    return figure


def check_texts(figure: Figure) -> None:
    """Nothing is outside of the figure, and titles do not run into each other or the legend."""
    titles = [axes.title for axes in figure.axes if axes.get_visible()]
    above = [figure._suptitle] if figure._suptitle else []
    legends = list(figure.legends)
    boxes = [each.get_window_extent() for each in (*titles, *above, *legends)]
    for axes in figure.axes:
        boxes += [axes.xaxis.label.get_window_extent()] if axes.get_xlabel() else []
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


# --- Channels -------------------------------------------------------------------------------------


def steps(axes: Axes) -> NDArray[np.float64]:
    """The heights of the channels, in their order."""
    (patch,) = axes.patches
    values, edges, baseline = patch.get_data()
    np.testing.assert_array_equal(edges, np.arange(len(values) + 1) - 0.5)
    assert baseline == axes.get_ylim()[0]
    return np.asarray(values)


def medians(axes: Axes) -> list[float]:
    return [float(line.get_ydata()[0]) for line in axes.lines]


def test_steps_are_the_magnitudes() -> None:
    before = torch.tensor([1.0, 200.0, 2.0, 0.5, 4.0])
    after = [1.0, 3.0, 2.0, 1.5, 2.5]
    figure = drawn(plot_channels(before, after, layer="model.layers.0.fc1"))
    first, second = figure.axes
    np.testing.assert_array_equal(steps(first), before)
    np.testing.assert_array_equal(steps(second), after)
    assert (medians(first), medians(second)) == ([2.0], [2.0])
    assert first.get_title() == "before: the largest, channel 1, is 100 times the median"
    assert second.get_title() == "after: the largest, channel 1, is 1.5 times the median"
    assert figure._suptitle.get_text() == "Input of model.layers.0.fc1"
    assert figure._supylabel.get_text() == "largest magnitude of the input"
    assert second.get_xlabel() == "channel"
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert first.get_ylim() == second.get_ylim() == pytest.approx((0.25, 300))
    assert second.get_xlim() == (-0.5, 4.5)
    check_texts(figure)


def test_channels_of_zeros_are_at_the_bottom_and_not_in_the_median() -> None:
    figure = plot_channels([0.0, 0.0, 0.0, 8.0, 4.0], [1e-6, 2.0, 2.0, 2.0, 1.0])
    first, second = figure.axes
    low = 8e-4  # a ten thousandth of the largest
    np.testing.assert_allclose(steps(first), [low, low, low, 8, 4])
    np.testing.assert_allclose(steps(second), [low, 2, 2, 2, 1])
    assert (medians(first), medians(second)) == ([6.0], [2.0])
    assert figure._suptitle is None


@pytest.mark.parametrize("channels", [1, 8, 4096, 20_000])
def test_an_outlier_is_seen_among_any_number_of_channels(channels: int) -> None:
    values = np.ones(channels)
    values[channels // 3] = 100
    figure = drawn(plot_channels(values, np.ones(channels)))
    check_texts(figure)
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].mean(-1)
    for axes, high in zip(figure.axes, (True, False), strict=True):
        place = axes.transData.transform((channels // 3, 40))  # between the others and the outlier
        row = pixels[len(pixels) - 1 - round(place[1])]
        around = row[round(place[0]) - 3 : round(place[0]) + 4]
        assert (around.min() < 200) == high


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            [[1.0]],
            [1.0],
            r"`before` must be one magnitude for each channel, \[K\], got shape \[1, ",
        ),
        ([1.0], [], r"`after` must be one magnitude.* got shape \[0\].*channel_magnitudes"),
        ([1.0, 2.0], [1.0], r"must be of one layer, got 2 and 1 channels\."),
        ([1.0, -2.0], [1.0, 1.0], r"`before` must hold finite .* got -2\.0 in channel 1"),
        ([1.0], [float("nan")], r"`after` must hold finite .* got nan in channel 0"),
        ([1.0], [float("inf")], r"`after` must hold finite .* got inf in channel 0"),
        ([0.0, 0.0], [1.0, 1.0], r"`before` must hold a channel that is not zero, got 2 zeros"),
    ],
)
def test_bad_magnitudes(before: Any, after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_channels(before, after)


# --- Errors ---------------------------------------------------------------------------------------


def layer(name: str, before: float, after: float, expert: int | None = None) -> LayerReport:
    return LayerReport(name, 4, 4, "p4 0.5", "hessian", 9, before, after, expert=expert)


def report(blocks: Sequence[Sequence[LayerReport]], num_blocks: int = 0) -> QuantizationReport:
    return QuantizationReport(
        model="TinyForCausalLM",
        config=QuantizationConfig(),
        num_blocks=num_blocks or len(blocks),
        tokens=9,
        blocks=[BlockReport(list(layers)) for layers in blocks],
    )


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Block and error of every marker, by the names of the steps."""
    return {
        line.get_label().partition(":")[0]: [
            (round(float(x), 2), float(y)) for x, y in zip(*line.get_data(), strict=True)
        ]
        for line in axes.lines
    }


def ranges(axes: Axes) -> list[list[tuple[float, ...]]]:
    """Block, smallest and largest error of every thin line, for each step."""
    found = []
    for lines in axes.collections:
        segments = [s for s in lines.get_segments() if len(s)]  # none where nothing is positive
        found.append([(round(float(s[0, 0]), 2), s[0, 1], s[1, 1]) for s in segments])
    return found


def shown(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}


def test_markers_are_the_errors() -> None:
    blocks = [
        [layer(f"model.layers.{i}.attn.q", 1e-3 / (i + 1), 1e-5 * (i + 1)) for i in (i,)]
        + [layer(f"model.layers.{i}.fc1", 4e-3, 2e-5)]
        for i in range(3)
    ]
    figure = drawn(plot_errors(report(blocks)))
    panels = shown(figure)
    assert list(panels) == ["attn.q", "fc1"]
    before = [(-0.12, 1e-3), (0.88, 5e-4), (1.88, 1e-3 / 3)]
    after = [(0.12, 1e-5), (1.12, 2e-5), (2.12, pytest.approx(3e-5))]
    assert points(panels["attn.q"]) == {"before": before, "after": after}
    assert [y for _, y in points(panels["fc1"])["before"]] == [4e-3] * 3
    assert ranges(panels["fc1"]) == []
    assert {axes.get_yscale() for axes in panels.values()} == {"log"}
    assert len({axes.get_ylim() for axes in panels.values()}) == 1
    assert {axes.get_xlabel() for axes in panels.values()} == {"block"}
    assert figure._supylabel.get_text() == "relative squared error of the output"
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["before: to nearest, not smoothed", "after"]
    check_texts(figure)


def test_steps_differ_without_colours() -> None:
    figure = plot_errors(report([[layer("layers.0.fc1", 1e-3, 1e-5)]]))
    lines = figure.axes[0].lines
    assert len({line.get_marker() for line in lines}) == 2
    assert len({line.get_linestyle() for line in lines}) == 2
    assert lines[0].get_markerfacecolor() == "white"
    assert lines[1].get_markerfacecolor() != "white"


def test_experts_are_a_mean_and_a_range() -> None:
    name = "model.layers.0.mlp.experts"
    experts = [
        layer(f"{name}.{e}.down_proj", error, error / 10, expert=e)
        for e, error in enumerate([1e-3, 3e-3, 0.0, 8e-3])  # one that no token chose
    ]
    silent = [layer(f"model.layers.1.mlp.experts.{e}.down_proj", 0, 0, expert=e) for e in range(2)]
    figure = plot_errors(report([experts, silent]))
    panel = shown(figure)["mlp.experts.*.down_proj"]
    first, second = points(panel)["before"]
    assert first == (-0.12, pytest.approx(3e-3))  # as the report's table has it
    assert np.isnan(second[1])
    assert points(panel)["after"][0] == (0.12, pytest.approx(3e-4))
    (before, after) = ranges(panel)
    assert before == [(-0.12, 1e-3, 8e-3)]
    assert after == [(0.12, 1e-4, 8e-4)]
    drawn(figure)


def test_kinds_that_only_some_blocks_have_and_blocks_that_are_not_there_yet() -> None:
    dense = [layer("model.layers.0.mlp.up_proj", 1e-3, 1e-5)]
    later = [layer("model.layers.1.self_attn.q_proj", 2e-3, 2e-5)]
    figure = drawn(plot_errors(report([dense, later], num_blocks=6)))
    panels = shown(figure)
    assert points(panels["mlp.up_proj"])["before"] == [(-0.12, 1e-3)]
    assert points(panels["self_attn.q_proj"])["after"] == [(1.12, 2e-5)]
    assert panels["mlp.up_proj"].get_xlim() == pytest.approx((-0.6, 5.6))


def test_a_head_stands_behind_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [[layer(f"model.layers.{i}.fc1", 1e-3, 1e-5)] for i in range(3)]
    layers = [*itertools.chain(*blocks), layer("lm_head", 2e-3, 2e-5)]
    monkeypatch.setattr(QuantizationReport, "layers", property(lambda _: layers))
    panels = shown(plot_errors(report(blocks)))
    assert list(panels) == ["fc1", "lm_head"]
    assert points(panels["lm_head"])["after"] == [(3.12, 2e-5)]
    assert panels["fc1"].get_xlim() == pytest.approx((-0.6, 3.6))


@pytest.mark.parametrize(("kinds", "blocks"), [(1, 1), (4, 2), (5, 12), (6, 40), (12, 80)])
def test_texts_do_not_overlap(kinds: int, blocks: int) -> None:
    rows = [
        [
            layer(f"model.layers.{i}.self_attn.kv_proj_with_mqa_{k}", 1e-3, 1e-5)
            for k in range(kinds)
        ]
        for i in range(blocks)
    ]
    figure = drawn(plot_errors(report(rows)))
    panels = shown(figure)
    assert len(panels) == kinds
    check_texts(figure)
    # Under the last panel of every column there are the blocks' numbers, and they are whole ones.
    bottom = list(panels.values())[-min(kinds, 3) :]
    for axes in bottom:
        labels = [label.get_text() for label in axes.get_xticklabels() if label.get_visible()]
        assert labels
        assert all(text.lstrip("\N{MINUS SIGN}").isdigit() for text in labels if text)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"`report` must have int8 layers to draw, got none\. Ask"):
        plot_errors(report([], num_blocks=2))


def test_something_else_than_a_report() -> None:
    with pytest.raises(TypeError, match=r"must be a QuantizationReport, got Linear\. `haq\.quant"):
        plot_errors(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


# --- Any figure -----------------------------------------------------------------------------------


def test_a_figure_is_its_own_picture_in_a_notebook_and_saves_by_one_call(tmp_path: Path) -> None:
    for figure in (
        plot_channels([1.0], [1.0]),
        plot_errors(report([[layer("l.0.f", 1e-3, 1e-4)]])),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG")
        for form, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
            figure.savefig(tmp_path / f"figure.{form}")
            assert (tmp_path / f"figure.{form}").read_bytes().startswith(start)
        for other in (pickle.loads(pickle.dumps(figure)), copy.deepcopy(figure)):
            assert other._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = r"needs matplotlib.*`pip install matplotlib`"
    with pytest.raises(ImportError, match=message):
        plot_channels([1.0], [1.0])
    with pytest.raises(ImportError, match=message):
        plot_errors(report([[layer("layers.0.fc1", 1e-3, 1e-5)]]))

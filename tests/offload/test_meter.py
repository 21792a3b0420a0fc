"""What is counted and timed, to the tick of a clock that the test turns; and how it is told."""

import json
from typing import Any

import pytest
import torch
from IPython.lib.pretty import pretty

from haq.offload.meter import Call, LayerCounts, Mark, Meter, Span
from haq.offload.report import OffloadReport

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


def call(
    layer: int,
    gpu: tuple[float, float] | None = None,
    cpu: tuple[float, float] | None = None,
    **counts: int,
) -> Call:
    marks = None if gpu is None else (Mark(7 + gpu[0]), Mark(7 + gpu[1]))
    times = None if cpu is None else (7 + cpu[0], 7 + cpu[1])
    return Call(layer, **{"tokens": 1} | counts, gpu=marks, cpu=times)


@pytest.mark.parametrize(
    ("gpu", "cpu", "overlap", "shorter"),
    [
        ((0, 2), (1, 5), 1, 2),  # in part
        ((1, 5), (0, 2), 1, 2),
        ((0, 6), (1, 3), 2, 2),  # inside
        ((1, 3), (0, 6), 2, 2),
        ((0, 3), (0, 3), 3, 3),  # the same
        ((0, 1), (1, 4), 0, 1),  # touching
        ((0, 1), (3, 7), 0, 1),  # apart
        ((3, 7), (0, 1), 0, 1),
    ],
)
def test_overlap(
    gpu: tuple[float, float], cpu: tuple[float, float], overlap: float, shorter: float
) -> None:
    meter = Meter(2, CPU, Clock())
    meter.add(call(1, gpu, cpu))
    counts = meter.counts[1]
    assert (counts.overlap_seconds, counts.shorter_seconds) == (overlap, shorter)
    assert (counts.gpu_seconds, counts.cpu_seconds) == (gpu[1] - gpu[0], cpu[1] - cpu[0])
    assert list(meter.spans) == [Span(1, "gpu", *gpu), Span(1, "cpu", *cpu)]
    assert meter.counts[0] == LayerCounts()


def test_sums() -> None:
    meter = Meter(2, CPU, Clock())
    meter.add(call(0, (0, 1), None, tokens=3, hits=6))
    meter.add(call(1, (1, 3), (1, 2), tokens=3, hits=1, copied=2, misses=3))
    meter.add(call(0, None, (5, 9), tokens=2, misses=4))
    meter.add(call(0))
    assert meter.counts[0] == LayerCounts(3, 6, 6, 0, 4, 1, 1, 4, 0, 0)
    assert meter.counts[1] == LayerCounts(1, 3, 1, 2, 3, 1, 2, 1, 1, 1)
    assert len(meter.spans) == 4


def test_the_clock_is_read_when_a_mark_is_made() -> None:
    clock = Clock()
    meter = Meter(1, CPU, clock)
    clock.now = 9.5
    assert meter.mark() == Mark(9.5)


def test_reset() -> None:
    clock = Clock()
    meter = Meter(1, CPU, clock)
    meter.add(call(0, (0, 1), hits=1))
    before = meter.counts[0]
    clock.now = 20.0
    meter.reset()
    assert meter.counts == [LayerCounts()]
    assert before.hits == 1
    assert list(meter.spans) == []
    assert meter.pace == 0
    meter.add(Call(0, 1, gpu=(Mark(21.0), Mark(23.0))))
    assert list(meter.spans) == [Span(0, "gpu", 1.0, 3.0)]


def test_the_pace_of_layers() -> None:
    clock = Clock()
    meter = Meter(4, CPU, clock)
    for layer, pace in ((0, 0), (1, 2), (2, 2), (3, 2)):
        meter.begin(layer)
        assert meter.pace == pace
        clock.now += 2
    clock.now += 1000  # Between tokens there is more than a layer.
    meter.begin(0)
    assert meter.pace == 2
    clock.now += 12
    meter.begin(1)
    assert meter.pace == pytest.approx(0.9 * 2 + 0.1 * 12)
    clock.now += 1000
    meter.begin(3)  # Not the next one.
    assert meter.pace == pytest.approx(3)


def test_spans_are_bounded() -> None:
    meter = Meter(1, CPU, Clock())
    for i in range(10_000):
        meter.add(call(0, (i, i + 1)))
    assert len(meter.spans) == 8192
    assert meter.spans[-1] == Span(0, "gpu", 9999, 10000)
    assert meter.counts[0].calls == 10_000


# --- The report -----------------------------------------------------------------------------------


def report(**changes: Any) -> OffloadReport:
    values: dict[str, Any] = {
        "layers": ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
        "resident": (3, 1),
        "counts": (
            LayerCounts(4, 10, 15, 2, 3, 2, 0.4, 0.2, 0.1, 0.2),
            LayerCounts(4, 10, 5, 0, 15, 4, 0.1, 0.6, 0.05, 0.1),
        ),
        "copied_bytes": 3 * 2**20,
        "prefetches_used": 7,
        "prefetches_wasted": 2,
        "peak_bytes": 0,
        "promised_bytes": None,
        "notes": (),
        "spans": (Span(0, "gpu", 0.0, 1.0),),
    }
    return OffloadReport(**values | changes)


def test_rates() -> None:
    assert report().hit_rate == 20 / 40
    assert report().overlap == pytest.approx(0.15 / 0.3)
    nothing = report(counts=(LayerCounts(), LayerCounts()))
    assert (nothing.hit_rate, nothing.overlap) == (1.0, 0.0)


def test_the_table() -> None:
    lines = str(report()).splitlines()
    assert lines[0] == (
        "50.0 % of choices on the GPU; GPU lane 0.50 s, CPU lane 0.80 s, 50 % of the shorter one "
        "overlapped"
    )
    assert lines[1] == "3.0 MiB copied; prefetches: 7 used, 2 wasted"
    assert lines[2] == ""
    names = ("layer", "resident", "tokens", "hit", "%", "copied", "on", "CPU", "GPU", "ms")
    assert lines[3].split() == [*names, "CPU", "ms"]
    assert lines[4].split() == [
        "model.layers.0.mlp.experts", "3", "10", "75.0", "2", "3", "100.000", "50.000",
    ]  # fmt: skip
    assert lines[5].split() == [
        "model.layers.1.mlp.experts", "1", "10", "25.0", "0", "15", "25.000", "150.000",
    ]  # fmt: skip
    assert len({len(line) for line in lines[3:]}) == 1
    assert len(lines) == 6


def test_memory_and_notes() -> None:
    text = str(report(peak_bytes=2**30, promised_bytes=3 * 2**29, notes=("one", "two")))
    assert "peak memory 1.00 GiB of 1.50 GiB\nnote: one\nnote: two\n" in text
    assert "peak memory 1.00 GiB\n" in str(report(peak_bytes=2**30))
    assert "peak" not in str(report(promised_bytes=5))


def test_for_notebooks() -> None:
    noted = report(notes=("a note",))
    assert pretty(noted) == str(noted)
    page = noted._repr_html_()
    assert "<td>model.layers.1.mlp.experts</td><td>1</td>" in page
    assert page.count("<tr>") == page.count("</tr>") == 3
    assert "note: a note" in page


def test_plain_values() -> None:
    values = json.loads(json.dumps(report().to_dict()))
    assert "spans" not in values
    assert values["hit_rate"] == 0.5
    assert values["counts"][1]["misses"] == 15
    assert values["layers"] == list(report().layers)

"""The report as a table, as HTML and as JSON."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from IPython.lib.pretty import pretty

from haq import (
    BlockReport,
    LayerReport,
    QuantizationConfig,
    QuantizationReport,
    RoutingReport,
    quantization_report,
)
from haq.quantization.report import attach_report, detach_report, find_report
from tests.architectures import ARCHITECTURES

FIRST = LayerReport(
    "blocks.0.fc1", 3072, 768, "p4 0.6", "hessian", 12345, 1.234e-3, 5.6e-4, asymmetric=True
)
SECOND = LayerReport("blocks.1.out", 7, 31, "-", "nearest", 0, 0.0, 0.0, "its input < 1 & <b>")


def report_of(
    *blocks: list[LayerReport] | BlockReport, num_blocks: int = 2, **others: object
) -> QuantizationReport:
    """Of blocks, or of the layers of dense ones."""
    made = [block if isinstance(block, BlockReport) else BlockReport(block) for block in blocks]
    return QuantizationReport(
        "ToyForCausalLM", QuantizationConfig(), num_blocks, 12345, made, **others
    )


def test_the_table() -> None:
    report = report_of([FIRST], [SECOND], kept_float=["lm_head", "score"])
    head, line, *rows = str(report).splitlines()
    assert head == (
        "layer              shape  input  smoothing  rounding  tokens   before    after  note"
    )
    assert rows == [
        "blocks.0.fc1  3072 x 768  u8     p4 0.6     hessian   12,345  1.2e-03  5.6e-04",
        "blocks.1.out      7 x 31  s8     -          nearest        0  0.0e+00  0.0e+00  "
        "its input < 1 & <b>",
        "",
        "ToyForCausalLM: 2 layers with 2,359,513 weights are int8, calibrated on 12,345 tokens.",
        "Kept in float: lm_head, score.",
        "1 of 2 layers carry a note: something did not go as configured there.",
    ]
    assert line == "-" * len(rows[1])


def test_an_incomplete_report_says_so() -> None:
    report = report_of([FIRST], num_blocks=5)
    assert not report.complete
    assert str(report).endswith("\nIncomplete: 1 of 5 blocks are int8.")
    assert "Incomplete: 1 of 5 blocks are int8." in report._repr_html_()
    assert report_of([FIRST], [SECOND]).complete
    assert "Incomplete" not in str(report_of([FIRST], [SECOND]))


def test_an_empty_report_can_be_printed() -> None:
    report = report_of()
    assert report.layers == []
    assert "0 layers with 0 weights are int8" in str(report)
    assert "note:" not in str(report)
    assert "Kept" not in str(report)


class Table(HTMLParser):
    """The text of each cell, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_ipython_shows_the_table() -> None:
    report = report_of([FIRST], [SECOND])
    assert pretty(report) == str(report)


def test_the_html_has_the_cells_of_the_table_and_nothing_that_a_name_brought() -> None:
    hostile = dataclasses.replace(FIRST, name="<script>alert('x')</script>")
    report = report_of([hostile], [SECOND], kept_float=["<img src=x>"])
    parser = Table()
    parser.feed(report._repr_html_())
    assert parser.open == []
    assert parser.rows == [
        ["layer", "shape", "input", "smoothing", "rounding", "tokens", "before", "after", "note"],
        [
            "<script>alert('x')</script>",
            "3072 x 768",
            "u8",
            "p4 0.6",
            "hessian",
            "12,345",
            "1.2e-03",
            "5.6e-04",
            "",
        ],
        ["blocks.1.out", "7 x 31", "s8", "-", "nearest", "0", "0.0e+00", "0.0e+00", SECOND.note],
    ]
    assert parser.tags == {"table", "thead", "tbody", "tr", "th", "td", "p"}


def test_json_gives_back_the_same_report() -> None:
    config = QuantizationConfig(smoothing="fixed", exclude=("lm_head", "*.fc1"))
    report = dataclasses.replace(
        report_of([FIRST], [SECOND], kept_float=["lm_head"]), config=config
    )
    values = json.loads(json.dumps(report.to_dict()))
    assert values["blocks"][1]["layers"][0]["note"] == SECOND.note
    assert values["config"]["smoothing"] == "fixed"
    assert QuantizationReport.from_dict(values) == report


def test_plain_values_are_copies() -> None:
    report = report_of([FIRST], [SECOND])
    values = report.to_dict()
    values["blocks"].clear()
    QuantizationReport.from_dict(report.to_dict()).blocks.clear()
    assert report.layers == [FIRST, SECOND]


def test_a_report_lives_on_its_model() -> None:
    model, report = ARCHITECTURES["opt"](), report_of()
    assert find_report(model) is None
    detach_report(model)
    attach_report(model, report)
    assert find_report(model) is quantization_report(model) is report
    detach_report(model)
    assert find_report(model) is None


def test_a_float_model_has_no_report() -> None:
    with pytest.raises(
        ValueError, match=r"must have been quantized by haq, got a OPTForCausalLM that was not"
    ):
        quantization_report(ARCHITECTURES["opt"]())


# --- Mixtures of experts --------------------------------------------------------------------------

FEW = "12 calibration tokens chose this expert: rounded to nearest"


def expert(index: int, matrix: str = "down_proj", **changes: object) -> LayerReport:
    layer = LayerReport(
        f"blocks.0.mlp.experts.{index}.{matrix}",
        32,
        48,
        "p4 0.6",
        "hessian",
        1000 * (index + 1),
        1e-3 * (index + 1),
        1e-4 * (index + 1),
        expert=index,
    )
    return dataclasses.replace(layer, **changes)


def rows_of(*layers: LayerReport) -> list[list[str]]:
    """The table without its head and summary, cell by cell."""
    parser = Table()
    parser.feed(report_of(list(layers))._repr_html_())
    return parser.rows[1:]


def row_of(*layers: LayerReport) -> list[str]:
    (row,) = rows_of(*layers)
    return row


def test_the_same_matrix_of_all_experts_has_one_row() -> None:
    shared = dataclasses.replace(FIRST, name="blocks.0.mlp.shared.down_proj")
    other = [expert(e, name=f"blocks.1.mlp.experts.{e}.down_proj") for e in range(3)]
    layers = [shared, *(expert(e, m) for e in range(3) for m in ("up_proj", "down_proj")), *other]
    names = ("blocks.0.mlp.experts.*.up_proj", "blocks.0.mlp.experts.*.down_proj")
    cells = ["3 x 32 x 48", "s8", "p4 0.6", "hessian", "1,000-3,000", "2.0e-03", "2.0e-04", ""]
    assert rows_of(*layers) == [
        [shared.name, "3072 x 768", "u8", *cells[2:4], "12,345", "1.2e-03", "5.6e-04", ""],
        [names[0], *cells],
        [names[1], *cells],
        ["blocks.1.mlp.experts.*.down_proj", *cells],
    ]


def test_the_table_of_experts() -> None:
    report = report_of([expert(e, asymmetric=True) for e in range(2)], num_blocks=1)
    head, line, row, empty, summary = str(report).splitlines()
    assert head == (
        "layer                                   shape  input  smoothing  rounding       tokens"
        "   before    after  note"
    )
    assert row == (
        "blocks.0.mlp.experts.*.down_proj  2 x 32 x 48  u8     p4 0.6     hessian   1,000-2,000"
        "  1.5e-03  1.5e-04"
    )
    assert (set(line), empty) == ({"-"}, "")
    assert summary == (
        "ToyForCausalLM: 2 layers with 3,072 weights are int8, calibrated on 12,345 tokens."
    )


def test_the_row_names_what_is_most_frequent_and_counts_the_rest() -> None:
    families = ["none", "p4 0.6", "p4 0.3", "p4 0.6", "none", "p4 0.6"]
    roundings = ["hessian", "nearest", *["hessian"] * 4]
    layers = [
        expert(e, smoothing=smoothing, rounding=rounding)
        for e, (smoothing, rounding) in enumerate(zip(families, roundings, strict=True))
    ]
    assert row_of(*layers)[3:5] == ["p4 0.6 (+3 other)", "hessian (+1 other)"]


def test_the_errors_of_the_row_are_means_and_the_tokens_a_range() -> None:
    layers = [
        expert(e, tokens=tokens, error_before=before, error_after=after)
        for e, (tokens, before, after) in enumerate(
            [(70, 0.5, 0.25), (1234567, 0.1, 0.05), (5, 0.3, 0.0)]
        )
    ]
    assert row_of(*layers)[5:8] == ["5-1,234,567", "3.0e-01", "1.0e-01"]


def test_notes_of_experts_name_the_experts() -> None:
    layers = [
        expert(0, note="damping raised to 0.1, diagonal floor 0"),
        expert(1, note=FEW),
        expert(2),
        expert(3, note=FEW.replace("12", "0")),
        expert(10, note="damping raised to 0.1, diagonal floor 0"),
    ]
    note = row_of(*layers)[8]
    assert note == "damping raised to 0.1, diagonal floor 0: 0, 10; starved: 1, 3"
    assert "4 of 5 layers carry a note" in str(report_of(layers))


def test_one_expert_alone_is_an_ordinary_row() -> None:
    cells = ["32 x 48", "s8", "p4 0.6", "hessian", "8,000", "8.0e-03", "8.0e-04", FEW]
    assert row_of(expert(7, note=FEW)) == ["blocks.0.mlp.experts.7.down_proj", *cells]


def test_the_number_of_the_expert_is_taken_out_and_not_that_of_the_block() -> None:
    layers = [expert(e, name=f"layers.1.experts.{e}.up_proj") for e in range(1, 3)]
    assert row_of(*layers)[0] == "layers.1.experts.*.up_proj"
    other = [expert(1, name=f"layers.{i}.experts.1.up_proj") for i in range(1, 3)]
    assert [row[0] for row in rows_of(*other)] == [layer.name for layer in other]


ROUTING = RoutingReport("blocks.0.mlp.experts", (1200, 0, 345), (1,), 0.01234)
CALM = RoutingReport("blocks.1.mlp.experts", (700, 900), (), 0.0)


def test_routers_have_a_line_each_in_the_summary() -> None:
    layers = [expert(e) for e in range(3)]
    report = report_of(BlockReport(layers, [ROUTING]), BlockReport([SECOND], [CALM]))
    assert report.routing == [ROUTING, CALM]
    lines = [
        "blocks.0.mlp.experts: 0 to 1,200 tokens for each of 3 experts; 1.23 % of tokens change "
        "experts in this block. Starved: 1.",
        "blocks.1.mlp.experts: 700 to 900 tokens for each of 2 experts; 0.00 % of tokens change "
        "experts in this block.",
    ]
    assert str(report).splitlines()[-3:-1] == lines
    assert all(f"<p>{line}</p>" in report._repr_html_() for line in lines)


def test_all_starved_experts_are_named() -> None:
    report = report_of(BlockReport([FIRST], [dataclasses.replace(ROUTING, starved=(0, 2, 11))]))
    assert str(report).endswith("in this block. Starved: 0, 2, 11.")


def test_a_dense_report_says_nothing_of_experts() -> None:
    report = report_of([FIRST], [SECOND])
    assert report.routing == []
    assert "expert" not in str(report)
    assert {layer.expert for layer in report.layers} == {None}


def test_json_gives_back_experts_and_routers() -> None:
    block = BlockReport([FIRST, *(expert(e, note=FEW) for e in range(3))], [ROUTING])
    report = report_of(block, BlockReport([SECOND], [CALM]))
    values = json.loads(json.dumps(report.to_dict()))
    assert [layer["expert"] for layer in values["blocks"][0]["layers"]] == [None, 0, 1, 2]
    assert values["blocks"][0]["routing"][0] == {
        "name": "blocks.0.mlp.experts",
        "tokens": [1200, 0, 345],
        "starved": [1],
        "changed": 0.01234,
    }
    again = QuantizationReport.from_dict(values)
    assert again == report
    # JSON has no tuples; a report that was read can be compared, and hashed, like any other.
    assert {hash(routing) for routing in again.routing} == {hash(ROUTING), hash(CALM)}
    assert str(again) == str(report)

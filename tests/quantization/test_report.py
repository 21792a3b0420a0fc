"""The report as a table, as HTML and as JSON."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest

from haq import QuantizationConfig, QuantizationReport, quantization_report
from haq.quantization.report import LayerReport, attach_report, detach_report, find_report
from tests.architectures import ARCHITECTURES

FIRST = LayerReport("blocks.0.fc1", 3072, 768, "p4 0.6", "hessian", 12345, 1.234e-3, 5.6e-4)
SECOND = LayerReport("blocks.1.out", 7, 31, "-", "nearest", 0, 0.0, 0.0, "its input < 1 & <b>")


def report_of(*blocks: list[LayerReport], num_blocks: int = 2, **others: object) -> object:
    return QuantizationReport(
        "ToyForCausalLM", QuantizationConfig(), num_blocks, 12345, list(blocks), **others
    )


def test_the_table() -> None:
    report = report_of([FIRST], [SECOND], kept_float=["lm_head", "score"])
    head, line, *rows = str(report).splitlines()
    assert head == "layer              shape  smoothing  rounding  tokens   before    after  note"
    assert rows == [
        "blocks.0.fc1  3072 x 768  p4 0.6     hessian   12,345  1.2e-03  5.6e-04",
        "blocks.1.out      7 x 31  -          nearest        0  0.0e+00  0.0e+00  "
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


def test_the_html_has_the_cells_of_the_table_and_nothing_that_a_name_brought() -> None:
    hostile = dataclasses.replace(FIRST, name="<script>alert('x')</script>")
    report = report_of([hostile], [SECOND], kept_float=["<img src=x>"])
    parser = Table()
    parser.feed(report._repr_html_())
    assert parser.open == []
    assert parser.rows == [
        ["layer", "shape", "smoothing", "rounding", "tokens", "before", "after", "note"],
        [
            "<script>alert('x')</script>",
            "3072 x 768",
            "p4 0.6",
            "hessian",
            "12,345",
            "1.2e-03",
            "5.6e-04",
            "",
        ],
        [
            "blocks.1.out",
            "7 x 31",
            "-",
            "nearest",
            "0",
            "0.0e+00",
            "0.0e+00",
            "its input < 1 & <b>",
        ],
    ]
    assert parser.tags == {"table", "thead", "tbody", "tr", "th", "td", "p"}


def test_json_gives_back_the_same_report() -> None:
    config = QuantizationConfig(smoothing="fixed", exclude=("lm_head", "*.fc1"))
    report = dataclasses.replace(
        report_of([FIRST], [SECOND], kept_float=["lm_head"]), config=config
    )
    values = json.loads(json.dumps(report.to_dict()))
    assert values["blocks"][1][0]["note"] == SECOND.note
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

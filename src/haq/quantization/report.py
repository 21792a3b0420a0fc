"""What was done to each layer, and what it cost."""

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from haq.config import QuantizationConfig

# Where the report lives on a quantized model.
_ATTRIBUTE = "haq_report"


@dataclass(frozen=True)
class LayerReport:
    """One int8 layer.

    Attributes:
        name: the module's name in the model.
        out_features: N.
        in_features: K.
        smoothing: the scale family chosen for its input ("p4 0.6", "none"), or "-" where nothing
            before the layer can absorb a scale.
        rounding: "hessian" or "nearest".
        tokens: calibration tokens that reached the layer.
        error_before: |Y' - Y|^2 / |Y|^2 of its output on real inputs, without smoothing and rounded
            to nearest.
        error_after: the same as it is now.
        note: anything that did not go as configured; empty if nothing.
    """

    name: str
    out_features: int
    in_features: int
    smoothing: str
    rounding: str
    tokens: int
    error_before: float
    error_after: float
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """Every layer that became int8, in the order of the model, and what stayed float.

    Prints as a table, is an HTML table in a notebook, and turns into plain values with `to_dict`.

    Attributes:
        model: class name of the model.
        config: what it was quantized with.
        num_blocks: how many decoder blocks the model has.
        blocks: the layers of each block that is int8 by now.
        kept_float: names of linear modules that stayed float.
        tokens: calibration tokens, padding excluded.
    """

    model: str
    config: QuantizationConfig
    num_blocks: int
    tokens: int
    blocks: list[list[LayerReport]] = field(default_factory=list)
    kept_float: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[LayerReport]:
        """All int8 layers."""
        return [layer for block in self.blocks for layer in block]

    @property
    def complete(self) -> bool:
        """Whether every block is int8; False after an interrupted call."""
        return len(self.blocks) == self.num_blocks

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizationReport":
        """The inverse of `to_dict`."""
        config = QuantizationConfig.from_dict(values["config"])
        blocks = [[LayerReport(**layer) for layer in block] for block in values["blocks"]]
        return cls(**{**values, "config": config, "blocks": blocks})

    def __str__(self) -> str:
        rows = [_HEADER, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in _LEFT_ALIGNED else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *self._summary()])

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            styled = (
                f'<{tag} style="text-align:{"left" if i in _LEFT_ALIGNED else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(styled)}</tr>"

        body = "".join(row(_cells(layer), "td") for layer in self.layers)
        summary = "".join(f"<p>{html.escape(line)}</p>" for line in self._summary())
        return f"<table><thead>{row(_HEADER, 'th')}</thead><tbody>{body}</tbody></table>{summary}"

    def _summary(self) -> Iterator[str]:
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        yield (
            f"{self.model}: {len(self.layers)} layers with {weights:,} weights are int8, "
            f"calibrated on {self.tokens:,} tokens."
        )
        if not self.complete:
            yield f"Incomplete: {len(self.blocks)} of {self.num_blocks} blocks are int8."
        if self.kept_float:
            yield f"Kept in float: {', '.join(self.kept_float)}."
        noted = sum(bool(layer.note) for layer in self.layers)
        if noted:
            yield (
                f"{noted} of {len(self.layers)} layers carry a note: something did not go as "
                "configured there."
            )


_HEADER = ("layer", "shape", "smoothing", "rounding", "tokens", "before", "after", "note")
_LEFT_ALIGNED = {0, 2, 3, 7}


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.out_features} x {layer.in_features}",
        layer.smoothing,
        layer.rounding,
        f"{layer.tokens:,}",
        f"{layer.error_before:.1e}",
        f"{layer.error_after:.1e}",
        layer.note,
    )


def attach_report(model: PreTrainedModel, report: QuantizationReport) -> None:
    """Keep the report on the model, where `quantization_report` finds it."""
    setattr(model, _ATTRIBUTE, report)


def detach_report(model: PreTrainedModel) -> None:
    """Forget a report that nothing came of."""
    if find_report(model) is not None:
        delattr(model, _ATTRIBUTE)


def find_report(model: PreTrainedModel) -> QuantizationReport | None:
    """The model's report, None if haq did not quantize it."""
    return getattr(model, _ATTRIBUTE, None)


def quantization_report(model: PreTrainedModel) -> QuantizationReport:
    """What `haq.quantize_model` did to each layer of ``model``.

    Args:
        model: a model that `haq.quantize_model` returned.

    Returns:
        The report. It prints as a table and shows as HTML in a notebook.

    Raises:
        ValueError: haq did not quantize this model.

    Examples:
        >>> quantization_report(quantized_model)  # doctest: +SKIP
        layer                          shape      smoothing  rounding  tokens   before    after
        ...
    """
    report = find_report(model)
    if report is None:
        raise ValueError(
            f"`model` must have been quantized by haq, got a {type(model).__name__} that was not. "
            "Call `haq.quantize_model(model, calibration)` first."
        )
    return report

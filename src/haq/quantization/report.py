"""What was done to each layer, and what it cost."""

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
        expert: the number of the expert that the layer belongs to; None if every token reaches it.
        asymmetric: whether its input is rounded with a zero point for each token ("u8" in the
            table) or symmetrically ("s8").
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
    expert: int | None = None
    asymmetric: bool = False


@dataclass(frozen=True)
class RoutingReport:
    """The router of one mixture-of-experts layer.

    Attributes:
        name: the experts module in the model.
        tokens: how many calibration tokens chose each expert.
        starved: experts that too few tokens chose for their Hessian to mean anything: rounded to
            nearest, with scales from what other experts read.
        changed: share of sampled tokens whose set of experts differs between the float and the int8
            block, both given what the int8 blocks before produce. What piles up over all blocks is
            in `haq.compare`.
    """

    name: str
    tokens: tuple[int, ...]
    starved: tuple[int, ...]
    changed: float


@dataclass(frozen=True)
class BlockReport:
    """What was done to one decoder block.

    Attributes:
        layers: its int8 layers, those of experts included.
        routing: one entry for each set of experts; empty in a dense block.
    """

    layers: list[LayerReport]
    routing: list[RoutingReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlockReport":
        """The inverse of `to_dict`."""
        layers = [LayerReport(**layer) for layer in values["layers"]]
        return cls(layers, [_routing_from_dict(routing) for routing in values["routing"]])


@dataclass(frozen=True)
class QuantizationReport:
    """Every layer that became int8, in the order of the model, and what stayed float.

    Prints as a table, is an HTML table in a notebook, and turns into plain values with `to_dict`.

    Attributes:
        model: class name of the model.
        config: what it was quantized with.
        num_blocks: how many decoder blocks the model has.
        blocks: each block that is int8 by now.
        with_head: whether the output head was to be int8, too.
        head: its line, once it is.
        kept_float: names of modules with matrices that stayed float.
        tokens: calibration tokens, padding excluded.
    """

    model: str
    config: QuantizationConfig
    num_blocks: int
    tokens: int
    blocks: list[BlockReport] = field(default_factory=list)
    kept_float: list[str] = field(default_factory=list)
    with_head: bool = False
    head: LayerReport | None = None

    @property
    def layers(self) -> list[LayerReport]:
        """All int8 layers, the head last."""
        head = [] if self.head is None else [self.head]
        return [layer for block in self.blocks for layer in block.layers] + head

    @property
    def routing(self) -> list[RoutingReport]:
        """All routers, in order; empty for a dense model."""
        return [routing for block in self.blocks for routing in block.routing]

    @property
    def complete(self) -> bool:
        """Whether every block and the head are int8; False after an interrupted call."""
        has_head = self.head is not None or not self.with_head
        return len(self.blocks) == self.num_blocks and has_head

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantizationReport":
        """The inverse of `to_dict`."""
        config = QuantizationConfig.from_dict(values["config"])
        blocks = [BlockReport.from_dict(block) for block in values["blocks"]]
        head = values.get("head")
        made = {"config": config, "blocks": blocks, "head": head and LayerReport(**head)}
        return cls(**{**values, **made})

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in _LEFT_ALIGNED else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", self.summary()])

    def table(self) -> list[tuple[str, ...]]:
        """What is printed, cell by cell: the names of the columns, and the rows."""
        return [_HEADER, *_rows(self.layers)]

    def summary(self) -> str:
        """What is printed below the table: how much is int8, what stayed float, how routers fared.

        Examples:
            >>> QuantizationReport("Llama", QuantizationConfig(), num_blocks=0, tokens=8).summary()
            'Llama: 0 layers with 0 weights are int8, calibrated on 8 tokens.'
        """
        return "\n".join(self._summary())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # In IPython on a terminal, in the place of all fields.

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            styled = (
                f'<{tag} style="text-align:{"left" if i in _LEFT_ALIGNED else "right"}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(styled)}</tr>"

        body = "".join(row(cells, "td") for cells in _rows(self.layers))
        summary = "".join(f"<p>{html.escape(line)}</p>" for line in self._summary())
        return f"<table><thead>{row(_HEADER, 'th')}</thead><tbody>{body}</tbody></table>{summary}"

    def _summary(self) -> Iterator[str]:
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        yield (
            f"{self.model}: {len(self.layers)} layers with {weights:,} weights are int8, "
            f"calibrated on {self.tokens:,} tokens."
        )
        if not self.complete:
            head = ", and the head is not" if self.with_head else ""
            yield f"Incomplete: {len(self.blocks)} of {self.num_blocks} blocks are int8{head}."
        if self.kept_float:
            yield f"Kept in float: {', '.join(self.kept_float)}."
        yield from (_routing_line(routing) for routing in self.routing)
        noted = sum(bool(layer.note) for layer in self.layers)
        if noted:
            yield (
                f"{noted} of {len(self.layers)} layers carry a note: something did not go as "
                "configured there."
            )


_HEADER = ("layer", "shape", "input", "smoothing", "rounding", "tokens", "before", "after", "note")
_LEFT_ALIGNED = {0, 2, 3, 4, 8}


def _rows(layers: Sequence[LayerReport]) -> Iterator[tuple[str, ...]]:
    """A row for each layer, but one for the same matrix of all experts of a block."""
    grouped: dict[str, list[LayerReport]] = {}
    for layer in layers:
        grouped.setdefault(_name_for_all_experts(layer), []).append(layer)
    for name, members in grouped.items():
        yield _cells(members[0]) if len(members) == 1 else _cells_of_experts(name, members)


def _name_for_all_experts(layer: LayerReport) -> str:
    if layer.expert is None:
        return layer.name
    before, _, matrix = layer.name.rpartition(f".{layer.expert}.")
    return f"{before}.*.{matrix}"


def _cells_of_experts(name: str, experts: Sequence[LayerReport]) -> tuple[str, ...]:
    """Ranges for numbers, counts for words; a note names the experts that have one."""
    tokens = [layer.tokens for layer in experts]
    errors = [[getattr(e, key) for e in experts] for key in ("error_before", "error_after")]
    noted: dict[str, list[str]] = {}
    for layer in experts:
        if layer.note:
            text = "starved" if "chose this expert" in layer.note else layer.note
            noted.setdefault(text, []).append(str(layer.expert))
    return (
        name,
        f"{len(experts)} x {experts[0].out_features} x {experts[0].in_features}",
        _input(experts[0]),
        _most(layer.smoothing for layer in experts),
        _most(layer.rounding for layer in experts),
        f"{min(tokens):,}-{max(tokens):,}",
        *(f"{sum(values) / len(values):.1e}" for values in errors),
        "; ".join(f"{text}: {', '.join(numbers)}" for text, numbers in noted.items()),
    )


def _input(layer: LayerReport) -> str:
    return "u8" if layer.asymmetric else "s8"


def _most(words: Iterable[str]) -> str:
    """The most frequent word, and in how many cases it was another."""
    counts = Counter(words)
    word, count = counts.most_common(1)[0]
    others = counts.total() - count
    return f"{word} (+{others} other)" if others else word


def _routing_line(routing: RoutingReport) -> str:
    starved = f" Starved: {', '.join(map(str, routing.starved))}." if routing.starved else ""
    return (
        f"{routing.name}: {min(routing.tokens):,} to {max(routing.tokens):,} tokens for each of "
        f"{len(routing.tokens)} experts; {100 * routing.changed:.2f} % of tokens change experts "
        f"in this block.{starved}"
    )


def _routing_from_dict(values: dict[str, Any]) -> RoutingReport:
    return RoutingReport(
        values["name"], tuple(values["tokens"]), tuple(values["starved"]), values["changed"]
    )


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.out_features} x {layer.in_features}",
        _input(layer),
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


def place_of_report(
    model: PreTrainedModel, report: QuantizationReport
) -> tuple[dict[str, Any], str, Any]:
    """What `attach_report` writes, and where: to be written together with something else."""
    return vars(model), _ATTRIBUTE, report


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
        layer                    shape      input  smoothing  rounding  tokens   before    after
        ...
    """
    report = find_report(model)
    if report is None:
        raise ValueError(
            f"`model` must have been quantized by haq, got a {type(model).__name__} that was not. "
            "Call `haq.quantize_model(model, calibration)` first."
        )
    return report

"""What is noted of each layer while a block is quantized, and the report made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from haq.nn import Int8Linear
from haq.quantization.experts import Errors, ExpertLayer
from haq.quantization.report import LayerReport


@dataclass
class Notes:
    """What the report will say of one linear, or of the shared input of a layer's experts."""

    smoothing: str = "-"
    rounding: str = "nearest"
    tokens: int = 0
    remarks: list[str] = field(default_factory=list)


def layer_report(
    name: str, module: Int8Linear, notes: Notes, before: float, after: float
) -> LayerReport:
    """The line of a linear that every token goes through.

    Args:
        name: in the model.
        module: in int8.
        notes: taken on the way.
        before: relative squared error of its output, rounded to nearest and not smoothed.
        after: as it is now.
    """
    unreached = ["no calibration token reached it"] if notes.tokens == 0 else []
    return LayerReport(
        name=name,
        out_features=module.out_features,
        in_features=module.in_features,
        smoothing=notes.smoothing,
        rounding=notes.rounding,
        tokens=notes.tokens,
        error_before=before,
        error_after=after,
        note="; ".join(notes.remarks + unreached),
        asymmetric=module.asymmetric,
    )


def expert_reports(
    name: str, done: Sequence[Sequence[ExpertLayer]], shared: Notes, before: Sequence[Errors]
) -> list[LayerReport]:
    """The lines of all experts of a layer, two for each.

    Args:
        name: of the experts module in the model.
        done: the two linears of each expert.
        shared: notes on the input that all of them share.
        before: errors of both outputs of each, rounded to nearest and not smoothed.
    """
    reports = []
    for index, (layers, errors) in enumerate(zip(done, before, strict=True)):
        for layer, error in zip(layers, errors, strict=True):
            first = layer.smoothing is None  # It reads what all experts share.
            remarks = [*(shared.remarks if first else ()), layer.remark]
            reports.append(
                LayerReport(
                    name=f"{name}.{index}.{layer.name}",
                    out_features=layer.module.out_features,
                    in_features=layer.module.in_features,
                    smoothing=shared.smoothing if first else str(layer.smoothing),
                    rounding=layer.rounding,
                    tokens=layer.tokens,
                    error_before=error,
                    error_after=layer.error,
                    note="; ".join(remark for remark in remarks if remark),
                    expert=index,
                    asymmetric=layer.module.asymmetric,
                )
            )
    return reports

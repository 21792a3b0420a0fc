"""The experts of one layer from float to int8, one after the other, each on its own tokens.

An expert is two linears with a gate function between them. Its inputs were caught while the layer
ran; from there on it needs nothing of the model. So one expert at a time has statistics and a
Hessian in memory (the second of Mixtral's takes 822 MB in float32), and an expert that is done
gives its float weights back before the next one begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from haq.config import QuantizationConfig
from haq.memory import give_back
from haq.model.experts import ExpertList
from haq.model.linears import bias_view, weight_view
from haq.model.producers import rescalable_rows
from haq.model.routing import RoutedInputs
from haq.nn import Int8Experts, Int8Linear
from haq.quantization.hessian import SecondMoment
from haq.quantization.layers import (
    InputErrors,
    nearest,
    output_error,
    round_together,
    update_quantized,
    zero_point_pays,
)
from haq.quantization.scales import Candidate, ChannelStatistics
from haq.quantization.smoothing import choose_scale_of_layer

# With fewer tokens than this the Hessian is that of a few texts, and rounding with it would fit
# what they happen to contain.
MIN_TOKENS = 64

Errors = tuple[float, float]
"""Relative squared errors of an expert's two outputs."""


@dataclass(frozen=True)
class ExpertLayer:
    """One int8 linear of an expert.

    Attributes:
        name: "gate_up_proj", "up_proj" or "down_proj".
        module: the layer.
        smoothing: the scale chosen for its input; None for the first, which shares its input.
        rounding: "hessian" or "nearest".
        tokens: how many calibration tokens chose the expert.
        error: relative squared error of its output.
        remark: what did not go as configured; empty if nothing.
    """

    name: str
    module: Int8Linear
    smoothing: str | None
    rounding: str
    tokens: int
    error: float
    remark: str


def nearest_errors(
    experts: ExpertList, inputs: RoutedInputs, config: QuantizationConfig
) -> list[Errors]:
    """What rounding to nearest alone does to each expert: the baseline of the report.

    Args:
        experts: in float32, not smoothed.
        inputs: a sample of what enters them.
        config: says how many tokens are looked at.
    """
    # Not a list: each of them has a sample of the inputs.
    works = (_Work(experts, index, inputs, config) for index in range(len(experts)))
    return [work.nearest_errors() for work in works]


def quantize_experts(
    experts: ExpertList,
    inputs: RoutedInputs,
    config: QuantizationConfig,
    candidates: Sequence[Candidate],
) -> tuple[Int8Experts, list[list[ExpertLayer]]]:
    """All experts of a layer in int8, and what was done to the two linears of each.

    Args:
        experts: in float32, their input already smoothed. Used up: each expert's weights are freed.
        inputs: everything that enters them in calibration.
        config: what to do.
        candidates: scales to try for what the second linears read.
    """
    smoothing, asymmetric = _smooth(experts, inputs, config, candidates)
    done = []
    for index in range(len(experts)):
        done.append(_Work(experts, index, inputs, config).finish(smoothing[index], asymmetric))
        experts[index] = nn.Identity()  # Its float weights are needed no more.
    up, down = ([layers[i].module for layers in done] for i in range(2))
    return Int8Experts(up, down, experts.activation), done


def _smooth(
    experts: ExpertList,
    inputs: RoutedInputs,
    config: QuantizationConfig,
    candidates: Sequence[Candidate],
) -> tuple[list[str], bool]:
    """Fold a scale into every expert; their names, and whether zero points pay for all of them."""
    first = experts.expert(0)
    rows = rescalable_rows(
        experts.activation, len(weight_view(first.up)), weight_view(first.down).shape[1]
    )
    smoothing, errors = [], []
    for index in range(len(experts)):
        work = _Work(experts, index, inputs, config)
        smoothing.append("-" if rows is None else work.smooth(rows, candidates))
        errors.append(work.input_errors())
    return smoothing, config.asymmetric_inputs and zero_point_pays(errors)


class _Work:
    """One expert on its way to int8."""

    def __init__(
        self, experts: ExpertList, index: int, inputs: RoutedInputs, config: QuantizationConfig
    ) -> None:
        self.activation = experts.activation
        self.expert = experts.expert(index)
        self.config = config
        self.processes = inputs.processes
        self.chunks = partial(inputs.of_expert, index)
        self.tokens = inputs.tokens_per_expert()[index]
        self.starved = self.tokens < MIN_TOKENS
        # An expert that few tokens chose is judged, and smoothed, by what the others read: tokens
        # that will choose it come from the same layer.
        limit = config.search_tokens
        self.sample = inputs.of_any(limit) if self.starved else inputs.some_of(index, limit)

    def nearest_errors(self) -> Errors:
        """What the outputs lose on the sample, each on its exact input, rounded to nearest."""
        give_back()
        up, down = self.expert.up, self.expert.down
        return (
            output_error(up, nearest(up), self.sample),
            output_error(down, nearest(down), self._middle(self.sample)),
        )

    def smooth(self, rows: Tensor, candidates: Sequence[Candidate]) -> str:
        """Fold a scale from the second linear into the rows of the first; its name."""
        give_back()
        sample = self._middle(self.sample)
        statistics = ChannelStatistics(sample.shape[1], sample.device)
        for chunk in [self.sample] if self.starved else self.chunks():
            statistics.update(self._middle(chunk))
        if not self.starved:  # The sample is the same in all processes.
            statistics.sum_over(self.processes)
        choice = choose_scale_of_layer([self.expert.down], statistics, sample, candidates)
        rows = rows.to(sample.device)
        weight_view(self.expert.up)[rows] /= choice.scale[:, None]
        bias = bias_view(self.expert.up)
        if bias is not None:
            bias[rows] /= choice.scale
        weight_view(self.expert.down).mul_(choice.scale)
        return str(choice.candidate)

    def input_errors(self) -> InputErrors:
        """What rounding the input of the second linear costs, in both ways."""
        give_back()
        errors = InputErrors([self.expert.down])
        errors.update(self._middle(self.sample))
        return errors

    def finish(self, smoothing: str, asymmetric: bool) -> list[ExpertLayer]:
        """Round both linears, the second one's input symmetrically or not."""
        up, up_rounding, up_remark = self._round(self.expert.up, lambda inputs: inputs)
        up_error = output_error(self.expert.up, up, self.sample)
        middle = self._middle(self.sample)
        self.expert.up.to("meta")  # Room for the Hessian of the other one, the largest there is.
        down, down_rounding, down_remark = self._round(
            self.expert.down, lambda inputs: self.activation(up(inputs)), asymmetric
        )
        down_error = output_error(self.expert.down, down, middle)
        name = self.expert.up_name
        return [
            ExpertLayer(name, up, None, up_rounding, self.tokens, up_error, up_remark),
            ExpertLayer(
                "down_proj", down, smoothing, down_rounding, self.tokens, down_error, down_remark
            ),
        ]

    def _middle(self, inputs: Tensor) -> Tensor:
        """What the second linear reads, in float: ``[T, I]``."""
        return self.activation(self.expert.up(inputs))

    def _round(
        self, linear: nn.Module, reads: Callable[[Tensor], Tensor], asymmetric: bool = False
    ) -> tuple[Int8Linear, str, str]:
        """An int8 linear, how it was rounded, and a remark.

        Args:
            linear: in float32.
            reads: from what enters the expert to what enters the linear, as it will in int8.
            asymmetric: how that is rounded.
        """
        if self.config.rounding == "nearest":
            return nearest(linear, asymmetric), "nearest", ""
        if self.starved:
            few = f"{self.tokens} calibration tokens chose this expert: rounded to nearest"
            return nearest(linear, asymmetric), "nearest", few
        give_back()
        weight = weight_view(linear)
        moment = SecondMoment(weight.shape[1], weight.device)
        for chunk in self.chunks():
            update_quantized(moment, reads(chunk), asymmetric)
        moment.sum_over(self.processes)
        rounded = round_together({"": linear}, moment, self.config.damping, asymmetric)
        if not rounded.modules:
            return nearest(linear, asymmetric), "nearest", rounded.remark
        return rounded.modules[""], "hessian", rounded.remark

"""The output head from float to int8, after the last block.

The steps are those of a block, but for the size of the matrix: a head has as many rows as there are
tokens in the vocabulary, and may be larger than all of a block. So it is never in float32 as a
whole, and neither are logits: both exist for some rows at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haq.config import QuantizationConfig
from haq.int8.matrix import new_integers
from haq.memory import give_back
from haq.model.blocks import BlockBatch, evenly_spread, run_block
from haq.model.folding import Producer, fold, same_function
from haq.model.heads import Place, untied
from haq.model.linears import bias_view, is_linear, weight_view
from haq.model.producers import find_producer
from haq.model.tail import Route, Tail
from haq.model.trace import observe_inputs, trace_block
from haq.nn import Int8Linear
from haq.processes import ALONE, Processes
from haq.quantization.hessian import Root, SecondMoment
from haq.quantization.layers import (
    InputErrors,
    OutputError,
    compensated,
    factored,
    nearest,
    update_quantized,
    zero_point_pays,
)
from haq.quantization.notes import Notes, layer_report
from haq.quantization.products import fast_products
from haq.quantization.report import LayerReport
from haq.quantization.scales import ChannelStatistics
from haq.quantization.smoothing import choose_scale_of_layer
from haq.quantization.work import candidates, floats

# Rows of the head that are in float32 at a time: 134 MB of a matrix with 4096 columns.
_ROWS = 8192


@dataclass(frozen=True)
class QuantizedHead:
    """An int8 head, and what else changes with it.

    Attributes:
        name: of the head in the model.
        module: the head.
        producer: new values of what its scale was folded into, by the parameter's name in the
            model; empty if it was not smoothed.
        report: its line.
    """

    name: str
    module: Int8Linear
    producer: dict[str, Tensor]
    report: LayerReport

    def places(self, route: Route) -> list[Place]:
        """What to write for the model to have it; see `haq.model.heads.write_at_once`."""
        model = route.model
        places = untied(model, self.name)
        for name, value in self.producer.items():
            owner, _, key = name.rpartition(".")
            parameters = model.get_submodule(owner)._parameters
            parameter = nn.Parameter(value, requires_grad=model.get_parameter(name).requires_grad)
            places.append((parameters, key, parameter))
        owner, _, key = self.name.rpartition(".")
        return [*places, (model.get_submodule(owner)._modules, key, self.module)]


@fast_products()
def quantize_head(
    route: Route,
    batches: Sequence[BlockBatch],
    config: QuantizationConfig,
    excluded: frozenset[str] = frozenset(),
    processes: Processes = ALONE,
) -> QuantizedHead:
    """An int8 head, calibrated on what the int8 blocks before it give.

    Args:
        route: to a float head. Its model is unchanged, whatever happens.
        batches: what `haq.model.tail.tail_batches` makes.
        config: what to do.
        excluded: names, in the model, of modules that must stay as they are.
        processes: which share the batches out, and all make the same head.

    Raises:
        RuntimeError: what the head reads is NaN or infinite.
    """
    work = _HeadWork(route, config, processes)
    sample = [batch.float() for batch in evenly_spread(batches, config.search_tokens)]
    inputs = work.inputs(sample)
    before = OutputErrors()
    for part in work.parts():
        before.add(part, nearest(part), inputs)
    producer = work.smooth(work.statistics(batches), sample, inputs, excluded)

    inputs = work.inputs(sample)
    work.choose_zero_point(inputs)
    module, after = work.round(work.root(batches), inputs)
    report = layer_report(route.head, module, work.notes, before.relative(), after.relative())
    return QuantizedHead(route.head, module, producer, report)


class OutputErrors:
    """`OutputError` of a linear whose rows are looked at part by part."""

    def __init__(self) -> None:
        self._error = self._energy = 0.0

    def add(self, part: nn.Module, module: Int8Linear, inputs: Tensor) -> None:
        """Some rows in float and in int8, on inputs ``[T, K]``."""
        give_back()
        error = OutputError(part, module)
        error.update(inputs)
        self._error += error.error
        self._energy += error.energy

    def relative(self) -> float:
        """The error as a share of the output."""
        return self._error / self._energy if self._energy > 0 else 0.0


class _Parts:
    """A linear cut into some of its rows, in float32, each made when its turn comes."""

    def __init__(self, linear: nn.Module, scale: Tensor | None) -> None:
        self._linear, self._scale = linear, scale

    def __iter__(self) -> Iterator[nn.Linear]:
        weight, bias = weight_view(self._linear), bias_view(self._linear)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            values = weight[rows].float()
            if self._scale is not None:
                values = values * self._scale
            part = nn.Linear(values.shape[1], len(values), bias is not None, device="meta")
            part.weight = nn.Parameter(values, requires_grad=False)
            if bias is not None:
                part.bias = nn.Parameter(bias[rows].float(), requires_grad=False)
            yield part


class _HeadWork:
    """A head on its way from float to int8."""

    def __init__(self, route: Route, config: QuantizationConfig, processes: Processes) -> None:
        self.route, self.config, self.processes = route, config, processes
        self.tail = Tail(route)
        self.notes = Notes()
        self.asymmetric = False
        self._scale: Tensor | None = None

    def parts(self) -> _Parts:
        """The float head, multiplied by the scale that its input was divided by."""
        return _Parts(self.route.matrix, self._scale)

    def inputs(self, sample: Sequence[BlockBatch]) -> Tensor:
        """What the head reads: float32 ``[tokens, K]``."""
        rows: list[Tensor] = []
        observe_inputs(self.tail, {"head": rows.append}, sample)
        return torch.cat(rows)

    def statistics(self, batches: Sequence[BlockBatch]) -> ChannelStatistics:
        """How large each channel of the head's input gets, over all calibration tokens."""
        weight = weight_view(self.tail.head)
        statistics = ChannelStatistics(weight.shape[1], weight.device)
        shared = floats(self.processes.share(batches))
        observe_inputs(self.tail, {"head": statistics.update}, shared)
        statistics.sum_over(self.processes)
        if not bool(statistics.maximum.isfinite().all()):
            raise RuntimeError(
                f"The input of `{self.route.head}` is NaN or infinite for a calibration batch. A "
                "float16 model that overflows can be loaded in bfloat16 or float32."
            )
        self.notes.tokens = statistics.tokens
        return statistics

    def smooth(
        self,
        statistics: ChannelStatistics,
        sample: Sequence[BlockBatch],
        inputs: Tensor,
        excluded: frozenset[str],
    ) -> dict[str, Tensor]:
        """Choose a scale for the head's input and fold it into what makes it, a norm as a rule.

        Returns:
            What that is now, by the names of the model's parameters; empty if it is as it was.
        """
        producer = find_producer(self.tail, sample[0], trace_block(self.tail, sample[0]), ("head",))
        if producer is None:
            return {}
        name = self.tail.name_of(producer.name)
        if name in excluded:
            if self.config.smoothing != "none":
                self.notes.remarks.append(f"not smoothed: `{name}` is excluded")
            return {}
        own = dict(self.route.model.get_submodule(name).named_parameters(recurse=False))
        choice = choose_scale_of_layer(
            self.parts(),
            statistics,
            inputs,
            candidates(self.config),
            rows=producer.rows,
            # A linear stays in 16 bit, and the head cannot make its rounding good.
            powers_of_two=is_linear(self.tail.get_submodule(producer.name))
            and own["weight"].dtype != torch.float32,
        )
        if not self._fold(producer, choice.scale, sample[0], own["weight"].dtype):
            self.notes.remarks.append("folding changed the model: not smoothed")
            return {}
        self.notes.smoothing = str(choice.candidate)
        folded = dict(self.tail.get_submodule(producer.name).named_parameters(recurse=False))
        return {f"{name}.{key}": folded[key].data.to(p.dtype) for key, p in own.items()}

    def _fold(
        self, producer: Producer, scale: Tensor, batch: BlockBatch, dtype: torch.dtype
    ) -> bool:
        """Fold, and take it back if the model would compute something else."""
        reference = run_block(self.tail, batch)
        folded = fold(self.tail, producer, ("head",), scale, dtype)
        same = same_function(batch.hidden, reference, run_block(self.tail, batch))
        if same:
            self._scale = folded.applied
        else:
            folded.undo()
        return same

    def choose_zero_point(self, inputs: Tensor) -> None:
        """Decide whether the input is rounded with a zero point for each token."""
        if not self.config.asymmetric_inputs:
            return

        total = InputErrors([])
        for part in self.parts():
            give_back()
            errors = InputErrors([part])
            errors.update(inputs)
            total.symmetric += errors.symmetric
            total.asymmetric += errors.asymmetric
        self.asymmetric = zero_point_pays([total])

    def root(self, batches: Sequence[BlockBatch]) -> Root | None:
        """What rounding takes of the second moments of the quantized input; None: to nearest."""
        if self.config.rounding == "nearest":
            return None
        weight = weight_view(self.tail.head)
        moment = SecondMoment(weight.shape[1], weight.device)

        def watch(inputs: Tensor) -> None:
            update_quantized(moment, inputs, self.asymmetric)

        observe_inputs(self.tail, {"head": watch}, floats(self.processes.share(batches)))
        moment.sum_over(self.processes)
        found = factored(moment, self.config.damping)
        self.notes.remarks += [found.remark] if found.remark else []
        self.notes.rounding = "nearest" if found.root is None else "hessian"
        return found.root

    def round(self, root: Root | None, inputs: Tensor) -> tuple[Int8Linear, OutputErrors]:
        """The int8 head, and its error on inputs ``[T, K]``."""
        shape = weight_view(self.route.matrix).shape
        weight = new_integers(shape, inputs.device)
        scale = torch.empty(shape[0], 1, device=inputs.device)
        errors, start = OutputErrors(), 0
        for part in self.parts():
            module = self._rounded(part, root)
            errors.add(part, module, inputs)
            rows = slice(start, start + module.out_features)
            weight[rows], scale[rows] = module.weight, module.weight_scale
            start = rows.stop
        bias = bias_view(self.route.matrix)
        if bias is not None:  # Another layer's, too, where biases are tied.
            bias = bias.to(torch.float32, copy=True)
        return Int8Linear(weight, scale, bias, asymmetric=self.asymmetric), errors

    def _rounded(self, part: nn.Module, root: Root | None) -> Int8Linear:
        if root is None:
            return nearest(part, self.asymmetric)
        return compensated(part, root, self.asymmetric)

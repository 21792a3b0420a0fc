"""One decoder block from float to int8: the method itself, step by step."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from haq.config import QuantizationConfig
from haq.int8 import grid
from haq.model.blocks import BlockBatch, run_block
from haq.model.groups import Group, find_groups
from haq.model.linears import bias_view, linears, weight_view
from haq.model.producers import fold, keep_parameters, same_function
from haq.model.trace import observe_inputs
from haq.nn import Int8Linear
from haq.quantization.hessian import SecondMoment, inverse_factor
from haq.quantization.report import LayerReport
from haq.quantization.rounding import round_with_compensation
from haq.quantization.smoothing import (
    Candidate,
    ChannelStatistics,
    choose_scale,
    search_candidates,
)


def quantize_block(
    block: nn.Module,
    batches: Sequence[BlockBatch],
    config: QuantizationConfig,
    name: str,
    excluded: frozenset[str] = frozenset(),
) -> tuple[nn.Module, list[LayerReport]]:
    """An int8 copy of a decoder block, and what was done to each of its linears.

    Args:
        block: the float block; unchanged, whatever happens.
        batches: what the block is given, for every calibration batch.
        config: what to do.
        name: the block's name in the model, for the report and for errors.
        excluded: names, in the block, of modules that must stay float.

    Returns:
        A block with the same modules, dtypes and device, but for int8 linears.

    Raises:
        RuntimeError: an activation is NaN or infinite; the message names the layer.
    """
    work = _Work(block, name, excluded, config)
    sample = _sample(batches, config.search_tokens)
    groups = find_groups(work.block, sample[0])
    with_plain_rounding = work.output_errors(work.round_to_nearest(), sample)

    statistics = work.channel_statistics(groups, batches)
    for group in groups:
        work.smooth(group, statistics[group.consumers], sample)

    modules = work.round_to_nearest()
    if config.rounding == "hessian":
        modules |= work.round_with_hessian(groups, modules, batches)
    errors = work.output_errors(modules, sample)

    for layer, module in modules.items():
        work.block.set_submodule(layer, module)
    _restore_dtypes(work.block, block)
    return work.block, work.reports(modules, with_plain_rounding, errors)


@dataclass
class _Notes:
    """What the report will say of one linear."""

    smoothing: str = "-"
    rounding: str = "nearest"
    tokens: int = 0
    remarks: list[str] = field(default_factory=list)


class _Work:
    """A float32 copy of a block on its way to int8."""

    def __init__(
        self, original: nn.Module, name: str, excluded: frozenset[str], config: QuantizationConfig
    ) -> None:
        self.original = original
        self.block = copy.deepcopy(original).float()
        self.name = name
        self.excluded = excluded
        self.config = config
        self.linears = {n: m for n, m in linears(self.block).items() if n not in excluded}
        self.notes = {n: _Notes() for n in self.linears}

    def channel_statistics(
        self, groups: Sequence[Group], batches: Sequence[BlockBatch]
    ) -> dict[tuple[str, ...], ChannelStatistics]:
        """How large each input channel of each group gets, over all calibration tokens."""
        statistics = {g.consumers: ChannelStatistics(*self._input_of(g)) for g in groups}
        watchers = {names[0]: seen.update for names, seen in statistics.items()}
        observe_inputs(self.block, watchers, _floats(batches))
        for names, seen in statistics.items():
            if not bool(seen.maximum.isfinite().all()):
                raise RuntimeError(
                    f"The input of `{self.name}.{names[0]}` is NaN or infinite for a calibration "
                    "batch. Check that the float model gives finite logits for it; a float16 model "
                    "that overflows can be loaded in bfloat16 or float32."
                )
        return statistics

    def smooth(
        self,
        group: Group,
        statistics: ChannelStatistics,
        sample: Sequence[BlockBatch],
    ) -> None:
        """Choose a scale for the group's input and fold it, or leave the group as it is."""
        targets = [name for name in group.consumers if name in self.linears]
        for name in targets:
            self.notes[name].tokens = statistics.tokens
        if not targets or group.producer is None:
            return
        kept = [n for n in (group.producer.name, *group.consumers) if n in self.excluded]
        if kept:  # A scale would have to be folded into it, and it is to stay as it is.
            for name in targets if self.config.smoothing != "none" else ():
                self.notes[name].remarks.append(f"not smoothed: `{kept[0]}` is excluded")
            return
        choice = choose_scale(
            self.block, group, targets, statistics, sample, _candidates(self.config)
        )
        touched = [self.block.get_submodule(n) for n in (group.producer.name, *group.consumers)]
        undo = keep_parameters(*touched)
        reference = run_block(self.block, sample[0])
        dtype = self.original.get_parameter(f"{group.producer.name}.weight").dtype
        fold(self.block, group.producer, group.consumers, choice.scale, dtype)
        exact = same_function(sample[0].hidden, reference, run_block(self.block, sample[0]))
        if not exact:
            undo()
        for name in targets:
            if exact:
                self.notes[name].smoothing = str(choice.candidate)
            else:
                self.notes[name].remarks.append("folding changed the block: not smoothed")

    def round_to_nearest(self) -> dict[str, Int8Linear]:
        """Every linear on the grid by itself."""
        return {
            name: Int8Linear.from_float(weight_view(linear), bias_view(linear))
            for name, linear in self.linears.items()
        }

    def round_with_hessian(
        self,
        groups: Sequence[Group],
        nearest: Mapping[str, Int8Linear],
        batches: Sequence[BlockBatch],
    ) -> dict[str, Int8Linear]:
        """Every linear that ran, rounded with the second moments of its quantized input.

        The moments are those of the block as it already runs int8, with nearest rounding: what
        reaches a layer has been through the quantized layers before it.
        """
        moments = {g.consumers: SecondMoment(*self._input_of(g)) for g in groups}
        watchers = {
            names[0]: partial(update_quantized, moment) for names, moment in moments.items()
        }
        with installed(self.block, nearest):
            observe_inputs(self.block, watchers, _floats(batches))
        rounded: dict[str, Int8Linear] = {}
        for names in list(moments):
            targets = [name for name in names if name in self.linears]
            rounded |= self._round_together(targets, moments.pop(names).mean())
        return rounded

    def _round_together(self, names: Sequence[str], hessian: Tensor) -> dict[str, Int8Linear]:
        """Linears that share an input share the factor, and are rounded as one matrix."""
        if not names:
            return {}
        factor = inverse_factor(hessian, self.config.damping)
        remark = ""
        if not bool(hessian.diagonal().any()):
            remark = "its input was zero for every token: rounded to nearest"
        elif factor is None:
            remark = "its Hessian could not be factored: rounded to nearest"
        elif factor.damping > self.config.damping:
            remark = f"damping raised to {factor.damping:g}, diagonal floor {factor.floor:g}"
        for name in names:
            self.notes[name].remarks += [remark] if remark else []
        if factor is None or not bool(hessian.diagonal().any()):
            return {}
        weights = [weight_view(self.linears[name]) for name in names]
        stacked = torch.cat(weights)
        scale = grid.row_scale(stacked)
        integers = round_with_compensation(stacked, scale, factor.upper)
        sizes = [len(weight) for weight in weights]
        parts = zip(names, integers.split(sizes), scale.split(sizes), strict=True)
        for name in names:
            self.notes[name].rounding = "hessian"
        return {
            name: Int8Linear(q.contiguous(), s, bias_view(self.linears[name]))
            for name, q, s in parts
        }

    def output_errors(
        self, modules: Mapping[str, Int8Linear], sample: Sequence[BlockBatch]
    ) -> dict[str, float]:
        """Relative squared error of each int8 module's output on what its linear reads."""
        errors = {name: _OutputError(self.linears[name], modules[name]) for name in modules}
        watchers = {name: error.update for name, error in errors.items()}
        observe_inputs(self.block, watchers, sample)
        return {name: error.relative() for name, error in errors.items()}

    def reports(
        self,
        modules: Mapping[str, Int8Linear],
        before: Mapping[str, float],
        after: Mapping[str, float],
    ) -> list[LayerReport]:
        """One line for each int8 layer."""
        for notes in self.notes.values():
            if notes.tokens == 0:
                notes.remarks.append("no calibration token reached it")
        return [
            LayerReport(
                name=f"{self.name}.{name}",
                out_features=module.out_features,
                in_features=module.in_features,
                smoothing=self.notes[name].smoothing,
                rounding=self.notes[name].rounding,
                tokens=self.notes[name].tokens,
                error_before=before[name],
                error_after=after[name],
                note="; ".join(self.notes[name].remarks),
            )
            for name, module in modules.items()
        ]

    def _input_of(self, group: Group) -> tuple[int, torch.device]:
        weight = weight_view(self.block.get_submodule(group.consumers[0]))
        return weight.shape[1], weight.device


class _OutputError:
    """|Y' - Y|^2 and |Y|^2 of one layer, summed over tokens."""

    def __init__(self, linear: nn.Module, module: Int8Linear) -> None:
        self._weight, self._bias = weight_view(linear), bias_view(linear)
        self._module = module
        self._error = self._energy = 0.0

    def update(self, inputs: Tensor) -> None:
        exact = functional.linear(inputs, self._weight, self._bias)
        self._error += float((self._module(inputs) - exact).square().sum())
        self._energy += float(exact.square().sum())

    def relative(self) -> float:
        return self._error / self._energy if self._energy > 0 else 0.0


def _candidates(config: QuantizationConfig) -> list[Candidate]:
    if config.smoothing == "search":
        return search_candidates()
    if config.smoothing == "fixed":
        return [Candidate("smoothquant", config.smoothing_strength)]
    return [Candidate("none")]


def _sample(batches: Sequence[BlockBatch], tokens: int) -> list[BlockBatch]:
    """Whole batches, evenly spread over the calibration set, with about ``tokens`` tokens."""
    mean = sum(int(batch.mask.sum()) for batch in batches) / len(batches)
    count = min(len(batches), max(1, round(tokens / mean)))
    return [batches[i * len(batches) // count].float() for i in range(count)]


def _floats(batches: Iterable[BlockBatch]) -> Iterator[BlockBatch]:
    """One at a time: a 16-bit model's hidden states in float32 would double what they take."""
    return (batch.float() for batch in batches)


def update_quantized(moment: SecondMoment, inputs: Tensor) -> None:
    """Add the tokens of ``inputs`` ``[T, K]`` as the int8 product will see them."""
    moment.update(grid.fake_quantize_rows(inputs))


def _restore_dtypes(work: nn.Module, original: nn.Module) -> None:
    """Give every parameter and buffer that is still there the dtype it has in ``original``."""
    for name, module in work.named_modules():
        # Scale and bias of an int8 layer are float32 in every model.
        if not isinstance(module, Int8Linear):
            twin = original.get_submodule(name)
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in own:
                tensor.data = tensor.data.to(getattr(twin, key).dtype)


@contextmanager
def installed(block: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The block with some modules replaced, for a while."""
    originals = {name: block.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            block.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            block.set_submodule(name, module)

"""A block on its way from float to int8: what each step of the method does to it and notes."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from haq.config import QuantizationConfig
from haq.model.blocks import BlockBatch, run_block
from haq.model.experts import dense_layers, fused_experts, input_matrices, unfuse
from haq.model.folding import fold, keep_parameters, same_in_block
from haq.model.groups import Group
from haq.model.linears import weight_view
from haq.model.routing import RoutedInputs, share_changed
from haq.model.stand_ins import installed
from haq.model.trace import Watcher, input_rows, observe_calls, observe_inputs
from haq.nn import Int8Experts, Int8Linear
from haq.processes import ALONE, Processes
from haq.quantization.experts import MIN_TOKENS, Errors, quantize_experts
from haq.quantization.hessian import SecondMoment
from haq.quantization.layers import (
    InputErrors,
    OutputError,
    nearest,
    round_together,
    update_quantized,
    zero_point_pays,
)
from haq.quantization.notes import Notes, expert_reports, layer_report
from haq.quantization.report import LayerReport, RoutingReport
from haq.quantization.sample import Sample
from haq.quantization.scales import Candidate, ChannelStatistics, search_candidates
from haq.quantization.smoothing import choose_scale

Statistics = dict[tuple[str, ...], ChannelStatistics]
"""Of the input of each group, by its consumers."""


class BlockWork:
    """A float32 copy of a block on its way to int8."""

    def __init__(
        self,
        original: nn.Module,
        name: str,
        excluded: frozenset[str],
        config: QuantizationConfig,
        processes: Processes = ALONE,
        *,
        use_up: bool = False,
    ) -> None:
        self.original = original
        self.processes = processes
        self.name = name
        self.excluded = excluded
        self.config = config
        fused = {n: m for n, m in fused_experts(original).items() if n not in excluded}
        self.experts = {n: unfuse(m, torch.float32, use_up=use_up) for n, m in fused.items()}
        # The copy gets these in the place of copies of the fused ones.
        known: dict[int, object] = {id(m): self.experts[n] for n, m in fused.items()}
        # And the configuration is the model's: what is set in that later is to reach the block.
        configs = [vars(module).get("config") for module in original.modules()]
        known |= {id(config): config for config in configs if config is not None}
        self.block = copy.deepcopy(original, known).float()
        if use_up:
            original.to("meta")  # Names and dtypes are still read.
        self.linears = {n: m for n, m in dense_layers(self.block).items() if n not in excluded}
        self.notes = {n: Notes() for n in (*self.linears, *self.experts)}
        self.asymmetric: set[str] = set()
        # What the probe gives, with all that was folded so far.
        self._output: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which the model keeps the block's matrices."""
        return next(p.dtype for p in self.original.parameters() if p.dim() >= 2)

    def check_weights_are_only_multiplied(self, groups: Sequence[Group], batch: BlockBatch) -> None:
        """Refuse linears that were not called, yet have a say in what the block computes."""
        called = {name for group in groups for name in group.consumers}
        for name, linear in self.linears.items():
            if name in called:
                continue
            reference = run_block(self.block, batch)
            restore = keep_parameters(linear)
            weight_view(linear).zero_()
            output = run_block(self.block, batch)
            restore()
            # NaN in both is no difference: it has an error of its own, which names where it starts.
            if not torch.allclose(output, reference, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"`{self.name}.{name}` must be called as a module to become int8, but its "
                    "block reads its weight by itself. Add "
                    f'"*.{name.rpartition(".")[2]}" to `exclude` to keep it float.'
                )

    def observe_sample(
        self, groups: Sequence[Group], batches: Sequence[BlockBatch], some: Sequence[BlockBatch]
    ) -> tuple[Statistics, Sample]:
        """Run the block as it is on those batches that later steps judge by.

        Args:
            groups: the block's.
            batches: everything that it is given.
            some: those among them.

        Returns:
            How large each input channel of each group gets in this process's part of them; and what
            the block computes from all of them.
        """
        statistics = {g.consumers: ChannelStatistics(*self._input_of(g)) for g in groups}
        sample = self._sample(groups, some)
        counting = {names[0]: seen.update for names, seen in statistics.items()}
        shared = {id(batch) for batch in self.processes.share(batches)}
        for batch in some:
            with sample.watching(batch.mask):
                watchers = counting if id(batch) in shared else {}
                observe_inputs(self.block, watchers, [batch.float()])
        return statistics, sample

    def observe_rest(
        self,
        modules: Mapping[str, Int8Linear],
        statistics: Statistics,
        batches: Sequence[BlockBatch],
        sample: Sample,
    ) -> None:
        """Add what the channels are like in all other batches to the statistics.

        A scale is a power of these numbers, and the sample says which: that they come from linears
        that are int8, and faster, changes nothing if those are close to float.

        Args:
            modules: int8 linears, rounded to nearest; those that are not there run in float.
            statistics: of the sample; completed, and those of all processes.
            batches: everything that the block is given.
            sample: what was seen already.
        """
        seen_already = {id(batch) for batch in sample.batches}
        rest = [b for b in self.processes.share(batches) if id(b) not in seen_already]
        watchers = {names[0]: seen.update for names, seen in statistics.items()}
        with installed(self.block, modules):
            observe_inputs(self.block, watchers, floats(rest))
        for names, seen in statistics.items():
            seen.sum_over(self.processes)
            self._check_finite(names[0], seen)

    def _sample(self, groups: Sequence[Group], some: Sequence[BlockBatch]) -> Sample:
        """Of large batches as many tokens of each linear as the search is to be judged on."""
        searched = len(candidates(self.config)) > 1
        scopes = {g.scope for g in groups if g.producer is not None and searched}
        tokens = sum(int(batch.mask.sum()) for batch in some)
        step = max(1, tokens // self.config.search_tokens)
        return Sample(self.block, some, self.linears, scopes, self.experts, step)

    def _check_finite(self, name: str, seen: ChannelStatistics) -> None:
        if not bool(seen.maximum.isfinite().all()):
            raise RuntimeError(
                f"The input of `{self.name}.{name}` is NaN or infinite for a calibration "
                "batch. Check that the float model gives finite logits for it; a float16 model "
                "that overflows can be loaded in bfloat16 or float32."
            )

    def smooth(
        self,
        group: Group,
        statistics: ChannelStatistics,
        sample: Sample,
        probe: BlockBatch,
    ) -> None:
        """Choose a scale for the group's input and fold it, or leave the group as it is.

        Args:
            group: one of the block's.
            statistics: of its input.
            sample: what the choice is judged on.
            probe: what has to come out of the block unchanged.
        """
        targets = [name for name in group.consumers if name in self.notes]
        for name in targets:
            self.notes[name].tokens = statistics.tokens
        if not targets or group.producer is None:
            return
        kept = [n for n in (group.producer.name, *group.readers) if n in self.excluded]
        if kept:  # A scale would have to be folded into it, and it is to stay as it is.
            for name in targets if self.config.smoothing != "none" else ():
                self.notes[name].remarks.append(f"not smoothed: `{kept[0]}` is excluded")
            return
        options = candidates(self.config)
        choice = choose_scale(
            self.block,
            group,
            targets,
            statistics,
            sample.calls_of(group.scope) if len(options) > 1 else [],
            options,
            # A router's weight stays in 16 bit: rounding it again would move tokens to others.
            powers_of_two=bool(group.routers) and self.dtype != torch.float32,
        )
        if self._output is None:
            self._output = run_block(self.block, probe)
        dtype = self.original.get_parameter(f"{group.producer.name}.weight").dtype
        folded = fold(self.block, group.producer, group.readers, choice.scale, dtype)
        output = run_block(self.block, probe)
        exact = same_in_block(self.block, probe.hidden, self._output, output)
        self._output = output if exact else None
        if exact:
            sample.fold(group, folded.applied)
        else:
            folded.undo()
        for name in targets:
            if exact:
                self.notes[name].smoothing = str(choice.candidate)
            else:
                self.notes[name].remarks.append("folding changed the block: not smoothed")

    def choose_zero_points(self, groups: Sequence[Group], sample: Sample) -> None:
        """Decide for each group whether its input is rounded with a zero point for each token."""
        if not self.config.asymmetric_inputs:
            return
        for _, names in self._targets(groups):
            errors = InputErrors(self.linears[n] for n in names)
            for inputs, _ in sample.of_linear(names[0]):
                errors.update(inputs)
            if zero_point_pays([errors]):
                self.asymmetric.update(names)

    def round_to_nearest(self) -> dict[str, Int8Linear]:
        """Every linear on the grid by itself."""
        return {n: nearest(linear, n in self.asymmetric) for n, linear in self.linears.items()}

    def observe_int8(
        self,
        groups: Sequence[Group],
        modules: Mapping[str, Int8Linear],
        batches: Sequence[BlockBatch],
    ) -> tuple[dict[tuple[str, ...], SecondMoment], dict[str, RoutedInputs]]:
        """Run the block with int8 linears; see what they read, and what enters the experts.

        What reaches a layer has been through the int8 layers before it, so the second moments are
        those of the block as it already runs, with nearest rounding. The linears of experts have
        theirs later, from the inputs that are kept here.

        Returns:
            Second moments by the int8 linears of each group, none unless they are needed; inputs
            by name of the experts, in the dtype of the model.
        """
        moments = {}
        if self.config.rounding == "hessian":
            moments = {t: SecondMoment(*self._input_of(g)) for g, t in self._targets(groups)}
        inputs = {
            n: RoutedInputs(len(e), self.dtype, self.processes) for n, e in self.experts.items()
        }
        watchers: dict[str, Watcher] = {n: seen.watch for n, seen in inputs.items()}
        for names, moment in moments.items():
            asymmetric = names[0] in self.asymmetric
            watch = partial(update_quantized, moment, asymmetric=asymmetric)
            watchers[names[0]] = input_rows(watch)
        if watchers:
            with installed(self.block, modules):
                observe_calls(self.block, watchers, floats(self.processes.share(batches)))
        for moment in moments.values():
            moment.sum_over(self.processes)
        return moments, inputs

    def round_with_hessian(
        self, groups: Sequence[Group], moments: dict[tuple[str, ...], SecondMoment]
    ) -> dict[str, Int8Linear]:
        """Every linear that ran, rounded with the second moments of its quantized input."""
        modules: dict[str, Int8Linear] = {}
        for names in list(moments):
            linears = {name: self.linears[name] for name in names}
            rounded = round_together(
                linears, moments.pop(names), self.config.damping, names[0] in self.asymmetric
            )
            for name in names:
                self.notes[name].remarks += [rounded.remark] if rounded.remark else []
                self.notes[name].rounding = "hessian" if rounded.modules else "nearest"
            modules |= rounded.modules
        return modules

    def finish_experts(
        self, inputs: Mapping[str, RoutedInputs], plain: Mapping[str, Sequence[Errors]]
    ) -> tuple[dict[str, Int8Experts], list[LayerReport]]:
        """All experts in int8, and their lines in the report. Their float weights are gone."""
        modules, reports = {}, []
        for name, experts in self.experts.items():
            modules[name], done = quantize_experts(
                experts, inputs[name], self.config, candidates(self.config)
            )
            reports += expert_reports(f"{self.name}.{name}", done, self.notes[name], plain[name])
        return modules, reports

    def output_errors(self, modules: Mapping[str, Int8Linear], sample: Sample) -> dict[str, float]:
        """Relative squared error of each int8 module's output on what its linear reads."""
        return {name: self._output_error(name, modules[name], sample) for name in modules}

    def _output_error(self, name: str, module: Int8Linear, sample: Sample) -> float:
        error = OutputError(self.linears[name], module)
        for inputs, exact in sample.of_linear(name):
            error.update(inputs, exact)
        return error.relative()

    def reports(
        self,
        modules: Mapping[str, Int8Linear],
        before: Mapping[str, float],
        after: Mapping[str, float],
    ) -> list[LayerReport]:
        """One line for each int8 linear."""
        return [
            layer_report(f"{self.name}.{n}", module, self.notes[n], before[n], after[n])
            for n, module in modules.items()
        ]

    def routing_reports(
        self,
        experts: Mapping[str, Int8Experts],
        inputs: Mapping[str, RoutedInputs],
        before: Mapping[str, RoutedInputs],
        sample: Iterable[BlockBatch],
    ) -> list[RoutingReport]:
        """What each router chose in calibration, and what it chooses now that the block is int8.

        Args:
            experts: by name, as they stand in the block, which is int8.
            inputs: of all of calibration.
            before: of the sample, when everything was float.
            sample: in the dtype of the model.
        """
        after = {name: RoutedInputs(m.num_experts) for name, m in experts.items()}
        if after:
            observe_calls(self.block, {n: seen.watch for n, seen in after.items()}, sample)
        reports = []
        for name, seen in inputs.items():
            tokens = seen.tokens_per_expert()
            reports.append(
                RoutingReport(
                    name=f"{self.name}.{name}",
                    tokens=tuple(tokens),
                    starved=tuple(e for e, count in enumerate(tokens) if count < MIN_TOKENS),
                    changed=share_changed(before[name].index, after[name].index),
                )
            )
        return reports

    def _targets(self, groups: Sequence[Group]) -> Iterator[tuple[Group, tuple[str, ...]]]:
        """Each group with those of its linears that will be int8, if there are any."""
        for group in groups:
            targets = tuple(name for name in group.consumers if name in self.linears)
            if targets:
                yield group, targets

    def _input_of(self, group: Group) -> tuple[int, torch.device]:
        matrix = input_matrices(self.block.get_submodule(group.consumers[0]))[0]
        return matrix.shape[1], matrix.device


def candidates(config: QuantizationConfig) -> list[Candidate]:
    """The scales to try for a group of linears."""
    if config.smoothing == "search":
        return search_candidates()
    if config.smoothing == "fixed":
        return [Candidate("smoothquant", config.smoothing_strength)]
    return [Candidate("none")]


def floats(batches: Iterable[BlockBatch]) -> Iterator[BlockBatch]:
    """One at a time: a 16-bit model's hidden states in float32 would double what they take."""
    return (batch.float() for batch in batches)

"""Which scale each group of linears gets: statistics, candidates, and the error that chooses.

An outlier channel of an input forces one large step on all other channels of its token. Dividing
channel k by s_k, and multiplying column k of every weight that reads it by s_k, moves the range
into the weight, which has a step of its own per output channel (SmoothQuant, arXiv 2211.10438,
equation 3). Which s is best depends on the layer, and a wrong one costs more than none, so s is
searched: every candidate is judged by the error it leaves in what the block computes from the
input, with both quantizers at work. The best one is then folded (`haq.model.producers.fold`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from haq.int8 import grid, matmul
from haq.memory import give_back
from haq.model.blocks import BlockBatch, first_tensor, run_block, token_rows
from haq.model.experts import Expert, ExpertList, input_matrices
from haq.model.groups import Group
from haq.model.linears import bias_view, weight_view
from haq.nn import Int8Linear
from haq.processes import Processes

# Exponents alpha of s = a^alpha / w^(1 - alpha). Below 0.3 hardly anything moves.
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# So many tokens judge all candidates, the rest of the sample the best of these.
_TOKENS_FOR_ALL, _FINALISTS = 256, 3

# A channel is not amplified beyond this fraction of the median of a * w: it is too small to matter,
# and following it would only spoil the range of the others.
_FLOOR = 0.1


class ChannelStatistics:
    """How large each input channel gets, over every calibration token.

    Attributes:
        maximum: largest magnitude, float32 ``[K]``.
        p4: 4-norm over tokens, divided by the fourth root of their number: float32 ``[K]``. Between
            the mean and the maximum: one wild token in a thousand does not decide it.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.maximum = torch.zeros(channels, device=device)
        self._fourth = torch.zeros(channels, device=device)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Add the tokens of ``inputs``, float ``[T, K]``."""
        magnitude = inputs.float().abs()
        self.maximum = torch.maximum(self.maximum, magnitude.amax(0))
        self._fourth += magnitude.square().square().sum(0)
        self.tokens += inputs.shape[0]

    def sum_over(self, processes: Processes) -> None:
        """Add what the other processes saw."""
        processes.max_(self.maximum)
        processes.sum_(self._fourth)
        self.tokens = sum(processes.counts(self.tokens, self._fourth.device))

    @property
    def p4(self) -> Tensor:
        return (self._fourth / max(self.tokens, 1)).pow(0.25)


@dataclass(frozen=True)
class Candidate:
    """One way to choose s from the statistics.

    Attributes:
        family: "none" is s = 1. The others are s = a^strength / w^(1 - strength): "p4" with the
            4-norm over tokens as a, tiny channels held up; "smoothquant" as published, with the
            maximum as a.
        strength: alpha in [0, 1].
    """

    family: Literal["none", "p4", "smoothquant"]
    strength: float = 0.0

    def __str__(self) -> str:
        return "none" if self.family == "none" else f"{self.family} {self.strength:g}"


def search_candidates() -> list[Candidate]:
    """Everything that the search tries; doing nothing comes first, and wins ties."""
    return [Candidate("none"), *(Candidate("p4", alpha) for alpha in _STRENGTHS)]


def candidate_scale(candidate: Candidate, statistics: ChannelStatistics, weight: Tensor) -> Tensor:
    """s of one candidate.

    Args:
        candidate: the rule.
        statistics: of the group's input.
        weight: float32 ``[K]``, the largest magnitude of each input channel over all consumers.

    Returns:
        float32 ``[K]``, positive, 1 in the geometric mean. Channels that are zero in every input or
        every weight get 1.
    """
    inputs = statistics.p4 if candidate.family == "p4" else statistics.maximum
    alive = (inputs > 0) & (weight > 0)
    if candidate.family == "none" or not bool(alive.any()):
        return torch.ones_like(inputs)
    if candidate.family == "p4":
        floor = _FLOOR * (inputs * weight)[alive].median()
        inputs = torch.maximum(inputs, floor / weight)
    scale = inputs**candidate.strength / weight ** (1 - candidate.strength)
    # Only ratios between channels matter; around 1 the folded parameters keep their magnitude.
    scale = scale / scale[alive].log().mean().exp()
    return torch.where(alive, scale, 1.0)


@dataclass(frozen=True)
class Choice:
    """The scale of one group, and the rule it came from.

    Attributes:
        scale: float32 ``[K]``, positive, equal for channels that share a row of the producer.
        candidate: the rule.
    """

    scale: Tensor
    candidate: Candidate


def choose_scale(
    block: nn.Module,
    group: Group,
    targets: Sequence[str],
    statistics: ChannelStatistics,
    sample: Sequence[BlockBatch],
    candidates: Sequence[Candidate],
    *,
    powers_of_two: bool = False,
) -> Choice:
    """The candidate that leaves the smallest error in what the block computes from the input.

    Args:
        block: a decoder block in float32; left as it was.
        group: one of its groups, with a producer.
        targets: those of the group's consumers that will be int8.
        statistics: of the group's input, over all calibration tokens.
        sample: some calibration batches, in float32.
        candidates: what to try; the first of equals wins. A single one is taken without a trial.
        powers_of_two: round every scale to one, so that 16-bit weights take it without rounding.

    Returns:
        The best candidate and its scale.
    """
    options = [Choice(_group_scale(c, block, group, statistics), c) for c in candidates]
    if powers_of_two:
        options = [_rounded(option) for option in options]
    if len(options) == 1:
        return options[0]
    calls = _record_scope(block, group.scope, sample)
    return _best(_Trial(block, group.scope, targets), options, calls)


def _best(trial: "_Trial", options: Sequence[Choice], calls: Sequence["_ScopeCall"]) -> Choice:
    """The choice with the smallest error; the first of equals.

    Most of them are far from it, which a part of the tokens tells.
    """
    tokens = list(accumulate(int(call.mask.sum()) for call in calls))
    some = 1 + sum(count < _TOKENS_FOR_ALL for count in tokens)
    errors = [trial.error(choice.scale, calls[:some]) for choice in options]
    if some < len(calls):
        nearest = sorted(range(len(options)), key=errors.__getitem__)[:_FINALISTS]
        options = [options[i] for i in sorted(nearest)]
        errors = [errors[i] for i in sorted(nearest)]
        for i, choice in enumerate(options):
            errors[i] += trial.error(choice.scale, calls[some:])
    return options[errors.index(min(errors))]


def _group_scale(
    candidate: Candidate, block: nn.Module, group: Group, statistics: ChannelStatistics
) -> Tensor:
    """A candidate's s with equal values wherever channels share a row of the producer."""
    assert group.producer is not None
    matrices = [m for n in group.consumers for m in input_matrices(block.get_submodule(n))]
    weight = torch.cat([grid.largest_magnitude(matrix, 0) for matrix in matrices]).amax(0)
    scale = candidate_scale(candidate, statistics, weight)
    return _largest_of_each_row(scale, group.producer.rows)


def choose_scale_of_layer(
    parts: Iterable[nn.Module],
    statistics: ChannelStatistics,
    sample: Tensor,
    candidates: Sequence[Candidate],
    *,
    rows: Tensor | None = None,
    powers_of_two: bool = False,
) -> Choice:
    """The candidate that leaves the smallest error in the output of one linear.

    Args:
        parts: linears in float32 that are together a linear with an input of its own, such as an
            expert's second one. They are gone through twice, and looked at one at a time.
        statistics: of its input, over all calibration tokens.
        sample: some of its inputs, float32 ``[T, K]``.
        candidates: what to try; the first of equals wins. A single one is taken without a trial.
        rows: of the producer, int64 ``[K]``: channels with the same one share a scale.
        powers_of_two: as for `choose_scale`.

    Returns:
        The best candidate and its scale.
    """
    largest = [grid.largest_magnitude(weight_view(part), 0)[0] for part in parts]
    weight = torch.stack(largest).amax(0)
    options = [Choice(candidate_scale(c, statistics, weight), c) for c in candidates]
    if rows is not None:
        options = [replace(o, scale=_largest_of_each_row(o.scale, rows)) for o in options]
    if powers_of_two:
        options = [_rounded(option) for option in options]
    if len(options) == 1:
        return options[0]
    errors = [0.0] * len(options)
    for part in parts:
        exact = part(sample)
        for i, option in enumerate(options):
            give_back()
            output = _SimulatedInt8(part, option.scale)(sample)
            errors[i] += float((output - exact).square().sum())
    return options[errors.index(min(errors))]


def _rounded(choice: Choice) -> Choice:
    """Every scale the nearest power of two, which 16-bit weights take without rounding."""
    return replace(choice, scale=choice.scale.log2().round().exp2())


def _largest_of_each_row(scale: Tensor, rows: Tensor) -> Tensor:
    largest = scale.new_zeros(int(rows.max()) + 1)
    return largest.scatter_reduce(0, rows, scale, "amax")[rows]


@dataclass(frozen=True)
class _ScopeCall:
    """One call of the scope in float: its arguments, its output ``[..., N]``, the token mask."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    mask: Tensor


class _Seen(Exception):
    """Ends a pass through a block where the scope has run."""


def _record_scope(block: nn.Module, scope: str, sample: Sequence[BlockBatch]) -> list[_ScopeCall]:
    """The scope's first call in each batch; what comes after it in the block does not run."""
    calls: list[_ScopeCall] = []

    def note(
        mask: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        calls.append(_ScopeCall(args, kwargs, first_tensor(output), mask))
        raise _Seen

    for batch in sample:
        module = block.get_submodule(scope)
        handle = module.register_forward_hook(partial(note, batch.mask), with_kwargs=True)
        try:
            with contextlib.suppress(_Seen):
                run_block(block, batch)
        finally:
            handle.remove()
    return calls


@dataclass(frozen=True)
class _Trial:
    """Tries scales on one group with everything else in float."""

    block: nn.Module
    scope: str
    targets: Sequence[str]

    def error(self, scale: Tensor, calls: Sequence[_ScopeCall]) -> float:
        """Squared error of the scope's output over the tokens of some calls."""
        give_back()
        with self._quantized(scale), torch.no_grad():
            scope = self.block.get_submodule(self.scope)
            return sum(
                float(
                    token_rows(first_tensor(scope(*c.args, **c.kwargs)) - c.output, c.mask)
                    .square()
                    .sum()
                )
                for c in calls
            )

    @contextlib.contextmanager
    def _quantized(self, scale: Tensor) -> Iterator[None]:
        originals = {name: self.block.get_submodule(name) for name in self.targets}
        try:
            for name, module in originals.items():
                self.block.set_submodule(name, _simulated(module, scale))
            yield
        finally:
            for name, module in originals.items():
                self.block.set_submodule(name, module)


def _simulated(module: nn.Module, scale: Tensor) -> nn.Module:
    """A linear, or the first linear of every expert, as it would be in int8."""
    if not isinstance(module, ExpertList):
        return _SimulatedInt8(module, scale)
    # One expert's simulated weight at a time: those of all would be half as large as the layer.
    experts = [
        Expert(e.up_name, _SimulatedInt8(e.up, scale, keep=False), e.down) for e in module.experts
    ]
    return ExpertList(experts, module.activation)


class _SimulatedInt8(nn.Module):
    """A linear with its input divided by s, its weight multiplied by s, and both on the grid.

    Where the int8 product is the fast one it is what runs, else float32 with the same values.

    Args:
        linear: the linear in float32.
        scale: s, float32 ``[K]``.
        keep: make the weight once; if not, in every call, and forget it.
    """

    def __init__(self, linear: nn.Module, scale: Tensor, *, keep: bool = True) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, not to be a submodule
        self._scale = scale
        self._multiply = self._made() if keep else None

    def forward(self, inputs: Tensor) -> Tensor:
        multiply = self._multiply
        if multiply is None:
            give_back()
            multiply = self._made()
        return multiply(inputs * (1 / self._scale))

    def _made(self) -> Callable[[Tensor], Tensor]:
        weight, bias = weight_view(self._linear[0]), bias_view(self._linear[0])
        if weight.is_cpu and matmul.compiles():
            return Int8Linear(*grid.quantize_matrix(weight, self._scale), bias)
        on_the_grid = grid.fake_quantize_rows_(weight * self._scale)
        return lambda x: functional.linear(grid.fake_quantize_rows_(x), on_the_grid, bias)

"""Which scale each group of linears gets: the one that leaves the smallest error.

A wrong scale costs more than none, so s is searched: every candidate is judged by the error it
leaves in what the block computes from the input, with both quantizers at work. The best one is then
folded (`haq.model.folding.fold`).
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from haq.int8 import grid
from haq.memory import give_back
from haq.model.blocks import first_tensor, token_rows
from haq.model.experts import input_matrices
from haq.model.groups import Group
from haq.model.linears import weight_view
from haq.model.stand_ins import installed
from haq.quantization.sample import ScopeCall
from haq.quantization.scales import Candidate, ChannelStatistics, Choice, choices
from haq.quantization.simulation import Projected, Simulated, simulated

# So many tokens judge all candidates, the rest of the sample the best of these.
_TOKENS_FOR_ALL, _FINALISTS = 256, 3

# So many random directions tell the squared length of an error, summed over hundreds of tokens, to
# a percent or so (Johnson and Lindenstrauss, 1984), of an output at least so many times as wide.
_DIRECTIONS, _WORTH_DIRECTIONS = 256, 4


def choose_scale(
    block: nn.Module,
    group: Group,
    targets: Sequence[str],
    statistics: ChannelStatistics,
    calls: Sequence[ScopeCall],
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
        calls: of the group's scope, in float32, for some calibration tokens.
        candidates: what to try; the first of equals wins. A single one is taken without a trial.
        powers_of_two: round every scale to one, so that 16-bit weights take it without rounding.

    Returns:
        The best candidate and its scale.
    """
    assert group.producer is not None
    matrices = [m for n in group.consumers for m in input_matrices(block.get_submodule(n))]
    weight = torch.cat([grid.largest_magnitude(matrix, 0) for matrix in matrices]).amax(0)
    options = choices(
        candidates, statistics, weight, rows=group.producer.rows, powers_of_two=powers_of_two
    )
    if len(options) == 1:
        return options[0]
    return _best(_Trial(block, group.scope, targets, calls), options, calls)


def _best(trial: "_Trial", options: Sequence[Choice], calls: Sequence[ScopeCall]) -> Choice:
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
    options = choices(candidates, statistics, weight, rows=rows, powers_of_two=powers_of_two)
    if len(options) == 1:
        return options[0]
    errors = [0.0] * len(options)
    for part in parts:
        give_back()
        exact, stand_in = part(sample), Simulated(part)
        for i, option in enumerate(options):
            stand_in.take(option.scale)
            errors[i] += float(stand_in(sample).sub_(exact).square_().sum())
    return options[errors.index(min(errors))]


class _Trial:
    """Tries scales on one group with everything else in float.

    Where a large linear is the last that the scope computes (o_proj, down_proj), it gives the
    lengths of errors in some directions only, which takes a fraction of the time.
    """

    def __init__(
        self, block: nn.Module, scope: str, targets: Sequence[str], calls: Sequence[ScopeCall]
    ) -> None:
        self._block, self._scope = block, scope
        self._stand_ins: dict[str, nn.Module] = {
            name: simulated(block.get_submodule(name)) for name in targets
        }
        self._directions: Tensor | None = None
        tails = {call.tail for call in calls}.difference(targets)
        if len(tails) == 1 and "" not in tails:
            (tail,) = tails
            linear = block.get_submodule(tail)
            weight = weight_view(linear)
            if len(weight) >= _WORTH_DIRECTIONS * _DIRECTIONS:
                self._directions = _random_directions(len(weight)).to(weight)
                self._stand_ins[tail] = Projected(linear, self._directions)

    def error(self, scale: Tensor, calls: Sequence[ScopeCall]) -> float:
        """Squared error of the scope's output over the tokens of some calls."""
        with self._quantized(scale), torch.no_grad():
            return sum(self._error(call) for call in calls)

    def _error(self, call: ScopeCall) -> float:
        output = first_tensor(self._block.get_submodule(self._scope)(*call.args, **call.kwargs))
        exact = call.output if self._directions is None else call.output @ self._directions.T
        return float(token_rows(output - exact, call.mask).square_().sum())

    @contextlib.contextmanager
    def _quantized(self, scale: Tensor) -> Iterator[None]:
        for stand_in in self._stand_ins.values():
            for part in stand_in.modules():
                if isinstance(part, Simulated):
                    part.take(scale)
        with installed(self._block, self._stand_ins):
            yield


def _random_directions(size: int) -> Tensor:
    """Float32 ``[D, size]``: on average the squared length of what it maps stays as it was."""
    generator = torch.Generator().manual_seed(size)
    directions = torch.randn(_DIRECTIONS, size, generator=generator, dtype=torch.float32)
    return directions.div_(_DIRECTIONS**0.5)

"""What can absorb the inverse of a scale: modules whose output channels can be rescaled exactly.

Smoothing divides the input channels of some linears by ``s`` and multiplies their weights by it.
For nothing to change, and nothing to be computed at run time, what *produces* the input must absorb
``1/s`` exactly. Which modules can is a property of what the block computes between the two, and it
is measured here, not looked up in a table of architectures:

1. A candidate (a norm, or a linear that ran earlier) has its output channels multiplied by known
   random factors. If every channel of the input in question comes back multiplied by the factor of
   the row that would feed it, for every token, the path between is exactly rescalable. The factors
   are powers of two, which no sum of floats rounds: channels that hardly ever fire tell as well.
2. Other random factors, all different, are then folded, ``f`` into the candidate and ``1/f`` into
   the consumers, and the block must compute what it did before. A norm whose output also feeds the
   residual stream fails.

This finds norm -> {q, k, v}, v -> o (with grouped-query attention one factor per shared row),
up -> down through a gated activation, fc1 -> fc2 through a ReLU but not through a GELU, the value
rows inside a fused qkv projection and the up rows inside a fused gate_up projection; and it finds
nothing where there is nothing, which leaves the linears unsmoothed and still exact.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haq.model.blocks import BlockBatch, run_block, token_rows
from haq.model.linears import bias_view, is_linear, weight_of, weight_view
from haq.model.trace import Event, observe_inputs

# A channel must follow its factor to this relative precision, over all tokens. Only 1 + w of some
# norms is rounded at all, to 1e-7; a GELU instead of a ReLU is off by more than 1e-2.
_RATIO_TOLERANCE = 1e-5

# Folding random factors of up to two may change the block's output by this fraction of what the
# block adds to its input, and of its output (the rounding of a large residual stream).
_FOLD_TOLERANCE = 1e-3
_ROUNDING_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Producer:
    """A module whose output channels can be rescaled, and how they reach the group.

    Attributes:
        name: the module in its block.
        rows: int64 ``[K]``; row ``rows[k]`` of the producer feeds input channel ``k`` of the
            consumers. Channels with the same row must share one scale.
        offset: the producer multiplies by ``offset + weight``: 1 for Gemma's norms, else 0.
    """

    name: str
    rows: Tensor
    offset: float = 0.0


def find_producer(
    block: nn.Module,
    batch: BlockBatch,
    trace: Sequence[Event],
    consumers: tuple[str, ...],
) -> Producer | None:
    """What can absorb the inverse scale of the tensor that ``consumers`` read; None if nothing can.

    Args:
        block: a decoder block in float32; left as it was.
        batch: what the block is given for one real batch, in float32.
        trace: what `trace_block` saw with these arguments.
        consumers: linears of the block that read one tensor.
    """
    return _Search(block, batch, trace, consumers).find()


def fold(
    block: nn.Module,
    producer: Producer,
    consumers: tuple[str, ...],
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Divide the consumers' input channels by ``scale`` and multiply their weights, in place.

    The producer's parameters will be stored in ``dtype``. A norm's weight is rounded to it here and
    the consumers take the factor that was really applied, so that folding into a 16-bit norm is as
    exact as into a 32-bit one.

    Args:
        block: a decoder block in float32.
        producer: what makes their input.
        consumers: linears of the block that read one tensor.
        scale: float32 ``[K]``, positive, equal where ``producer.rows`` is.
        dtype: the dtype in which the model keeps the producer.

    Returns:
        float32 ``[K]``: the scale that was really applied.
    """
    module = block.get_submodule(producer.name)
    num_rows = _num_rows(module)
    factors = torch.ones(num_rows, device=scale.device)
    factors[producer.rows] = 1 / scale
    keep = None if is_linear(module) else dtype
    applied = 1 / _scale_rows(module, factors, producer.offset, keep)[producer.rows]
    for name in consumers:
        weight_view(block.get_submodule(name)).mul_(applied)
    return applied


@dataclass(frozen=True)
class _Search:
    block: nn.Module
    batch: BlockBatch
    trace: Sequence[Event]
    consumers: tuple[str, ...]

    def find(self) -> Producer | None:
        for candidate in self._candidates():
            for producer in self._probe(candidate):
                if self._folds_exactly(producer):
                    return producer
        return None

    @property
    def _input(self) -> Tensor:
        return self._first_event().input

    def _first_event(self) -> Event:
        return next(event for event in self.trace if event.name == self.consumers[0])

    def _candidates(self) -> Iterator["_Candidate"]:
        """Modules that ran before, the nearest first."""
        before = self.trace[: self.trace.index(self._first_event())]
        channels = self._input.shape[-1]
        for event in reversed(before):
            if is_linear(event.module):
                for rows in _row_layouts(_num_rows(event.module), channels):
                    yield _Candidate(event.name, rows, 0.0)
            elif _num_rows(event.module) == channels:
                rows = torch.arange(channels, device=self.batch.hidden.device)
                yield _Candidate(event.name, rows, 0.0)
                yield _Candidate(event.name, rows, 1.0)

    def _probe(self, candidate: "_Candidate") -> Iterator[Producer]:
        """Multiply the candidate's rows by factors and look for them in the input."""
        module = self.block.get_submodule(candidate.name)
        rows = candidate.rows.to(self.batch.hidden.device)
        factors = torch.ones(_num_rows(module), device=self.batch.hidden.device)
        factors[rows] = _powers_of_two(len(rows), self.batch.hidden.device)
        after: list[Tensor] = []
        restore = keep_parameters(module)
        try:
            keep = None if is_linear(module) else torch.float32
            applied = _scale_rows(module, factors, candidate.offset, keep)
            observe_inputs(self.block, {self.consumers[0]: after.append}, [self.batch])
        finally:
            restore()
        before = token_rows(self._input, self.batch.mask)
        for row_of_channel in _channel_maps(rows, before.shape[1]):
            if _follows(before, after[0], applied[row_of_channel]):
                yield Producer(candidate.name, row_of_channel, candidate.offset)

    def _folds_exactly(self, producer: Producer) -> bool:
        """Fold random factors; the block must still compute the same."""
        reference = run_block(self.block, self.batch)
        module = self.block.get_submodule(producer.name)
        touched = [module, *(self.block.get_submodule(name) for name in self.consumers)]
        restore = keep_parameters(*touched)
        try:
            scale = _distinct_factors(_num_rows(module), self.batch.hidden.device)[producer.rows]
            fold(self.block, producer, self.consumers, scale, torch.float32)
            folded = run_block(self.block, self.batch)
        finally:
            restore()
        return same_function(self.batch.hidden, reference, folded)


@dataclass(frozen=True)
class _Candidate:
    name: str
    rows: Tensor
    offset: float


def same_function(hidden: Tensor, reference: Tensor, output: Tensor) -> bool:
    """Whether two outputs ``[B, T, D]`` of a block for ``hidden`` differ by rounding only.

    Measured against what the block adds to its input, since a large residual stream would hide an
    error in it.
    """
    difference = torch.linalg.vector_norm(output - reference)
    added = torch.linalg.vector_norm(reference - hidden)
    size = torch.linalg.vector_norm(reference)
    return bool(difference <= _FOLD_TOLERANCE * added + _ROUNDING_TOLERANCE * size)


def _row_layouts(num_rows: int, channels: int) -> Iterator[Tensor]:
    """Which rows of a linear's output may be what the group reads, most likely first.

    All of them; or, in a fused projection, the last or first part of the output (values after
    queries and keys; up after or before gate), the odd or even rows (interleaved gate and up), or
    the values inside each head of an interleaved qkv projection. With C channels read, F rows and
    grouped-query attention, queries and two blocks of r rows make F = C + 2 r.
    """
    every = torch.arange(num_rows)
    if num_rows <= channels:
        if channels % num_rows == 0:
            yield every
        return
    if num_rows == 2 * channels:
        yield every[channels:]
        yield every[:channels]
        yield every[1::2]
        yield every[::2]
    values, remainder = divmod(num_rows - channels, 2)
    if remainder or values == 0 or channels % values:
        return
    yield every[-values:]
    repeats = channels // values
    for head in range(values, 0, -1):
        if values % head == 0:
            yield every[(every // head) % (repeats + 2) == repeats + 1]


def _channel_maps(rows: Tensor, channels: int) -> Iterator[Tensor]:
    """Which of ``rows`` may feed which channel: int64 ``[K]``.

    One each, in order. Where attention heads share values there are fewer rows than channels: each
    head of them, of a width not known here, is repeated.
    """
    repeats = channels // len(rows)
    for width in range(len(rows), 0, -1):
        if len(rows) % width == 0:
            yield rows.view(-1, 1, width).expand(-1, repeats, -1).reshape(-1)
        if repeats == 1:
            return


def _powers_of_two(count: int, device: torch.device) -> Tensor:
    """Factors between 1/16 and 16, none of them 1, in a fixed random order: ``[count]``."""
    generator = torch.Generator().manual_seed(count)
    exponents = torch.tensor([-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0])
    order = torch.randperm(count, generator=generator)
    return (2 ** exponents[order % len(exponents)]).to(device)


def _distinct_factors(count: int, device: torch.device) -> Tensor:
    """Factors in [1/2, 2], all different, in a fixed random order: float32 ``[count]``."""
    generator = torch.Generator().manual_seed(count)
    spread = torch.linspace(-1, 1, count) if count > 1 else torch.ones(1)
    return (2**spread)[torch.randperm(count, generator=generator)].to(device)


def _follows(before: Tensor, after: Tensor, factors: Tensor) -> bool:
    """Whether ``after`` ``[T, K]`` is ``before`` with channel k multiplied by ``factors[k]``.

    A channel that is zero for every token (a dead ReLU) agrees with any factor; if all are, nothing
    is known.
    """
    energy = before.square().sum(0)
    error = (after - before * factors).square().sum(0)
    followed = error <= (_RATIO_TOLERANCE * factors).square() * energy
    return bool(followed.all() & (energy > 0).any())


def _num_rows(module: nn.Module) -> int:
    return len(_rows_view(module))


def _rows_view(module: nn.Module) -> Tensor:
    """The weight with its output channels first: ``[N, K]`` of a linear, ``[N]`` of a norm."""
    return weight_view(module) if is_linear(module) else weight_of(module)


def _scale_rows(
    module: nn.Module, factors: Tensor, offset: float, dtype: torch.dtype | None
) -> Tensor:
    """Multiply output row n by ``factors[n]`` in place; return the factors really applied.

    With ``dtype`` the new weight is rounded to it, and the factor applied is the ratio of the new
    weight to the old. Where a weight is zero there is no ratio, and nothing to rescale but a bias.
    """
    weight = _rows_view(module)
    applied = factors
    if dtype is None:
        by_row = factors[:, None] if weight.dim() == 2 else factors
        weight.copy_((offset + weight) * by_row - offset)
    else:
        multiplier = offset + weight
        weight.copy_(((multiplier * factors) - offset).to(dtype))
        rounded = offset + weight
        exact = (multiplier != 0) & (rounded != 0)
        applied = torch.where(exact, rounded / multiplier, factors)
    bias = bias_view(module)
    if bias is not None:
        bias.mul_(applied)
    return applied


def keep_parameters(*modules: nn.Module) -> Callable[[], None]:
    """Remember the modules' own parameters; calling what is returned puts them back."""
    kept = [
        (parameter, parameter.data.clone())
        for module in modules
        for parameter in module.parameters(recurse=False)
    ]

    def restore() -> None:
        for parameter, values in kept:
            parameter.data.copy_(values)

    return restore

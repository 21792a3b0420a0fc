"""What can absorb the inverse of a scale: modules whose output channels can be rescaled exactly.

Smoothing divides the input channels of some linears by ``s`` and multiplies their weights by it.
For nothing to change, and nothing to be computed at run time, what *produces* the input must absorb
``1/s`` exactly. Which modules can is a property of what the block computes between the two, and it
is measured here, not looked up in a table of architectures:

1. A candidate (a norm, or a linear that ran earlier) has its output channels multiplied by known
   random factors. If every channel of the input in question comes back multiplied by the factor of
   the row that would feed it, for every token, the path between is exactly rescalable. The factors
   are powers of two, which no sum of floats rounds: channels that hardly ever fire tell as well.
2. Such factors are then folded, ``f`` into the candidate and ``1/f`` into all that reads it, and
   the block must compute what it did before. A norm whose output also feeds the residual stream
   fails.

This finds norm -> {q, k, v}, v -> o (with grouped-query attention one factor per shared row),
up -> down through a gated activation, fc1 -> fc2 through a ReLU but not through a GELU, the value
rows inside a fused qkv projection and the up rows inside a fused gate_up projection; and it finds
nothing where there is nothing, which leaves the linears unsmoothed and still exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haq.model.blocks import BlockBatch, run_block, token_rows
from haq.model.experts import is_experts
from haq.model.folding import (
    Producer,
    fold,
    num_rows,
    same_function,
    scale_rows,
)
from haq.model.linears import is_linear
from haq.model.trace import Event, Trace, input_of

# A channel must follow its factor to this relative precision, over all tokens. Only 1 + w of some
# norms is rounded at all, to 1e-7; a GELU instead of a ReLU is off by more than 1e-2.
_RATIO_TOLERANCE = 1e-5


def find_producer(
    block: nn.Module,
    batch: BlockBatch,
    trace: Trace,
    consumers: tuple[str, ...],
    routers: tuple[str, ...] = (),
) -> Producer | None:
    """What can absorb the inverse scale of the tensor that ``consumers`` read; None if nothing can.

    Args:
        block: a decoder block in float32; left as it was.
        batch: what the block is given for one real batch, in float32.
        trace: what `trace_block` saw with these arguments.
        consumers: linears and experts of the block that read one tensor.
        routers: float modules that read it, too.
    """
    return _Search(block, batch, trace, consumers, routers).find()


def rescalable_rows(
    activation: Callable[[Tensor], Tensor], rows: int, channels: int
) -> Tensor | None:
    """Which of an expert's first rows can absorb scales of what its second matrix reads.

    Asked of the function between the two, which is the same for all experts of a layer and known
    without any token: the up rows, wherever they stand, if the output is proportional to them.

    Args:
        activation: from ``[T, rows]`` to ``[T, channels]``.
        rows: of the first matrix, gate included.
        channels: that the second matrix reads.

    Returns:
        int64 ``[channels]``, or None if there are no such rows.

    Examples:
        >>> def silu_gate(x):
        ...     gate, up = x.chunk(2, dim=-1)
        ...     return torch.nn.functional.silu(gate) * up
        >>> rescalable_rows(silu_gate, rows=6, channels=3)
        tensor([3, 4, 5])
        >>> rescalable_rows(torch.nn.functional.gelu, rows=3, channels=3) is None
        True
    """
    generator = torch.Generator().manual_seed(rows)
    # Large values too: some families cut them off.
    inputs = 8 * torch.randn(64, rows, generator=generator)
    before = activation(inputs)
    for layout in _row_layouts(rows, channels):
        factors = torch.ones(rows)
        factors[layout] = _powers_of_two(len(layout), inputs.device)
        if len(layout) == channels and _follows(
            before, activation(inputs * factors), factors[layout]
        ):
            return layout
    return None


@dataclass(frozen=True)
class _Search:
    block: nn.Module
    batch: BlockBatch
    trace: Trace
    consumers: tuple[str, ...]
    routers: tuple[str, ...]

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
                for rows in _row_layouts(num_rows(event.module), channels):
                    yield _Candidate(event.name, rows, 0.0)
            elif not is_experts(event.module) and num_rows(event.module) == channels:
                rows = torch.arange(channels, device=self.batch.hidden.device)
                yield _Candidate(event.name, rows, 0.0)
                yield _Candidate(event.name, rows, 1.0)

    def _probe(self, candidate: "_Candidate") -> Iterator[Producer]:
        """Multiply the candidate's rows by factors and look for them in the input."""
        module = self.block.get_submodule(candidate.name)
        rows = candidate.rows.to(self.batch.hidden.device)
        factors = torch.ones(num_rows(module), device=self.batch.hidden.device)
        factors[rows] = _powers_of_two(len(rows), self.batch.hidden.device)
        keep = None if is_linear(module) else torch.float32
        scaled = scale_rows(module, factors, candidate.offset, keep)
        try:
            after = input_of(self.block, self.consumers[0], self.batch)
        finally:
            scaled.undo()
        before = token_rows(self._input, self.batch.mask)
        for row_of_channel in _channel_maps(rows, before.shape[1]):
            if _follows(before, after, scaled.applied[row_of_channel]):
                yield Producer(candidate.name, row_of_channel, candidate.offset)

    def _folds_exactly(self, producer: Producer) -> bool:
        """Fold random factors; the block must still compute the same."""
        module = self.block.get_submodule(producer.name)
        # Powers of two again: no choice of experts can turn by rounding.
        scale = _powers_of_two(num_rows(module), self.batch.hidden.device)[producer.rows]
        folded = fold(self.block, producer, self.consumers + self.routers, scale, torch.float32)
        try:
            output = run_block(self.block, self.batch)
        finally:
            folded.undo()
        return same_function(self.batch.hidden, self.trace.output, output)


@dataclass(frozen=True)
class _Candidate:
    name: str
    rows: Tensor
    offset: float


def _row_layouts(count: int, channels: int) -> Iterator[Tensor]:
    """Which rows of a linear's output may be what the group reads, most likely first.

    All of them; or, in a fused projection, the last or first part of the output (values after
    queries and keys; up after or before gate), the odd or even rows (interleaved gate and up), the
    values inside each head of an interleaved qkv projection, or the last rows of each head (values
    after keys). With C channels read, F rows and grouped-query attention, queries and two blocks of
    r rows make F = C + 2 r.
    """
    every = torch.arange(count)
    if count <= channels:
        if channels % count == 0:
            yield every
        return
    if count == 2 * channels:
        yield every[channels:]
        yield every[:channels]
        yield every[1::2]
        yield every[::2]
    values, remainder = divmod(count - channels, 2)
    if not remainder and values and channels % values == 0:
        yield every[-values:]
        repeats = channels // values
        for head in range(values, 0, -1):
            if values % head == 0:
                yield every[(every // head) % (repeats + 2) == repeats + 1]
    for heads in range(2, channels):
        if count % heads == channels % heads == 0:
            width = count // heads
            yield every[every % width >= width - channels // heads]


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


def _follows(before: Tensor, after: Tensor, factors: Tensor) -> bool:
    """Whether ``after`` ``[T, K]`` is ``before`` with channel k multiplied by ``factors[k]``.

    A channel that is zero for every token (a dead ReLU) agrees with any factor; if all are, nothing
    is known.
    """
    energy = before.square().sum(0)
    error = (after - before * factors).square().sum(0)
    followed = error <= (_RATIO_TOLERANCE * factors).square() * energy
    return bool(followed.all() & (energy > 0).any())

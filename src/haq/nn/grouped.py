"""What the experts of a layer compute, by two products in all where Triton's kernels run.

There is no launch for each expert. Where the router's choice is only on the device, it stays there:
nothing waits for it, and a CUDA graph can be replayed with another one.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from haq.nn.rows import Activation
from haq.nn.stack import Stack

if TYPE_CHECKING:  # Only where Triton's kernels run: nobody else is to wait for their import.
    from haq.int8.kernels import Int8Tokens

Stacks = tuple[Stack, Stack]
"""The first matrices of some experts, and the second ones."""

# What is between the products of a long prompt, float32 `[R, 2 I]`, may take so much memory at a
# time, and what is made of it as much again.
_MIDDLE_BYTES = 512 * 2**20


def routed_sum(
    stacks: Stacks,
    activation: Activation,
    tokens: "Int8Tokens",
    index: Tensor,
    gates: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The weighted sum of each token's experts. Neither waits for the device nor copies from it.

    Args:
        stacks: of E experts.
        activation: from float32 ``[R, 2 I]`` (or ``[R, I]``) to ``[R, I]``.
        tokens: ``[T, D]``.
        index: int64 ``[T, A]``. Whatever is not in [0, E) is no expert.
        gates: float ``[T, A]``.
        dtype: of the result.

    Returns:
        ``[T, D]``.
    """
    bytes_per_token = 4 * stacks[0].weight.shape[1] * index.shape[1]
    most = max(1, _MIDDLE_BYTES // bytes_per_token)
    if len(index) <= most:
        return _routed_sum(stacks, activation, tokens, index, gates, dtype)
    out = torch.empty(tokens.integers.shape, dtype=dtype, device=index.device)
    for start in range(0, len(index), most):
        here = slice(start, start + most)
        out[here] = _routed_sum(stacks, activation, tokens[here], index[here], gates[here], dtype)
    return out


def _routed_sum(
    stacks: Stacks,
    activation: Activation,
    tokens: "Int8Tokens",
    index: Tensor,
    gates: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    from haq.int8 import kernels

    up, down = stacks
    number = len(up.layers)
    tiles, places = kernels.expert_tiles(index, number)
    middle = up.product(tokens, tiles, places=places, per_token=index.shape[1])  # [T A, 2 I]
    rounded = kernels.quantize_tokens(activation(middle), down.layers[0].asymmetric)
    del middle
    rows = down.product(rounded, tiles, places=places, gates=gates.reshape(-1))  # [T A, D]
    return kernels.add_experts(rows, index, number, dtype)


# Rows of chosen experts that go through both products together.
_MOST_ROWS = 1024

Member = tuple[Stacks, int]
"""An expert: the stacks that it is in, and its place there."""


def member_rows(
    experts: Sequence[Member],
    counts: Sequence[int],
    activation: Activation,
    hidden: "Int8Tokens",
    tokens: Tensor,
) -> Tensor:
    """What experts make of the tokens that chose them: two launches for those of one memory.

    Args:
        experts: in one or several pairs of stacks.
        counts: how many rows each has; together S.
        activation: from float32 ``[R, 2 I]`` (or ``[R, I]``) to ``[R, I]``.
        hidden: ``[T, D]``.
        tokens: int64 ``[S]``, the token of each row, sorted by expert.

    Returns:
        float32 ``[S, D]``.
    """
    from haq.int8 import kernels

    (up, down), place = experts[0]
    device = hidden.scale.device
    outputs = torch.empty(len(tokens), down.weight.shape[1], dtype=torch.float32, device=device)
    for here, parts in _spans(experts, counts):
        of_stacks = [
            (stacks, kernels.row_tiles(groups, device)) for stacks, groups in _by_stacks(parts)
        ]
        rows = here.stop - here.start
        middle = torch.empty(rows, up.weight.shape[1], dtype=torch.float32, device=device)
        for (first, _), tiles in of_stacks:
            first.product(hidden, tiles, index=tokens[here], out=middle)
        rounded = kernels.quantize_tokens(activation(middle), down.layers[place].asymmetric)
        for (_, second), tiles in of_stacks:
            second.product(rounded, tiles, out=outputs[here])
    return outputs


Part = tuple[Member, int, int]
"""An expert, its first row and how many it has."""


def _spans(
    experts: Sequence[Member], counts: Sequence[int]
) -> Iterator[tuple[slice, Sequence[Part]]]:
    """Rows that go together, and the parts of them, whose rows count from there."""
    begin = end = 0
    parts: list[Part] = []
    for expert, count in zip(experts, counts, strict=True):
        while count:
            taken = min(count, begin + _MOST_ROWS - end)
            parts.append((expert, end - begin, taken))
            end, count = end + taken, count - taken
            if end == begin + _MOST_ROWS:
                yield slice(begin, end), parts
                begin, parts = end, []
    if parts:
        yield slice(begin, end), parts


def _by_stacks(parts: Sequence[Part]) -> list[tuple[Stacks, list[tuple[int, int, int]]]]:
    """The parts that are in one memory: place, first row, number of rows of each."""
    found: dict[int, tuple[Stacks, list[tuple[int, int, int]]]] = {}
    for (stacks, place), first, count in parts:
        found.setdefault(id(stacks[0]), (stacks, []))[1].append((place, first, count))
    return list(found.values())

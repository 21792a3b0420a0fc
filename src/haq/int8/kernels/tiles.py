# mypy: disable-error-code="untyped-decorator"
"""Which rows are multiplied by which slot? As a table that a product reads on the device.

`row_tiles` makes it of what the CPU knows. `expert_tiles` makes it of a router's choice on the
device, in one launch: nobody waits for it, and a CUDA graph makes a new one in every replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8.kernels.checks import check_groups, check_index
from haq.int8.kernels.plans import launch

HEIGHTS = (16, 64, 128)
"""Rows of a tile: the smallest that holds the mean number of rows of a slot, or the last."""

# Comparisons of a row's expert with an expert that one program makes at once.
_COMPARISONS = 8192


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which rows are multiplied by which slot, cut into blocks.

    Attributes:
        table: int32 ``[L, 3]`` on the device: slot, first row and number of rows of each tile.
        block_m: the largest number of rows of a tile.
        rows: the number of rows that there must be at least: the last row of a tile, plus one.
        slots: the number of slots that there must be at least.
        covered: how many rows are in a tile; None if the device alone knows.
    """

    table: Tensor
    block_m: int
    rows: int
    slots: int
    covered: int | None


def height_for(rows: int, groups: int) -> int:
    """Rows of a tile for so many rows of so many slots.

    Examples:
        >>> [height_for(rows, 8) for rows in (2, 128, 129, 4096)]
        [16, 16, 64, 128]
    """
    mean = rows / max(1, groups)
    return next((height for height in HEIGHTS if mean <= height), HEIGHTS[-1])


def row_tiles(
    groups: Sequence[tuple[int, int, int]], device: torch.device | str, block_m: int | None = None
) -> Tiles:
    """Cut the rows of each slot into tiles. The device is not waited for.

    Args:
        groups: of each: slot, first row, number of rows. Empty ones are skipped; no row may be in
            two of them.
        device: where the product will run.
        block_m: rows of a tile, 16, 64 or 128; chosen by the mean of the groups if None.

    Raises:
        ValueError: a number is negative, groups overlap, or ``block_m`` is another one.

    Examples:
        >>> row_tiles([(3, 0, 20), (0, 20, 0), (1, 20, 5)], "cpu", block_m=16).table
        tensor([[ 3,  0, 16],
                [ 3, 16,  4],
                [ 1, 20,  5]], dtype=torch.int32)
    """
    filled = [group for group in groups if group[2] != 0]
    check_groups(filled)
    covered = sum(count for _, _, count in filled)
    if block_m is None:
        block_m = height_for(covered, len(filled))
    elif block_m not in HEIGHTS:
        raise ValueError(f"`block_m` must be one of {list(HEIGHTS)}, got {block_m}.")
    table = torch.tensor(
        [
            (slot, first + done, min(block_m, count - done))
            for slot, first, count in filled
            for done in range(0, count, block_m)
        ],
        dtype=torch.int32,
        device="cpu",
    ).view(-1, 3)
    device = torch.device(device)
    if device.type == "cuda":  # From pageable memory the copy would be waited for.
        table = table.pin_memory().to(device, non_blocking=True)
    return Tiles(
        table,
        block_m,
        rows=max((first + count for _, first, count in filled), default=0),
        slots=max((slot + 1 for slot, _, _ in filled), default=0),
        covered=covered,
    )


def expert_tiles(index: Tensor, num_experts: int) -> tuple[Tiles, Tensor]:
    """Sort a router's choice by expert and cut it into tiles, on the device and in one launch.

    There are as many tiles as any choice of this shape could need; those that this one does not
    need have no rows.

    Args:
        index: int32 or int64 ``[T, A]``, the experts of each token. Whatever is not in [0, E) is in
            no tile. It is not looked for, since that would have to be waited for.
        num_experts: E, the slots.

    Returns:
        The tiles, whose rows are places in the second result: int32 ``[T A]``, positions in the
        flat ``index`` in the order of their experts. What is behind those means nothing.

    Raises:
        TypeError: ``index`` is of another dtype.
        ValueError: ``index`` is no matrix.
        RuntimeError: Triton cannot compile or start a kernel here.

    Examples:
        >>> tiles, order = expert_tiles(torch.tensor([[1, 0], [3, 1]]), 3)  # doctest: +SKIP
        >>> order[:3], tiles.table  # doctest: +SKIP
        (tensor([1, 0, 3], dtype=torch.int32),
         tensor([[0, 0, 1],
                 [1, 1, 2],
                 [0, 0, 0]], dtype=torch.int32))
    """
    check_index(index)
    flat = index.reshape(-1)
    rows = len(flat)
    most = min(rows, num_experts)  # experts that may have rows
    block_m = height_for(rows, most)
    number = (rows + most * (block_m - 1)) // block_m
    table = torch.empty(number, 3, dtype=torch.int32, device=index.device)
    order = torch.empty(rows, dtype=torch.int32, device=index.device)
    experts = triton.next_power_of_2(num_experts)
    launch(
        _sort_kernel,
        (num_experts + 1 if rows else 0,),
        table,
        order,
        flat,
        rows,
        num_experts,
        number,
        HEIGHT=block_m,
        EXPERTS=experts,
        BLOCK=max(16, min(1024, _COMPARISONS // experts)),
    )
    return Tiles(table, block_m, rows, num_experts, None), order


@triton.jit(do_not_specialize=["rows", "num_tiles"])
def _sort_kernel(
    tiles: tl.tensor,
    order: tl.tensor,
    chosen_experts: tl.tensor,
    rows: tl.tensor,
    num_experts: tl.tensor,
    num_tiles: tl.tensor,
    HEIGHT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One expert's rows and tiles. The program after the last expert's has the tiles left over.

    Every program counts the rows of all experts, and so knows where its own begin.
    """
    expert = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, rows, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        chosen = tl.load(chosen_experts + offsets, mask=offsets < rows, other=-1)
        counts += tl.sum((chosen[:, None] == numbers[None, :]).to(tl.int32), 0)
    counts = tl.where(numbers < num_experts, counts, 0)
    heights = tl.cdiv(counts, HEIGHT)
    start = tl.sum(tl.where(numbers < expert, counts, 0), 0)
    count = tl.sum(tl.where(numbers == expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(numbers < expert, heights, 0), 0)
    last_tile = first_tile + tl.cdiv(count, HEIGHT)
    slot = expert
    if expert == num_experts:
        last_tile = num_tiles
        slot = 0
    for tile in range(first_tile, last_tile):
        done = (tile - first_tile) * HEIGHT
        place = tiles + tile * 3
        tl.store(place, slot)
        tl.store(place + 1, tl.minimum(start + done, rows))
        tl.store(place + 2, tl.maximum(tl.minimum(count - done, HEIGHT), 0))
    if expert < num_experts:
        for first in range(0, rows, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            chosen = tl.load(chosen_experts + offsets, mask=offsets < rows, other=-1)
            mine = chosen == expert
            rank = tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order + start + rank, offsets, mask=mine)
            start += tl.sum(mine.to(tl.int32), 0)

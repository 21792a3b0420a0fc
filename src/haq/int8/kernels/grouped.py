# mypy: disable-error-code="untyped-decorator"
"""What are the outputs of all experts of a layer, each for its own rows?"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8.kernels import arithmetic
from haq.int8.kernels.arithmetic import Product
from haq.int8.kernels.checks import check_groups, check_matrices, check_rest, check_rows
from haq.int8.kernels.plans import Plan, fastest, launch, options
from haq.int8.kernels.tokens import Int8Tokens


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which rows are multiplied by which slot, cut into blocks; what `row_tiles` makes.

    Attributes:
        table: int32 ``[L, 3]`` on the device: slot, first row and number of rows of each tile.
        block_m: the largest number of rows of a tile.
        rows: the number of rows that there must be at least: the last row of a tile, plus one.
        slots: the number of slots that there must be at least.
        covered: how many rows are in a tile.
    """

    table: Tensor
    block_m: int
    rows: int
    slots: int
    covered: int


# The height of tiles by the mean number of rows of a slot, and plans for it. Tiles of one slot that
# are beside each other read its weight from the cache, so it does no harm if there are several.
_PLANS: dict[int, tuple[Plan, ...]] = {
    16: (
        Plan(16, 32, 256),
        Plan(16, 16, 512),
        Plan(16, 64, 256),
        Plan(16, 128, 128),
    ),
    64: (
        Plan(64, 64, 128),
        Plan(64, 128, 128),
        Plan(64, 256, 128, stages=3),
    ),
    128: (
        Plan(128, 128, 64, warps=8, stages=3),
        Plan(128, 128, 128, warps=8, stages=3),
        Plan(128, 256, 128, warps=8, stages=3),
    ),
}


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
        mean = covered / max(1, len(filled))
        block_m = next((height for height in _PLANS if mean <= height), 128)
    elif block_m not in _PLANS:
        raise ValueError(f"`block_m` must be one of {list(_PLANS)}, got {block_m}.")
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


def grouped_linear(
    tokens: Int8Tokens,
    weight: Tensor,
    weight_scale: Tensor,
    tiles: Tiles,
    *,
    index: Tensor | None = None,
    gates: Tensor | None = None,
    row_sums: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    plan: Plan | None = None,
) -> Tensor:
    """The W8A8 products of all experts, in one launch.

    Args:
        tokens: ``[T, K]``, what `quantize_tokens` gives.
        weight: int8 ``[S, N, K]``, contiguous: the slots.
        weight_scale: float32 ``[S, N]`` or ``[S, N, 1]``.
        tiles: which of the R rows belong to which slot.
        index: int32 or int64 ``[R]`` in [0, T), not checked: the token of each row; None if the
            tokens are the rows.
        gates: float ``[R]``, by which rows are multiplied at the end.
        row_sums: float32 ``[S, N]``, given if, and only if, the tokens have a shift.
        bias: float32 ``[S, N]``.
        dtype: of the result.
        plan: how to cut it, with the tiles' ``block_m`` and no split; measured if None.

    Returns:
        ``[R, N]``; rows that are in no tile are zero.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another shape, the tiles need more rows or slots than there are,
            the plan is one for other tiles, or only one of shift and ``row_sums`` is given.
        RuntimeError: Triton cannot compile or start a kernel here.
    """
    check_matrices(tokens.integers, weight, weight_scale, dimensions=3)
    check_rest(tokens, row_sums, bias, weight.shape[:2])
    rows = len(tokens.integers if index is None else index)
    _check_tiles(tiles, rows, len(weight))
    check_rows(rows, index, gates)
    if plan is not None and (plan.block_m != tiles.block_m or plan.split != 1):
        raise ValueError(f"`plan` must be for tiles of {tiles.block_m} rows, unsplit, got {plan}.")
    operands = Product(
        tokens.integers, weight, weight_scale, tokens.scale, tokens.shift, row_sums, bias
    )
    return _grouped(operands, tiles, rows, index, gates, dtype, plan)


def _check_tiles(tiles: Tiles, rows: int, slots: int) -> None:
    if tiles.rows > rows or tiles.slots > slots:
        raise ValueError(
            f"`tiles` must be of at most {rows} rows and {slots} slots, which is what there is, "
            f"got {tiles.rows} and {tiles.slots}."
        )


def _grouped(
    operands: Product,
    tiles: Tiles,
    rows: int,
    index: Tensor | None,
    gates: Tensor | None,
    dtype: torch.dtype,
    plan: Plan | None,
) -> Tensor:
    _, outs, columns = operands.weight.shape
    if plan is None:
        key = ("grouped", operands.weight.device, tiles.block_m, outs, columns, dtype)
        run = functools.partial(_grouped, operands, tiles, rows, index, gates, dtype)
        plan = fastest(key, _PLANS[tiles.block_m], run, len(tiles.table))
    make = torch.empty if tiles.covered == rows else torch.zeros
    result = make(rows, outs, dtype=dtype, device=operands.weight.device)
    launch(
        _grouped_kernel,
        (len(tiles.table), triton.cdiv(outs, plan.block_n)),
        result,
        tiles.table,
        index,
        gates,
        *operands.matrices,
        *operands.vectors,
        outs,
        columns,
        **options(plan, columns),
    )
    return result


@triton.jit
def _grouped_kernel(
    results: tl.tensor,
    tiles: tl.tensor,
    index: tl.tensor | None,
    gates: tl.tensor | None,
    integers: tl.tensor,
    weights: tl.tensor,
    weight_scales: tl.tensor,
    token_scales: tl.tensor,
    shifts: tl.tensor | None,
    row_sums: tl.tensor | None,
    biases: tl.tensor | None,
    num_outs: tl.tensor,
    columns: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """A block of outputs of one tile; tiles of one slot follow each other, and share its rows."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile).to(tl.int64)
    local = tl.arange(0, BLOCK_M)
    rows = (tl.load(tile + 1) + local).to(tl.int64)
    row_mask = local < tl.load(tile + 2)
    outs = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    out_mask = outs < num_outs
    tokens = rows
    if index is not None:
        tokens = tl.load(index + rows, mask=row_mask, other=0).to(tl.int64)
    slot_outs = slot * num_outs + outs  # their places in what all slots have
    sums = arithmetic.sums(
        integers + tokens * columns,
        row_mask,
        weights + slot_outs * columns,
        out_mask,
        0,
        columns,
        columns,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN,
    )
    result = arithmetic.scaled(
        sums,
        tokens,
        row_mask,
        slot_outs,
        out_mask,
        weight_scales,
        token_scales,
        shifts,
        row_sums,
        biases,
    )
    if gates is not None:
        result *= tl.load(gates + rows, mask=row_mask).to(tl.float32)[:, None]
    places = rows[:, None] * num_outs + outs[None, :]
    mask = row_mask[:, None] & out_mask[None, :]
    tl.store(results + places, result.to(results.dtype.element_ty), mask=mask)

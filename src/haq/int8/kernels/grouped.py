# mypy: disable-error-code="untyped-decorator"
"""What are the outputs of all experts of a layer, each for its own rows?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8.kernels import arithmetic
from haq.int8.kernels.arithmetic import Product
from haq.int8.kernels.checks import check_matrices, check_out, check_rest, check_rows
from haq.int8.kernels.plans import Plan, fastest, launch, options
from haq.int8.kernels.tiles import Tiles
from haq.int8.kernels.tokens import Int8Tokens

# By the height of tiles, plans for it. Tiles of one slot that are beside each other read its weight
# from the cache, so it does no harm if there are several.
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


@dataclass(frozen=True, slots=True)
class _Rows:
    """Which rows there are, and what is done to them.

    Attributes:
        number: R.
        per_token: how many follow each other for a token; 1 with an index.
        places, index, gates: as for `grouped_linear`.
    """

    number: int
    per_token: int
    places: Tensor | None
    index: Tensor | None
    gates: Tensor | None


def grouped_linear(
    tokens: Int8Tokens,
    weight: Tensor,
    weight_scale: Tensor,
    tiles: Tiles,
    *,
    per_token: int = 1,
    index: Tensor | None = None,
    places: Tensor | None = None,
    gates: Tensor | None = None,
    row_sums: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The W8A8 products of all experts, in one launch.

    Args:
        tokens: ``[T, K]``, what `quantize_tokens` gives.
        weight: int8 ``[S, N, K]``, contiguous: the slots.
        weight_scale: float32 ``[S, N]`` or ``[S, N, 1]``.
        tiles: which of the R rows belong to which slot.
        per_token: A: each token is that of so many rows, one after the other, R = T A.
        index: int32 or int64 ``[R]`` in [0, T), not checked: the token of each row, if another one.
        places: int32 or int64 ``[R]`` in [0, R), not checked: the rows that the tiles mean, in
            their order; None if the tiles mean rows as they are.
        gates: float ``[R]``, by which rows are multiplied at the end.
        row_sums: float32 ``[S, N]``, given if, and only if, the tokens have a shift.
        bias: float32 ``[S, N]``.
        dtype: of the result.
        out: ``[R, N]`` to write to.
        plan: how to cut it, with the tiles' ``block_m`` and no split; measured if None.

    Returns:
        ``[R, N]``. Rows that are in no tile are zero if the tiles were made on the CPU; in ``out``,
        and of tiles made on the device, they are as the memory was.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another shape, the tiles need more rows or slots than there are,
            the plan is one for other tiles, only one of shift and ``row_sums`` is given, or both
            ``index`` and ``per_token``.
        RuntimeError: Triton cannot compile or start a kernel here.
    """
    check_matrices(tokens.integers, weight, weight_scale, dimensions=3)
    check_rest(tokens, row_sums, bias, weight.shape[:2])
    if per_token < 1 or (per_token > 1 and index is not None):
        raise ValueError(
            f"`per_token` must be positive, and 1 where there is an `index`, got {per_token}."
        )
    number = len(tokens.integers) * per_token if index is None else len(index)
    _check_tiles(tiles, number, len(weight))
    check_rows(number, index=index, places=places, gates=gates)
    if out is not None:
        check_out(out, number, weight.shape[1], dtype)
    if plan is not None and (plan.block_m != tiles.block_m or plan.split != 1):
        raise ValueError(f"`plan` must be for tiles of {tiles.block_m} rows, unsplit, got {plan}.")
    operands = Product(
        tokens.integers, weight, weight_scale, tokens.scale, tokens.shift, row_sums, bias
    )
    rows = _Rows(number, per_token, places, index, gates)
    if plan is None:
        plan = _fastest_plan(operands, tiles, rows, dtype)
    if out is None:
        seen = tiles.covered in (None, number)
        out = _result(torch.empty if seen else torch.zeros, operands, number, dtype)
    return _grouped(operands, tiles, rows, out, plan)


def _check_tiles(tiles: Tiles, rows: int, slots: int) -> None:
    if tiles.rows > rows or tiles.slots > slots:
        raise ValueError(
            f"`tiles` must be of at most {rows} rows and {slots} slots, which is what there is, "
            f"got {tiles.rows} and {tiles.slots}."
        )


def _result(
    make: Callable[..., Tensor], operands: Product, rows: int, dtype: torch.dtype
) -> Tensor:
    return make(rows, operands.weight.shape[1], dtype=dtype, device=operands.weight.device)


def _fastest_plan(operands: Product, tiles: Tiles, rows: _Rows, dtype: torch.dtype) -> Plan:
    _, outs, columns = operands.weight.shape
    key = ("grouped", operands.weight.device, tiles.block_m, outs, columns, dtype)

    def run(plan: Plan) -> Tensor:
        # Memory of its own, all of it known: plans are compared by what they write.
        out = _result(torch.zeros, operands, rows.number, dtype)
        return _grouped(operands, tiles, rows, out, plan)

    return fastest(key, _PLANS[tiles.block_m], run, len(tiles.table))


def _grouped(operands: Product, tiles: Tiles, rows: _Rows, out: Tensor, plan: Plan) -> Tensor:
    _, outs, columns = operands.weight.shape
    launch(
        _grouped_kernel,
        (len(tiles.table), triton.cdiv(outs, plan.block_n)),
        out,
        tiles.table,
        rows.places,
        rows.index,
        rows.gates,
        *operands.matrices,
        *operands.vectors,
        outs,
        columns,
        PER_TOKEN=rows.per_token,
        **options(plan, columns),
    )
    return out


@triton.jit
def _grouped_kernel(
    results: tl.tensor,
    tiles: tl.tensor,
    places: tl.tensor | None,
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
    PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """A block of outputs of one tile; tiles of one slot follow each other, and share its rows."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile).to(tl.int64)
    count = tl.load(tile + 2)
    local = tl.arange(0, BLOCK_M)
    rows = (tl.load(tile + 1) + local).to(tl.int64)
    row_mask = local < count
    if places is not None:
        rows = tl.load(places + rows, mask=row_mask, other=0).to(tl.int64)
    outs = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    out_mask = outs < num_outs
    tokens = rows // PER_TOKEN
    if index is not None:
        tokens = tl.load(index + rows, mask=row_mask, other=0).to(tl.int64)
    slot_outs = slot * num_outs + outs  # their places in what all slots have
    sums = arithmetic.sums(
        integers + tokens * columns,
        row_mask,
        weights + slot_outs * columns,
        out_mask,
        0,
        tl.where(count > 0, columns, 0),  # Of an empty tile nothing is read.
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
    offsets = rows[:, None] * num_outs + outs[None, :]
    mask = row_mask[:, None] & out_mask[None, :]
    tl.store(results + offsets, result.to(results.dtype.element_ty), mask=mask)

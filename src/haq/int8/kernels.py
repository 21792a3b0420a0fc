# mypy: disable-error-code="untyped-decorator"
"""Triton's kernels for an NVIDIA GPU: tokens to int8, and products with a plain int8 weight.

Nothing imports this module until a weight is packed for a GPU: Triton comes with torch there, and
is not needed elsewhere. Around a product nothing is left to launch: the tokens are rounded by one
kernel, and what follows the sums of int32 happens before they are stored, in the order of
:mod:`haq.int8.matmul`. Divisions are IEEE's and no multiplication is fused with an addition, so
that the bits are those of the formula; they do not depend on how a kernel is cut into blocks.

At decode a product takes as long as reading its weight. Blocks of few weight rows then keep every
processor reading, and where there are not enough rows each is cut into `Plan.split` pieces, whose
exact sums a second kernel adds. Which plan is the fastest one is measured, once per process for
each size of the weight and range of token numbers; a plan whose bits differ is not used.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

from haq.int8 import grid

_QMAX = tl.constexpr(float(grid.QMAX))
_SMALLEST_SCALE = tl.constexpr(grid.SMALLEST_SCALE)
_SMALLEST_LARGEST = tl.constexpr(grid.SMALLEST_SCALE * grid.QMAX)

# Adding and subtracting 1.5 * 2^23 leaves the nearest integer, ties to even, of what is below 2^22.
_ROUND = tl.constexpr(12582912.0)

# Columns of a token that one program holds at once.
_MOST_COLUMNS = 8192

# Outputs that one program adds the pieces of.
_OUTS_AT_ONCE = 512

# Smaller products take no time worth measuring.
_WORTH_TUNING = 2**20


# --- Tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Int8Tokens:
    """Integers that stand for tokens: ``(integers + shift) * scale``.

    Attributes:
        integers: int8 ``[T, K]``, contiguous; in [-127, 127], or in [-128, 127] with a shift.
        scale: float32 ``[T, 1]``.
        shift: float32 ``[T, 1]`` of integers; None on the symmetric grid, for zero.
    """

    integers: Tensor
    scale: Tensor
    shift: Tensor | None = None


def quantize_tokens(tokens: Tensor, asymmetric: bool = False) -> Int8Tokens:
    """What `haq.int8.tokens.round_tokens` gives, bit for bit, as int8 and in one launch.

    A quotient that is not finite has no integer: it becomes 0, and the token's scale, NaN or
    infinite, still spoils its outputs and no others.

    Args:
        tokens: float ``[T, K]``.
        asymmetric: give each token a zero point beside its scale.

    Raises:
        TypeError: ``tokens`` is not float.
        ValueError: ``tokens`` is not a matrix with columns.
    """
    if not tokens.is_floating_point():
        raise TypeError(f"`tokens` must be a float tensor, got {tokens.dtype}.")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"`tokens` must be a matrix [T, K], K > 0, got {list(tokens.shape)}.")
    tokens = tokens.contiguous()
    count, columns = tokens.shape
    integers = torch.empty_like(tokens, dtype=torch.int8)
    scale = tokens.new_empty(count, 1, dtype=torch.float32)
    shift = torch.empty_like(scale) if asymmetric else None
    block = min(triton.next_power_of_2(columns), _MOST_COLUMNS)
    _launch(
        _quantize_kernel,
        (count,),
        tokens,
        integers,
        scale,
        shift,
        columns,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
    )
    return Int8Tokens(integers, scale, shift)


@triton.jit
def _quantize_kernel(
    tokens: tl.tensor,
    integers: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor | None,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One token: its largest magnitudes below and above zero, then its integers."""
    token = tl.program_id(0)
    start = token.to(tl.int64) * columns
    # Floats without a sign are in the order of their bits, and NaN is the largest of them.
    highs = tl.zeros((BLOCK,), tl.int32)
    lows = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(tokens + start + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if shifts is None:
            highs = tl.maximum(highs, bits)
        else:
            highs = tl.maximum(highs, tl.where(x < 0, 0, bits))
            lows = tl.maximum(lows, tl.where(x > 0, 0, bits))
    high = tl.max(highs, 0).to(tl.float32, bitcast=True)
    # `tl.where`, because `tl.maximum` and `tl.minimum` may drop NaN.
    if shifts is None:
        shift = 0.0
        scale = tl.div_rn(tl.where(high < _SMALLEST_LARGEST, _SMALLEST_LARGEST, high), _QMAX)
    else:
        low = -tl.max(lows, 0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(high - low, 255.0)
        scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
        shift = (tl.div_rn(low, scale) + _ROUND) - _ROUND + 128.0
        tl.store(shifts + token, shift)
    tl.store(scales + token, scale)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(tokens + start + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        q = (tl.div_rn(x, scale) + _ROUND) - _ROUND - shift
        # Where both ends lie on ties, rounding both away from zero needs one integer too many.
        q = tl.where(q > _QMAX, _QMAX, q)
        q = tl.where(tl.abs(q) <= 128.0, q, 0.0).to(tl.int8)
        tl.store(integers + start + offsets, q, mask=offsets < columns)


# --- One product ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut into programs.

    Attributes:
        block_m: tokens of a program.
        block_n: rows of the weight of a program.
        block_k: columns that it multiplies at a time.
        warps: of 32 threads each.
        stages: blocks of columns that are on their way from memory at a time.
        split: programs among which the columns are divided.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    split: int = 1


# By the largest number of tokens they are for; the first is used where nothing is measured, and
# needs no more shared memory than the smallest cards have.
_PLANS: dict[float, tuple[Plan, ...]] = {
    16: (
        Plan(16, 32, 256),
        Plan(16, 16, 512),
        Plan(16, 64, 256),
        Plan(16, 32, 256, split=2),
        Plan(16, 32, 512, split=2),
        Plan(16, 64, 256, split=4),
        Plan(16, 128, 128, split=8),
    ),
    64: (
        Plan(64, 64, 128),
        Plan(32, 64, 256, stages=3),
        Plan(64, 32, 256, stages=3),
        Plan(64, 128, 128),
        Plan(64, 64, 128, split=2),
        Plan(64, 128, 128, split=4),
    ),
    256: (
        Plan(128, 128, 64, warps=8, stages=3),
        Plan(64, 64, 128),
        Plan(64, 128, 128),
        Plan(128, 128, 128, warps=8),
        Plan(128, 128, 128, warps=8, split=2),
    ),
    float("inf"): (
        Plan(128, 128, 64, warps=8, stages=3),
        Plan(128, 128, 128, warps=8, stages=3),
        Plan(128, 256, 128, warps=8, stages=3),
        Plan(256, 128, 128, warps=8, stages=3),
        Plan(64, 256, 128, warps=4, stages=4),
    ),
}


def int8_product(integers: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Exact sums times the scales of the weight, what `PackedWeight.product` promises.

    Args:
        integers: int8 ``[T, K]``.
        weight: int8 ``[N, K]``, contiguous.
        weight_scale: float32 ``[N]`` or ``[N, 1]``.

    Returns:
        float32 ``[T, N]``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another shape.
        RuntimeError: Triton cannot compile or start a kernel here.
    """
    _check_matrices(integers, weight, weight_scale, dimensions=2)
    return _linear(_Product(integers, weight, weight_scale), torch.float32)


def int8_linear(
    tokens: Int8Tokens,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """The W8A8 product of :mod:`haq.int8.matmul`'s formula, in one launch, or two with a split.

    Args:
        tokens: ``[T, K]``, what `quantize_tokens` gives.
        weight: int8 ``[N, K]``, contiguous.
        weight_scale: float32 ``[N]`` or ``[N, 1]``.
        row_sums: float32 ``[N]``, what `haq.int8.tokens.row_sums` gives; given if, and only if,
            the tokens have a shift.
        bias: float32 ``[N]``.
        dtype: of the result.
        plan: how to cut it; measured if None.

    Returns:
        ``[T, N]``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another shape, or only one of shift and ``row_sums`` is given.
        RuntimeError: Triton cannot compile or start a kernel here.
    """
    _check_matrices(tokens.integers, weight, weight_scale, dimensions=2)
    _check_rest(tokens, row_sums, bias, weight.shape[:1])
    operands = _Product(
        tokens.integers, weight, weight_scale, tokens.scale, tokens.shift, row_sums, bias
    )
    return _linear(operands, dtype, plan)


@dataclass(frozen=True, slots=True)
class _Product:
    """The operands, in the order in which all kernels take them."""

    integers: Tensor
    weight: Tensor
    weight_scale: Tensor
    token_scale: Tensor | None = None
    shift: Tensor | None = None
    row_sums: Tensor | None = None
    bias: Tensor | None = None

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.integers, self.weight

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self.weight_scale, self.token_scale, self.shift, self.row_sums, self.bias


def _linear(operands: _Product, dtype: torch.dtype, plan: Plan | None = None) -> Tensor:
    tokens, (outs, columns) = len(operands.integers), operands.weight.shape
    if plan is None:
        most, plans = next((most, plans) for most, plans in _PLANS.items() if tokens <= most)
        key = ("linear", operands.weight.device, most, outs, columns, dtype)
        plan = _fastest(key, plans, functools.partial(_linear, operands, dtype), tokens)
    result = operands.integers.new_empty(tokens, outs, dtype=dtype)
    pieces = None
    if plan.split > 1:
        pieces = operands.integers.new_empty(plan.split, tokens, outs, dtype=torch.int32)
    _launch(
        _linear_kernel,
        (triton.cdiv(outs, plan.block_n), triton.cdiv(tokens, plan.block_m), plan.split),
        result,
        pieces,
        *operands.matrices,
        *operands.vectors,
        tokens,
        outs,
        columns,
        **_options(plan, columns),
    )
    if pieces is not None:
        _launch(
            _add_kernel,
            (triton.cdiv(outs, _OUTS_AT_ONCE), tokens),
            result,
            pieces,
            *operands.vectors,
            tokens,
            outs,
            SPLIT=plan.split,
            BLOCK_N=_OUTS_AT_ONCE,
        )
    return result


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    results: tl.tensor,
    pieces: tl.tensor | None,
    integers: tl.tensor,
    weights: tl.tensor,
    weight_scales: tl.tensor,
    token_scales: tl.tensor | None,
    shifts: tl.tensor | None,
    row_sums: tl.tensor | None,
    biases: tl.tensor | None,
    num_tokens: tl.tensor,
    num_outs: tl.tensor,
    columns: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """A block of outputs, or of one of the pieces of their sums."""
    # Programs that run at the same time are given blocks near each other, which share their reads.
    block_m, block_n = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )
    piece = tl.program_id(2)
    tokens = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    outs = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token_mask = tokens < num_tokens
    out_mask = outs < num_outs
    span = tl.cdiv(tl.cdiv(columns, tl.num_programs(2)), BLOCK_K) * BLOCK_K
    sums = _sums(
        integers + tokens * columns,
        token_mask,
        weights + outs * columns,
        out_mask,
        piece * span,
        tl.minimum(columns, (piece + 1) * span),
        columns,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN,
    )
    places = tokens[:, None] * num_outs + outs[None, :]
    mask = token_mask[:, None] & out_mask[None, :]
    if pieces is not None:
        size = num_outs.to(tl.int64) * num_tokens
        tl.store(pieces + piece * size + places, sums, mask=mask)
    else:
        result = _scaled(
            sums,
            tokens,
            token_mask,
            outs,
            out_mask,
            weight_scales,
            token_scales,
            shifts,
            row_sums,
            biases,
        )
        tl.store(results + places, result.to(results.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_kernel(
    results: tl.tensor,
    pieces: tl.tensor,
    weight_scales: tl.tensor,
    token_scales: tl.tensor | None,
    shifts: tl.tensor | None,
    row_sums: tl.tensor | None,
    biases: tl.tensor | None,
    num_tokens: tl.tensor,
    num_outs: tl.tensor,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Some outputs of one token, from the pieces of their sums."""
    tokens = tl.program_id(1) + tl.zeros((1,), tl.int64)
    outs = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token_mask = tokens < num_tokens
    out_mask = outs < num_outs
    places = tokens[:, None] * num_outs + outs[None, :]
    size = num_outs.to(tl.int64) * num_tokens
    sums = tl.zeros((1, BLOCK_N), tl.int32)
    for piece in tl.static_range(SPLIT):
        sums += tl.load(pieces + piece * size + places, mask=out_mask[None, :], other=0)
    result = _scaled(
        sums,
        tokens,
        token_mask,
        outs,
        out_mask,
        weight_scales,
        token_scales,
        shifts,
        row_sums,
        biases,
    )
    tl.store(results + places, result.to(results.dtype.element_ty), mask=out_mask[None, :])


@triton.jit
def _sums(
    token_rows: tl.tensor,
    token_mask: tl.tensor,
    weight_rows: tl.tensor,
    weight_mask: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    columns: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tensor:
    """int32 ``[BLOCK_M, BLOCK_N]``: sums over the columns from ``start``, up to ``stop``.

    The rows are pointers. ``EVEN`` says that BLOCK_K divides the number of columns.
    """
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(start, stop, BLOCK_K):
        offsets = first + tl.arange(0, BLOCK_K)
        x_mask = token_mask[:, None]
        w_mask = weight_mask[None, :]
        if not EVEN:
            x_mask = x_mask & (offsets < columns)[None, :]
            w_mask = w_mask & (offsets < columns)[:, None]
        x = tl.load(token_rows[:, None] + offsets[None, :], mask=x_mask, other=0)
        w = tl.load(weight_rows[None, :] + offsets[:, None], mask=w_mask, other=0)
        sums = tl.dot(x, w, sums)
    return sums


@triton.jit
def _scaled(
    sums: tl.tensor,
    tokens: tl.tensor,
    token_mask: tl.tensor,
    outs: tl.tensor,
    out_mask: tl.tensor,
    weight_scales: tl.tensor,
    token_scales: tl.tensor | None,
    shifts: tl.tensor | None,
    row_sums: tl.tensor | None,
    biases: tl.tensor | None,
) -> tl.tensor:
    """What follows the sums, in the order of `haq.int8.matmul`."""
    result = sums.to(tl.float32) * tl.load(weight_scales + outs, mask=out_mask)[None, :]
    if shifts is not None:
        shift = tl.load(shifts + tokens, mask=token_mask)
        result += shift[:, None] * tl.load(row_sums + outs, mask=out_mask)[None, :]
    if token_scales is not None:
        result *= tl.load(token_scales + tokens, mask=token_mask)[:, None]
    if biases is not None:
        result += tl.load(biases + outs, mask=out_mask)[None, :]
    return result


# --- Products of many experts ---------------------------------------------------------------------


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
_GROUPED_PLANS: dict[int, tuple[Plan, ...]] = {
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
    _check_groups(filled)
    covered = sum(count for _, _, count in filled)
    if block_m is None:
        mean = covered / max(1, len(filled))
        block_m = next((height for height in _GROUPED_PLANS if mean <= height), 128)
    elif block_m not in _GROUPED_PLANS:
        raise ValueError(f"`block_m` must be one of {list(_GROUPED_PLANS)}, got {block_m}.")
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
    _check_matrices(tokens.integers, weight, weight_scale, dimensions=3)
    _check_rest(tokens, row_sums, bias, weight.shape[:2])
    rows = len(tokens.integers if index is None else index)
    _check_rows(tiles, rows, len(weight), index, gates)
    if plan is not None and (plan.block_m != tiles.block_m or plan.split != 1):
        raise ValueError(f"`plan` must be for tiles of {tiles.block_m} rows, unsplit, got {plan}.")
    operands = _Product(
        tokens.integers, weight, weight_scale, tokens.scale, tokens.shift, row_sums, bias
    )
    return _grouped(operands, tiles, rows, index, gates, dtype, plan)


def _grouped(
    operands: _Product,
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
        plan = _fastest(key, _GROUPED_PLANS[tiles.block_m], run, len(tiles.table))
    make = torch.empty if tiles.covered == rows else torch.zeros
    result = make(rows, outs, dtype=dtype, device=operands.weight.device)
    _launch(
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
        **_options(plan, columns),
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
    sums = _sums(
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
    result = _scaled(
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


# --- Launching ------------------------------------------------------------------------------------


def _launch(kernel: Any, launch_grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """Start a kernel on the device of its tensors; every way to fail is a RuntimeError."""
    if 0 in launch_grid:
        return
    try:
        with torch.cuda.device_of(operands[0]):
            kernel[launch_grid](*operands, enable_fp_fusion=False, **options)
    except (TritonError, OSError, SubprocessError, ValueError) as error:
        raise RuntimeError(f"Triton cannot run its kernels here: {error}") from error


def _options(plan: Plan, columns: int) -> dict[str, Any]:
    return {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "EVEN": columns % plan.block_k == 0,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }


_fastest_plans: dict[tuple[Any, ...], Plan] = {}


def _fastest(
    key: tuple[Any, ...], plans: Sequence[Plan], run: Callable[[Plan], Tensor], work: int
) -> Plan:
    """The plan that is measured to be the fastest, once for each key.

    The first plan is what the others are compared with. It is also the choice where nothing can be
    measured: under the interpreter and while a CUDA graph is captured.

    Args:
        key: what the choice depends on; its fourth and fifth entries are N and K.
        plans: to choose from.
        run: computes the product by a plan.
        work: tokens, or tiles; nothing is measured without.
    """
    plan = _fastest_plans.get(key)
    if plan is not None:
        return plan
    if work == 0 or key[3] * key[4] < _WORTH_TUNING or not _can_measure():
        return plans[0]
    expected = run(plans[0])
    seconds = {}
    for plan in plans:
        try:
            if torch.allclose(run(plan), expected, rtol=0, atol=0, equal_nan=True):
                seconds[plan] = _seconds(functools.partial(run, plan))
        except RuntimeError:  # Too much shared memory for this card, or too little left on it.
            continue
    _fastest_plans[key] = min(seconds, key=lambda plan: seconds[plan], default=plans[0])
    return _fastest_plans[key]


def _can_measure() -> bool:
    return not (triton.knobs.runtime.interpret or torch.cuda.is_current_stream_capturing())


def _seconds(run: Callable[[], Tensor]) -> float:
    """The median of some calls; before each, what the cache held is overwritten."""
    milliseconds: float = do_bench(run, warmup=5, rep=20, return_mode="median")
    return milliseconds / 1e3


# --- Checks ---------------------------------------------------------------------------------------


def _check_matrices(
    integers: Tensor, weight: Tensor, weight_scale: Tensor, dimensions: int
) -> None:
    for name, tensor in {"integers": integers, "weight": weight}.items():
        if tensor.dtype != torch.int8:
            raise TypeError(f"`{name}` must be int8, got {tensor.dtype}.")
    expected = "[N, K]" if dimensions == 2 else "[S, N, K]"
    if weight.dim() != dimensions or not weight.is_contiguous():
        raise ValueError(
            f"`weight` must be a contiguous tensor {expected}, got shape {list(weight.shape)} and "
            f"strides {list(weight.stride())}."
        )
    columns = weight.shape[-1]
    if integers.dim() != 2 or integers.shape[1] != columns or not integers.is_contiguous():
        raise ValueError(
            f"`integers` must be a contiguous matrix [T, {columns}], got shape "
            f"{list(integers.shape)} and strides {list(integers.stride())}."
        )
    _check_floats("weight_scale", weight_scale, weight.shape[:-1])


def _check_rest(
    tokens: Int8Tokens, row_sums: Tensor | None, bias: Tensor | None, shape: torch.Size
) -> None:
    if (tokens.shift is None) != (row_sums is None):
        raise ValueError(
            "`row_sums` must be given if, and only if, the tokens have a shift, got "
            f"{'no ' if row_sums is None else ''}`row_sums` and "
            f"{'no ' if tokens.shift is None else 'a '}shift."
        )
    for name, values in {"row_sums": row_sums, "bias": bias}.items():
        if values is not None:
            _check_floats(name, values, shape)


def _check_floats(name: str, values: Tensor, shape: torch.Size) -> None:
    if values.dtype != torch.float32:
        raise TypeError(f"`{name}` must be float32, got {values.dtype}.")
    if values.shape not in (shape, (*shape, 1)) or not values.is_contiguous():
        raise ValueError(
            f"`{name}` must be a contiguous tensor {list(shape)}, got shape {list(values.shape)} "
            f"and strides {list(values.stride())}."
        )


def _check_groups(filled: Sequence[tuple[int, int, int]]) -> None:
    end = 0
    for slot, first, count in sorted(filled, key=lambda group: group[1]):
        if min(slot, first, count) < 0:
            raise ValueError(f"`groups` must not be negative, got {(slot, first, count)}.")
        if first < end:
            raise ValueError(
                f"`groups` must not share rows, got one that starts at row {first}, while another "
                f"one ends at row {end}."
            )
        end = first + count


def _check_rows(
    tiles: Tiles, rows: int, slots: int, index: Tensor | None, gates: Tensor | None
) -> None:
    if tiles.rows > rows or tiles.slots > slots:
        raise ValueError(
            f"`tiles` must be of at most {rows} rows and {slots} slots, which is what there is, "
            f"got {tiles.rows} and {tiles.slots}."
        )
    if index is not None and index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`index` must be int32 or int64, got {index.dtype}.")
    if gates is not None and not gates.is_floating_point():
        raise TypeError(f"`gates` must be a float tensor, got {gates.dtype}.")
    for name, values in {"index": index, "gates": gates}.items():
        if values is not None and (values.shape != (rows,) or not values.is_contiguous()):
            raise ValueError(
                f"`{name}` must be a contiguous tensor [{rows}], got shape {list(values.shape)}."
            )

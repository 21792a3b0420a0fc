# mypy: disable-error-code="untyped-decorator"
"""What are the outputs of one layer?

A kernel computes blocks of them. Where a plan splits the columns, it stores the pieces of their
sums instead, which a second one adds.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8.kernels import arithmetic
from haq.int8.kernels.arithmetic import Product
from haq.int8.kernels.checks import check_matrices, check_rest
from haq.int8.kernels.plans import Plan, fastest, launch, options
from haq.int8.kernels.tokens import Int8Tokens

# Outputs that one program adds the pieces of.
_OUTS_AT_ONCE = 512

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
    check_matrices(integers, weight, weight_scale, dimensions=2)
    return _linear(Product(integers, weight, weight_scale), torch.float32)


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
    check_matrices(tokens.integers, weight, weight_scale, dimensions=2)
    check_rest(tokens, row_sums, bias, weight.shape[:1])
    operands = Product(
        tokens.integers, weight, weight_scale, tokens.scale, tokens.shift, row_sums, bias
    )
    return _linear(operands, dtype, plan)


def _linear(operands: Product, dtype: torch.dtype, plan: Plan | None = None) -> Tensor:
    tokens, (outs, columns) = len(operands.integers), operands.weight.shape
    if plan is None:
        most, plans = next((most, plans) for most, plans in _PLANS.items() if tokens <= most)
        key = ("linear", operands.weight.device, most, outs, columns, dtype)
        plan = fastest(key, plans, functools.partial(_linear, operands, dtype), tokens)
    result = operands.integers.new_empty(tokens, outs, dtype=dtype)
    pieces = None
    if plan.split > 1:
        pieces = operands.integers.new_empty(plan.split, tokens, outs, dtype=torch.int32)
    launch(
        _linear_kernel,
        (triton.cdiv(outs, plan.block_n), triton.cdiv(tokens, plan.block_m), plan.split),
        result,
        pieces,
        *operands.matrices,
        *operands.vectors,
        tokens,
        outs,
        columns,
        **options(plan, columns),
    )
    if pieces is not None:
        launch(
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
    sums = arithmetic.sums(
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
        result = arithmetic.scaled(
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
    result = arithmetic.scaled(
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

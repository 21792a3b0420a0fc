# mypy: disable-error-code="untyped-decorator"
"""What is a token's sum over its experts?"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from haq.int8.kernels.checks import check_index
from haq.int8.kernels.plans import launch

_COLUMNS_AT_ONCE = 1024


def add_experts(rows: Tensor, index: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Each token's rows, added in float32 and in the order in which the router names its experts.

    Args:
        rows: float32 ``[T A, D]``, contiguous: what each choice gave.
        index: int32 or int64 ``[T, A]``. Rows of whatever is not in [0, E) add nothing.
        num_experts: E.
        dtype: of the result.

    Returns:
        ``[T, D]``.

    Raises:
        TypeError: a tensor is of another dtype.
        ValueError: a tensor has another shape.
        RuntimeError: Triton cannot compile or start a kernel here.

    Examples:
        >>> rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])  # doctest: +SKIP
        >>> add_experts(rows, torch.tensor([[1, 0], [3, 1]]), 3, torch.float32)  # doctest: +SKIP
        tensor([[3.],
                [4.]])
    """
    check_index(index)
    if rows.dtype != torch.float32:
        raise TypeError(f"`rows` must be float32, got {rows.dtype}.")
    if rows.dim() != 2 or len(rows) != index.numel() or not rows.is_contiguous():
        raise ValueError(
            f"`rows` must be a contiguous matrix [{index.numel()}, D], got shape "
            f"{list(rows.shape)} and strides {list(rows.stride())}."
        )
    count, per_token = index.shape
    columns = rows.shape[1]
    result = rows.new_empty(count, columns, dtype=dtype)
    launch(
        _add_experts_kernel,
        (count, triton.cdiv(columns, _COLUMNS_AT_ONCE)),
        result,
        rows,
        index.contiguous(),
        num_experts,
        columns,
        PER_TOKEN=per_token,
        BLOCK=_COLUMNS_AT_ONCE,
    )
    return result


@triton.jit
def _add_experts_kernel(
    results: tl.tensor,
    rows: tl.tensor,
    chosen_experts: tl.tensor,
    num_experts: tl.tensor,
    columns: tl.tensor,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Some columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        row = token * PER_TOKEN + slot
        expert = tl.load(chosen_experts + row)
        known = (expert >= 0) & (expert < num_experts)
        values = tl.load(rows + row * columns + offsets, mask=mask, other=0.0)
        values = tl.where(known, values, 0.0)
        # Zero plus the first would be another zero, where that is -0.
        total = values if slot == 0 else total + values
    place = results + token * columns + offsets
    tl.store(place, total.to(results.dtype.element_ty), mask=mask)

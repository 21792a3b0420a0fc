"""What is wrong with the operands of a product?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from haq.int8.kernels.tokens import Int8Tokens


def check_matrices(integers: Tensor, weight: Tensor, weight_scale: Tensor, dimensions: int) -> None:
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


def check_rest(
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


def check_groups(filled: Sequence[tuple[int, int, int]]) -> None:
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


def check_index(index: Tensor) -> None:
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`index` must be int32 or int64, got {index.dtype}.")
    if index.dim() != 2:
        raise ValueError(f"`index` must be a matrix [T, A], got shape {list(index.shape)}.")


def check_rows(rows: int, **vectors: Tensor | None) -> None:
    """``gates`` are floats, all others integers."""
    for name, values in vectors.items():
        if values is None:
            continue
        if name == "gates":
            if not values.is_floating_point():
                raise TypeError(f"`gates` must be a float tensor, got {values.dtype}.")
        elif values.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"`{name}` must be int32 or int64, got {values.dtype}.")
        if values.shape != (rows,) or not values.is_contiguous():
            raise ValueError(
                f"`{name}` must be a contiguous tensor [{rows}], got shape {list(values.shape)}."
            )


def check_out(out: Tensor, rows: int, outs: int, dtype: torch.dtype) -> None:
    if out.dtype != dtype:
        raise TypeError(f"`out` must be {dtype}, got {out.dtype}.")
    if out.shape != (rows, outs) or not out.is_contiguous():
        raise ValueError(
            f"`out` must be a contiguous tensor [{rows}, {outs}], got shape {list(out.shape)} and "
            f"strides {list(out.stride())}."
        )

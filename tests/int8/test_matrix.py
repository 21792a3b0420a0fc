"""Weights on the grid: by the kernel and by torch, against numpy and against each other."""

import numpy as np
import pytest
import torch
from torch import Tensor

from haq.int8 import grid, matmul
from haq.int8.matrix import quantize_matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With a row of zeros, one too small for the grid, and an outlier at the end of a row."""
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[rows // 2] = 0
    weight[rows // 3] = 1e-39
    weight[0, -1] = -300
    return weight.to(dtype)


def factors_of(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(columns)) + 0.5


@pytest.mark.parametrize("rows", [1, 32, 100])
@pytest.mark.parametrize("with_factors", [False, True])
def test_a_matrix_by_pieces(rows: int, with_factors: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(77, rows, generator=generator).T  # As a `Conv1D` has it.
    weight[rows // 2] = 0
    factors = torch.rand(77, generator=generator) + 0.5 if with_factors else None
    values = weight.double().numpy() * (1 if factors is None else factors.numpy())
    largest = np.abs(values).max(1, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1)
    integers, found = quantize_matrix(weight, factors)
    assert integers.is_contiguous()
    np.testing.assert_allclose(found.numpy(), scale, rtol=1e-6)
    # A value between two integers may round either way.
    np.testing.assert_allclose(integers.numpy(), values / scale, rtol=0, atol=0.5 + 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 15), (70, 64), (66, 131)])
@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_the_same_bits_as_row_by_row(
    dtype: torch.dtype, rows: int, columns: int, with_factors: bool, backend: str
) -> None:
    weight = weight_of(rows, columns, dtype)
    factors = factors_of(columns) if with_factors else None
    with matmul.use_backend(backend):
        if backend == "llvm" and not matmul.compiles():
            pytest.skip("the kernels of haq[cpu] do not run here")
        integers, scale = quantize_matrix(weight, factors)
    expected = grid.quantize_rows(weight if factors is None else weight * factors)
    assert torch.equal(integers, expected[0])
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_it_can_write_to_memory_that_is_there(backend: str) -> None:
    weight = weight_of(5, 20)
    room = torch.full((5, 20), 99, dtype=torch.int8), torch.full((5, 1), 99.0)
    with matmul.use_backend(backend):
        written = quantize_matrix(weight, out=room)
        assert [t.data_ptr() for t in written] == [t.data_ptr() for t in room]
    expected = grid.quantize_rows(weight)
    assert torch.equal(room[0], expected[0])
    assert torch.equal(room[1], expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_the_scale_tells_what_is_not_finite(value: float) -> None:
    weight = weight_of(40, 20)
    weight[3, 7] = value
    _, scale = quantize_matrix(weight)
    assert (~scale.isfinite()).flatten().nonzero().flatten().tolist() == [3]

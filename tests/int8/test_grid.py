"""Laws of the symmetric grid."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from haq.int8 import grid

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
).map(torch.from_numpy)


@given(matrices)
def test_error_is_at_most_half_a_step(values: torch.Tensor) -> None:
    integers, scale = grid.quantize_rows(values)
    error = (values.double() - integers.double() * scale.double()).abs()
    # A quotient next to a tie may be rounded onto it: half a step and float32's own rounding.
    assert torch.all(error <= scale.double() * (0.5 + 127 * 2.0**-24))


@given(matrices)
def test_negation_commutes_with_quantization(values: torch.Tensor) -> None:
    integers, scale = grid.quantize_rows(values)
    negated, negated_scale = grid.quantize_rows(-values)
    torch.testing.assert_close(negated, -integers, rtol=0, atol=0)
    torch.testing.assert_close(negated_scale, scale, rtol=0, atol=0)


@given(matrices)
def test_largest_value_of_a_row_becomes_127(values: torch.Tensor) -> None:
    integers, _ = grid.quantize_rows(values)
    largest = integers.abs().amax(dim=1)
    # Rows whose scale would be subnormal count as zero.
    is_zero = values.abs().amax(dim=1) / 127 < torch.finfo(torch.float32).tiny
    torch.testing.assert_close(largest, torch.where(is_zero, 0, 127).to(torch.int8))


@given(matrices)
def test_scales_are_positive_and_finite(values: torch.Tensor) -> None:
    scale = grid.row_scale(values)
    assert torch.all((scale > 0) & scale.isfinite())


@given(matrices)
def test_fake_quantization_is_a_round_trip(values: torch.Tensor) -> None:
    expected = grid.dequantize(*grid.quantize_rows(values))
    torch.testing.assert_close(grid.fake_quantize_rows(values), expected, rtol=0, atol=0)


def test_ties_go_to_even() -> None:
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])
    expected = torch.tensor([[0, 2, 2, 0, -2, 127]], dtype=torch.int8)
    torch.testing.assert_close(grid.quantize(values, torch.ones(1, 1)), expected)


def test_values_beyond_the_ends_are_clamped() -> None:
    values = torch.tensor([[1000.0, -1000.0]])
    expected = torch.tensor([[127, -127]], dtype=torch.int8)
    torch.testing.assert_close(grid.quantize(values, torch.ones(1, 1)), expected)


def test_a_row_of_zeros_has_scale_one() -> None:
    torch.testing.assert_close(grid.row_scale(torch.zeros(2, 3)), torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_is_float32_for_every_input_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.1, -3.0]], dtype=dtype)
    expected = torch.tensor([[3.0 / 127]], dtype=torch.float32)
    torch.testing.assert_close(grid.row_scale(values), expected, rtol=0, atol=0)


def test_nan_reaches_the_scale_of_its_row_only() -> None:
    scale = grid.row_scale(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    assert scale.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_sums_of_rows_are_those_of_numpy(rows: int) -> None:
    integers = torch.randint(-128, 128, (rows, 70), dtype=torch.int8)
    sums = grid.sums_of_rows(integers)
    np.testing.assert_array_equal(sums.numpy(), integers.numpy().sum(1, dtype=np.int32))
    # A row of a real model's length does not fit 16 bits.
    long = torch.full((rows, 1000), -128, dtype=torch.int8)
    assert grid.sums_of_rows(long).tolist() == [-128_000] * rows

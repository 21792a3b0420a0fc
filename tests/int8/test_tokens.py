"""Tokens on the grid, with a zero point and without, and the product that reads them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import grid, matmul
from haq.int8.tokens import round_tokens, rounded_rows, row_sums

Pack = Callable[[Tensor, Tensor], matmul.PackedWeight]
RandomWeight = Callable[[int, int], tuple[Tensor, Tensor]]

values = st.floats(-1000, 1000, width=32)
rows = st.lists(values, min_size=1, max_size=40)


def with_zero_point(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers in [0, 255], scale and zero point of every row, step by step in float32."""
    low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    return np.clip(np.rint(x / scale) + zero, 0, 255), scale, zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_symmetric_integers_are_those_of_the_grid(dtype: torch.dtype) -> None:
    tokens = torch.randn(7, 33).to(dtype)
    tokens[3] = 0
    before = tokens.clone()
    rounded = round_tokens(tokens)
    assert rounded.shift is None
    integers, scale = grid.quantize_rows(tokens)
    torch.testing.assert_close(rounded.integers, integers.float(), rtol=0, atol=0)
    torch.testing.assert_close(rounded.dequantize(), integers.float() * scale, rtol=0, atol=0)
    torch.testing.assert_close(tokens, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [-3.0, 0.0, 1.0, 50.0])
def test_integers_with_a_zero_point_are_numpys(dtype: torch.dtype, offset: float) -> None:
    tokens = (torch.randn(9, 65) + offset).to(dtype)
    before = tokens.clone()
    rounded = round_tokens(tokens, asymmetric=True)
    integers, scale, zero = with_zero_point(tokens.float().numpy())
    assert rounded.shift is not None
    torch.testing.assert_close(rounded.integers, torch.from_numpy(integers - 128), rtol=0, atol=0)
    torch.testing.assert_close(rounded.scale, torch.from_numpy(scale), rtol=0, atol=0)
    torch.testing.assert_close(rounded.shift, torch.from_numpy(128 - zero), rtol=0, atol=0)
    torch.testing.assert_close(tokens, before, rtol=0, atol=0)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_prompts_are_rounded_as_short_ones(
    count: int, asymmetric: bool, dtype: torch.dtype
) -> None:
    tokens = (torch.randn(count, 33) + 1).to(dtype)
    before = tokens.clone()
    rounded, expected = rounded_rows(tokens, asymmetric), round_tokens(tokens, asymmetric)
    assert (rounded.integers.dtype == torch.int8) == (count > 64)
    torch.testing.assert_close(rounded.integers.float(), expected.integers, rtol=0, atol=0)
    torch.testing.assert_close(rounded.scale, expected.scale, rtol=0, atol=0)
    torch.testing.assert_close(rounded.shift, expected.shift, rtol=0, atol=0)
    torch.testing.assert_close(tokens, before, rtol=0, atol=0)


@given(rows)
@settings(deadline=None)
def test_no_value_moves_by_more_than_half_a_step(row: list[float]) -> None:
    tokens = torch.tensor([row])
    rounded = round_tokens(tokens, asymmetric=True)
    assert rounded.integers.min() >= -128
    assert rounded.integers.max() <= 127
    # A whole step where both ends are ties; float32 rounds on the way.
    error = (rounded.dequantize() - tokens).abs().max()
    assert error <= 0.5001 * rounded.scale + 1e-6 or _ends_are_ties(tokens, rounded.scale)


def _ends_are_ties(tokens: Tensor, scale: Tensor) -> bool:
    return bool(((tokens.min() / scale) % 1 == 0.5).all())


def test_both_ends_on_ties_stay_in_the_range() -> None:
    tokens = torch.tensor([[-1.5, 253.5, 3.0]])
    rounded = round_tokens(tokens, asymmetric=True)
    assert rounded.scale.item() == 1
    assert rounded.integers.max().item() == 127


def test_zero_stays_zero() -> None:
    tokens = torch.tensor([[0.0, 3.0, 1.3], [0.0, -5.0, 2.0], [0.0, 0.0, 0.0]])
    rounded = round_tokens(tokens, asymmetric=True)
    torch.testing.assert_close(rounded.dequantize()[:, 0], torch.zeros(3), rtol=0, atol=0)
    torch.testing.assert_close(rounded.dequantize()[2], torch.zeros(3), rtol=0, atol=0)


def test_values_of_one_sign_have_half_the_step() -> None:
    tokens = torch.rand(1, 1000)
    ratio = round_tokens(tokens).scale / round_tokens(tokens, asymmetric=True).scale
    assert ratio.item() == pytest.approx(255 / 127)


def test_rows_can_be_taken() -> None:
    rounded = round_tokens(torch.randn(5, 8) + 1, asymmetric=True)
    order = torch.tensor([3, 3, 0])
    torch.testing.assert_close(
        rounded[order].dequantize(), rounded.dequantize()[order], rtol=0, atol=0
    )
    symmetric = round_tokens(torch.randn(5, 8))
    assert symmetric[1:3].shift is None


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_the_product_equals_numpy(
    pack: Pack, random_weight: RandomWeight, tokens: int, with_bias: bool
) -> None:
    weight, scale = random_weight(77, 333)
    bias = torch.randn(77) if with_bias else None
    x = torch.nn.functional.silu(torch.randn(tokens, 333))
    result = matmul.linear(x, pack(weight, scale), bias, row_sums(weight, scale))
    integers, token_scale, zero = with_zero_point(x.numpy())
    sums = (integers - 128).astype(np.int64) @ weight.numpy().astype(np.int64).T
    ones = weight.numpy().astype(np.int64).sum(1).astype(np.float32) * scale.numpy()[:, 0]
    # torch may fuse this multiplication and addition: one rounding, of the larger term, less.
    expected = sums.astype(np.float32) * scale.numpy()[:, 0] + (128 - zero) * ones
    expected = expected * token_scale + (0 if bias is None else bias.numpy())
    largest = float(np.abs(sums * scale.numpy()[:, 0] * token_scale).max())
    torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=2e-7 * largest)


def test_a_zero_point_halves_the_error_of_a_relu(pack: Pack, random_weight: RandomWeight) -> None:
    weight, scale = random_weight(40, 500)
    x = torch.relu(torch.randn(20, 500))
    exact = x.double() @ (weight.double() * scale).T
    packed = pack(weight, scale)
    symmetric = (matmul.linear(x, packed).double() - exact).norm()
    asymmetric = (matmul.linear(x, packed, None, row_sums(weight, scale)).double() - exact).norm()
    assert asymmetric < 0.6 * symmetric


def test_a_token_with_nan_spoils_only_itself(pack: Pack, random_weight: RandomWeight) -> None:
    weight, scale = random_weight(6, 20)
    x = torch.rand(3, 20)
    x[1, 4] = torch.nan
    result = matmul.linear(x, pack(weight, scale), None, row_sums(weight, scale))
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()

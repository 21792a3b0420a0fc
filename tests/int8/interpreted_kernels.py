"""The arithmetic of Triton's kernels, under its interpreter: run by `test_kernels.py`, or by

    TRITON_INTERPRET=1 python -m pytest tests/int8/interpreted_*.py

Everything is compared with numpy: sums in int64, what is around them in float32, step by step. The
interpreter's bfloat16 results are cut, not rounded; that kernels round them is a matter of one
instruction, which `test_kernels.py` looks for in what is compiled for a GPU.
"""

import functools

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import cuda, kernels, matmul, reference
from haq.int8.kernels import Int8Tokens, Plan
from haq.int8.tokens import round_tokens, row_sums

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# What division by an infinite scale, or of NaN, makes the interpreter's numpy say.
not_finite = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

TINY = Plan(16, 16, 32)
PLANS = {
    "first": None,
    "tiny": TINY,
    "wide": Plan(16, 64, 32),
    "high": Plan(64, 16, 32),
    "split in 2": Plan(16, 32, 32, split=2),
    "split in 5": Plan(32, 16, 64, split=5),
}


def test_the_interpreter_runs() -> None:
    assert triton.knobs.runtime.interpret


# --- Tokens ---------------------------------------------------------------------------------------


def numpy_tokens(
    x: np.ndarray, asymmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Integers, scale and shift of finite rows, step by step in float32."""
    tiny = np.finfo(np.float32).tiny
    if not asymmetric:
        largest = np.abs(x).max(-1, keepdims=True)
        scale = np.maximum(largest, tiny * np.float32(127)) / np.float32(127)
        return np.rint(x / scale), scale, None
    low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
    scale = np.maximum((high - low) / np.float32(255), tiny)
    shift = np.rint(low / scale) + np.float32(128)
    return np.minimum(np.rint(x / scale) - shift, 127), scale, shift


def assert_tokens(tokens: Tensor, asymmetric: bool) -> None:
    integers, scale, shift = numpy_tokens(tokens.float().numpy(), asymmetric)
    result = kernels.quantize_tokens(tokens, asymmetric)
    assert result.integers.dtype == torch.int8
    np.testing.assert_array_equal(result.integers.numpy(), integers)
    np.testing.assert_array_equal(result.scale.numpy(), scale)
    if shift is None:
        assert result.shift is None
    else:
        assert result.shift is not None
        np.testing.assert_array_equal(result.shift.numpy(), shift)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (7, 333)], ids=str)
def test_tokens_are_numpys(shape: tuple[int, int], asymmetric: bool, dtype: torch.dtype) -> None:
    for offset in (0.0, 2.0, -2.0):
        assert_tokens((torch.randn(shape) + offset).to(dtype), asymmetric)


@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_token_is_numpys(row: list[float], asymmetric: bool) -> None:
    assert_tokens(torch.tensor([row]), asymmetric)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
def test_columns_that_do_not_fit_in_one_program(
    monkeypatch: pytest.MonkeyPatch, asymmetric: bool
) -> None:
    monkeypatch.setattr(kernels.tokens, "_MOST_COLUMNS", 32)
    x = torch.randn(4, 75)
    x[0, 3], x[1, 40], x[2, 74] = 9.0, -9.0, 9.0
    assert_tokens(x, asymmetric)


def test_ties_go_to_even() -> None:
    ties = torch.arange(-126, 127) + 0.5
    above, below = torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)
    x = torch.cat([torch.stack([ties, above, below]), torch.full((3, 1), 127.0)], dim=1)
    result = kernels.quantize_tokens(x)
    np.testing.assert_array_equal(result.scale.numpy(), np.ones((3, 1)))
    np.testing.assert_array_equal(result.integers.numpy(), np.rint(x.numpy()))


def test_both_ends_on_ties_stay_in_the_range() -> None:
    assert_tokens(torch.tensor([[-1.5, 253.5, 3.0]]), asymmetric=True)
    result = kernels.quantize_tokens(torch.tensor([[-1.5, 253.5, 3.0]]), asymmetric=True)
    assert result.integers.max() == 127


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-38, 3e38], ids=str)
def test_the_ends_of_float32(magnitude: float, asymmetric: bool) -> None:
    x = torch.tensor([[magnitude, 0.0, magnitude / 3]])
    assert_tokens(x, asymmetric)
    assert_tokens(-x, asymmetric)


@not_finite
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_does_what_the_cpus_does(value: float, asymmetric: bool) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = value
    result, expected = kernels.quantize_tokens(x, asymmetric), round_tokens(x, asymmetric)
    assert_same = functools.partial(torch.testing.assert_close, rtol=0.0, atol=0.0, equal_nan=True)
    assert_same(result.scale, expected.scale)
    assert_same(result.shift, expected.shift)
    # What is NaN there has no integer.
    assert_same(result.integers.float(), expected.integers.nan_to_num(0))
    assert not result.scale[1].isfinite().any()


def test_layout_of_the_tokens_does_not_matter() -> None:
    assert_tokens(torch.randn(6, 4).t(), asymmetric=False)
    assert_tokens(torch.randn(4, 12)[:, ::2], asymmetric=True)


def test_no_tokens() -> None:
    result = kernels.quantize_tokens(torch.empty(0, 5), asymmetric=True)
    assert result.shift is not None
    assert (result.integers.shape, result.scale.shape, result.shift.shape) == (
        (0, 5),
        (0, 1),
        (0, 1),
    )


# --- One product ----------------------------------------------------------------------------------


def numpy_linear(
    tokens: Int8Tokens,
    weight: Tensor,
    scale: Tensor,
    row_sums: Tensor | None = None,
    bias: Tensor | None = None,
) -> np.ndarray:
    """The formula of `haq.int8.matmul`, float32, from the sums on."""
    sums = tokens.integers.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    result: np.ndarray = sums.astype(np.float32) * scale.numpy().reshape(1, -1)
    if tokens.shift is not None:
        assert row_sums is not None
        result = result + tokens.shift.numpy() * row_sums.numpy()
    result = result * tokens.scale.numpy()
    return result if bias is None else result + bias.numpy()


def random_tokens(tokens: int, columns: int, shifted: bool = False) -> Int8Tokens:
    shape = (tokens, columns)
    return Int8Tokens(
        torch.randint(-128 if shifted else -127, 128, shape, dtype=torch.int8),
        torch.rand(tokens, 1) + 0.01,
        torch.randint(-127, 129, (tokens, 1)).float() if shifted else None,
    )


def random_weight(*shape: int) -> tuple[Tensor, Tensor]:
    """Int8 over the whole range, and float32 scales of its rows."""
    return torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(*shape[:-1], 1) + 0.01


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 48), (17, 75, 45), (130, 33, 19)], ids=str)
def test_products_are_numpys(shape: tuple[int, int, int], plan: Plan | None) -> None:
    count, columns, outs = shape
    tokens, (weight, scale) = random_tokens(count, columns), random_weight(outs, columns)
    result = kernels.int8_linear(tokens, weight, scale, plan=plan)
    np.testing.assert_array_equal(result.numpy(), numpy_linear(tokens, weight, scale))


@pytest.mark.parametrize("count", range(1, 21))
def test_any_small_number_of_tokens(count: int) -> None:
    tokens, (weight, scale) = random_tokens(count, 40), random_weight(18, 40)
    for plan in (TINY, Plan(16, 16, 32, split=2)):
        result = kernels.int8_linear(tokens, weight, scale, plan=plan)
        np.testing.assert_array_equal(result.numpy(), numpy_linear(tokens, weight, scale))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shifted", [False, True], ids=["symmetric", "zero point"])
def test_what_follows_the_sums(shifted: bool, with_bias: bool, plan: Plan | None) -> None:
    tokens, (weight, scale) = random_tokens(5, 70, shifted), random_weight(33, 70)
    sums = row_sums(weight, scale) if shifted else None
    bias = torch.randn(33) * 1e3 if with_bias else None
    result = kernels.int8_linear(tokens, weight, scale, sums, bias, plan=plan)
    expected = numpy_linear(tokens, weight, scale, sums, bias)
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("shifted", [False, True], ids=["symmetric", "zero point"])
def test_the_dtype_of_the_result(shifted: bool, plan: Plan | None) -> None:
    tokens, (weight, scale) = random_tokens(5, 70, shifted), random_weight(33, 70)
    scale = scale / 1e3
    sums = row_sums(weight, scale) if shifted else None
    expected = torch.from_numpy(numpy_linear(tokens, weight, scale, sums))
    half = kernels.int8_linear(tokens, weight, scale, sums, dtype=torch.float16, plan=plan)
    torch.testing.assert_close(half, expected.half(), rtol=0, atol=0)
    brain = kernels.int8_linear(tokens, weight, scale, sums, dtype=torch.bfloat16, plan=plan)
    torch.testing.assert_close(brain.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("split", [1, 2])
def test_sums_that_float32_does_not_hold_are_exact_before_they_are_rounded(split: int) -> None:
    columns = 20_001
    weight = torch.full((3, columns), -128, dtype=torch.int8)
    weight[1:] = 127
    weight[2, 0] = 126
    tokens = Int8Tokens(torch.full((2, columns), 127, dtype=torch.int8), torch.ones(2, 1))
    tokens.integers[1, ::2] = -128
    plan = Plan(16, 16, 256, split=split)
    result = kernels.int8_linear(tokens, weight, torch.ones(3, 1), plan=plan)
    expected = numpy_linear(tokens, weight, torch.ones(3, 1))
    assert np.abs(expected).max() > 2**28
    np.testing.assert_array_equal(result.numpy(), expected)


def test_the_proof_accepts_the_kernels() -> None:
    assert reference.difference(cuda.TritonWeight, torch.device("cpu")) == ""


def test_the_proof_refuses_sums_that_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernels.int8_product

    def saturating(*operands: Tensor) -> Tensor:
        return exact(*operands).clamp(max=2.0**23)

    monkeypatch.setattr(kernels, "int8_product", saturating)
    assert "int64" in reference.difference(cuda.TritonWeight, torch.device("cpu"))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_is_numpys(dtype: torch.dtype, asymmetric: bool, with_bias: bool) -> None:
    """From floats to floats, and any leading shape."""
    weight, scale = random_weight(21, 50)
    scale = scale / 100
    x = (torch.randn(2, 3, 50) + 0.5).to(dtype)
    sums = row_sums(weight, scale) if asymmetric else None
    bias = torch.randn(21) if with_bias else None
    result = matmul.linear(x, cuda.TritonWeight(weight, scale), bias, sums)
    integers, token_scale, shift = numpy_tokens(x.float().numpy().reshape(6, 50), asymmetric)
    tokens = Int8Tokens(
        torch.from_numpy(integers).char(),
        torch.from_numpy(token_scale),
        None if shift is None else torch.from_numpy(shift),
    )
    expected = numpy_linear(tokens, weight, scale, sums, bias)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result, torch.from_numpy(expected).to(dtype).view(2, 3, 21), rtol=0, atol=0
    )


def test_linear_of_bfloat16_has_the_integers_of_bfloat16() -> None:
    weight, scale = random_weight(21, 50)
    packed, x = cuda.TritonWeight(weight, scale), torch.randn(4, 50).bfloat16()
    expected = matmul.linear(x.float(), packed)
    torch.testing.assert_close(matmul.linear(x, packed).float(), expected, rtol=2**-7, atol=0)


def test_float64_is_computed_in_float32() -> None:
    packed, x = cuda.TritonWeight(*random_weight(7, 33)), torch.randn(2, 33)
    expected = matmul.linear(x, packed).double()
    torch.testing.assert_close(matmul.linear(x.double(), packed), expected, rtol=0, atol=0)


@not_finite
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    packed = cuda.TritonWeight(*random_weight(5, 33))
    clean = torch.randn(3, 33)
    spoiled = clean.clone()
    spoiled[1, 7] = value
    result, expected = matmul.linear(spoiled, packed), matmul.linear(clean, packed)
    assert not result[1].isfinite().any()
    torch.testing.assert_close(result[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


def test_a_token_gives_the_same_bits_alone_in_a_batch_and_again() -> None:
    packed, x = cuda.TritonWeight(*random_weight(37, 133)), torch.randn(40, 133)
    bias = torch.randn(37)
    together = matmul.linear(x, packed, bias)
    alone = torch.cat([matmul.linear(token[None], packed, bias) for token in x])
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
    torch.testing.assert_close(matmul.linear(x, packed, bias), together, rtol=0, atol=0)


def test_a_weight_takes_the_numbers_of_another() -> None:
    packed = cuda.TritonWeight(*random_weight(5, 6))
    weight, _ = random_weight(5, 6)
    packed.write(weight)
    torch.testing.assert_close(packed.unpack(), weight, rtol=0, atol=0)


def test_the_product_of_no_tokens() -> None:
    packed = cuda.TritonWeight(*random_weight(5, 6))
    assert matmul.linear(torch.empty(2, 0, 6), packed).shape == (2, 0, 5)
    assert packed.product(torch.empty(0, 6)).shape == (0, 5)

"""Norms that round their result, under Triton's interpreter: see `interpreted_kernels.py`.

They are compared with the formula in float64. Sums of float32 in whatever order are off by a few
units of its last place, and so is what is made of them: 2^-20 of the largest number of the row is
allowed. bfloat16, which the interpreter cuts, is left to what is compiled.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from haq.int8 import kernels
from haq.int8.kernels import norm_tokens
from haq.int8.norm import Norm
from tests.int8.interpreted_kernels import not_finite

FORMULAS = [
    (centered, offset, cast_first, with_bias)
    for centered, offset, cast_first in itertools.product((False, True), (0, 1), (False, True))
    for with_bias in (False, True)
]
WITHIN = 2.0**-20


def exact(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float64, but for a rounding to the dtype of ``x`` before the weight."""
    rows = x.double()
    mean = rows.mean(-1, keepdim=True) if norm.centered else torch.zeros(())
    variance = (rows - mean).square().mean(-1, keepdim=True)
    result = (rows - mean) / (variance + norm.eps).sqrt()
    if norm.cast_first:
        result = result.to(x.dtype).double()
    result = result * (norm.offset + weight.double())
    return result if bias is None else result + bias.double()


def given(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool = True) -> tuple[Tensor, ...]:
    columns = shape[-1]
    x = (3 * torch.randn(shape) + 1).to(dtype)
    weight, bias = (torch.randn(columns).to(dtype) for _ in range(2))
    return (x, weight, bias) if with_bias else (x, weight)


def assert_norm(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result, _ = norm_tokens(x, norm, weight, bias)
    assert (result.shape, result.dtype) == (x.shape, x.dtype)
    expected = exact(x, norm, weight, bias)
    # What is rounded twice may be rounded to the next number the first time.
    half = torch.finfo(x.dtype).eps / 2
    rounding = (1.01 + 2 * norm.cast_first) * half * expected.abs()
    size = expected.abs().amax(-1, keepdim=True)
    assert bool(((result.double() - expected).abs() <= rounding + WITHIN * size).all())
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_norms_are_their_formulas(
    formula: tuple[bool, int, bool, bool], dtype: torch.dtype
) -> None:
    *parts, with_bias = formula
    for shape in ((3, 64), (2, 3, 75), (1, 1)):
        for eps in (1e-6, 0.5):
            x, *more = given(shape, dtype, with_bias)
            assert_norm(x, Norm(eps, *parts), *more)  # type: ignore[arg-type]


def test_where_the_result_is_rounded() -> None:
    x, weight = given((40, 256), torch.float16, with_bias=False)
    results = [norm_tokens(x, Norm(1e-6, False, 0, first), weight)[0] for first in (False, True)]
    for result, first in zip(results, (False, True), strict=True):
        expected = exact(x, Norm(1e-6, False, 0, first), weight, None).to(x.dtype)
        assert (result != expected).float().mean() < 0.01
    assert (results[0] != results[1]).float().mean() > 0.1


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_tokens_are_those_of_the_result(
    formula: tuple[bool, int, bool, bool], dtype: torch.dtype, asymmetric: bool
) -> None:
    *parts, with_bias = formula
    norm = Norm(1e-6, *parts)  # type: ignore[arg-type]
    x, *more = given((2, 3, 75), dtype, with_bias)
    result, tokens = norm_tokens(x, norm, *more, asymmetric=asymmetric)
    expected = kernels.quantize_tokens(result.view(6, 75), asymmetric)
    assert tokens is not None
    np.testing.assert_array_equal(tokens.integers.numpy(), expected.integers.numpy())
    np.testing.assert_array_equal(tokens.scale.numpy(), expected.scale.numpy())
    assert (tokens.shift is None) == (expected.shift is None) == (not asymmetric)
    if tokens.shift is not None and expected.shift is not None:
        np.testing.assert_array_equal(tokens.shift.numpy(), expected.shift.numpy())
    alone, nothing = norm_tokens(x, norm, *more)
    assert nothing is None
    torch.testing.assert_close(alone, result, rtol=0, atol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_columns_that_do_not_fit_in_one_program(
    monkeypatch: pytest.MonkeyPatch, centered: bool
) -> None:
    monkeypatch.setattr(kernels.tokens, "_MOST_COLUMNS", 32)
    norm = Norm(1e-6, centered, 0, False)
    x, *more = given((4, 75), torch.float32)
    result = assert_norm(x, norm, *more)
    for asymmetric in (False, True):
        _, tokens = norm_tokens(x, norm, *more, asymmetric=asymmetric)
        expected = kernels.quantize_tokens(result, asymmetric)
        assert tokens is not None
        assert torch.equal(tokens.integers, expected.integers)
        assert torch.equal(tokens.scale, expected.scale)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15], ids=str)
def test_rows_of_any_size(size: float, centered: bool) -> None:
    x, *more = given((3, 40), torch.float32)
    assert_norm(x * size, Norm(1e-6, centered, 0, False), *more)


def test_a_mean_much_larger_than_what_differs_from_it() -> None:
    x, *more = given((3, 64), torch.float32)
    result, _ = norm_tokens(x + 1000, Norm(1e-6, True, 0, False), *more)
    expected = exact(x + 1000, Norm(1e-6, True, 0, False), *more)
    # A thousandth of the mean: three of the seven digits are lost whoever computes it.
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)
    assert (result.mean() - expected.mean()).abs() < 1e-3


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("mean", [-50.0, 50.0])
def test_columns_beyond_the_last_one_are_in_no_token(mean: float, asymmetric: bool) -> None:
    """Read as zeros, they are far from the mean that is subtracted."""
    x, *more = given((4, 75), torch.float32)
    norm = Norm(1e-6, True, 1, False)
    result, tokens = norm_tokens(x + mean, norm, *more, asymmetric=asymmetric)
    expected = kernels.quantize_tokens(result, asymmetric)
    assert tokens is not None
    assert torch.equal(tokens.scale, expected.scale)
    assert torch.equal(tokens.integers, expected.integers)


@not_finite
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x, *more = given((3, 40), torch.float32)
    for norm in (Norm(1e-6, False, 0, True), Norm(1e-6, True, 0, False)):
        clean = norm_tokens(x, norm, *more, asymmetric=False)
        spoiled = x.clone()
        spoiled[1, 7] = value
        result, tokens = norm_tokens(spoiled, norm, *more, asymmetric=False)
        assert tokens is not None
        assert clean[1] is not None
        assert not result[1].isfinite().all()
        assert not tokens.scale[1].isfinite().all()
        assert torch.equal(result[[0, 2]], clean[0][[0, 2]])
        assert torch.equal(tokens.integers[[0, 2]], clean[1].integers[[0, 2]])


def test_layout_does_not_matter_and_nothing_is_written_to() -> None:
    x, weight, bias = given((6, 10), torch.float32)
    strided, before = x.t().contiguous().t(), x.clone()
    norm = Norm(1e-6, True, 0, False)
    result, _ = norm_tokens(strided, norm, weight, bias)
    torch.testing.assert_close(result, norm_tokens(x, norm, weight, bias)[0], rtol=0, atol=0)
    assert result.is_contiguous()
    assert torch.equal(x, before)
    assert torch.equal(strided, before)


def test_no_tokens() -> None:
    x, weight = given((0, 2, 5), torch.float32, with_bias=False)
    result, tokens = norm_tokens(x, Norm(1e-6, False, 0, False), weight, asymmetric=True)
    assert tokens is not None
    assert (result.shape, tokens.integers.shape, tokens.scale.shape) == ((0, 2, 5), (0, 5), (0, 1))


ONES = torch.ones(2, 6)
MISTAKES = {
    "integers": ((ONES.int(), ONES[0]), TypeError, "`x` must be a float tensor, got torch.int32"),
    "a number": ((torch.ones(()), ONES[0]), ValueError, r"shape \[..., K\], K > 0, got \[\]"),
    "no columns": ((ONES[:, :0], ONES[0, :0]), ValueError, r"K > 0, got \[2, 0\]"),
    "another dtype": (
        (ONES, ONES[0].half()),
        TypeError,
        "`weight` must be torch.float32, as `x` is, got torch.float16",
    ),
    "another size": (
        (ONES, ONES[0, 1:]),
        ValueError,
        r"`weight` must be a contiguous tensor \[6\], got shape \[5\] and strides \[1\]",
    ),
    "a column": (
        (ONES.t(), ONES[0, :2], ONES[:, 0]),
        ValueError,
        r"`bias` must be a contiguous tensor \[2\], got shape \[2\] and strides \[6\]",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    x, *more = arguments
    with pytest.raises(error, match=message):
        norm_tokens(x, Norm(1e-6, False, 0, False), *more)

"""The arithmetic of Triton's kernels, under its interpreter: run by `test_kernels.py`, or by

    TRITON_INTERPRET=1 python -m pytest tests/int8/interpreted_kernels.py

Everything is compared with numpy: sums in int64, what is around them in float32, step by step. The
interpreter's bfloat16 results are cut, not rounded; that kernels round them is a matter of one
instruction, which `test_kernels.py` looks for in what is compiled for a GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import cuda, kernels, matmul, reference
from haq.int8.kernels import Int8Tokens, Plan, Tiles
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
    monkeypatch.setattr(kernels, "_MOST_COLUMNS", 32)
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


# --- Products of many experts ---------------------------------------------------------------------


def numpy_grouped(
    tokens: Int8Tokens,
    weight: Tensor,
    scale: Tensor,
    groups: list[tuple[int, int, int]],
    index: Tensor,
    gates: Tensor | None = None,
    row_sums: Tensor | None = None,
    bias: Tensor | None = None,
) -> np.ndarray:
    """Row by row."""
    result = np.zeros((len(index), weight.shape[1]), dtype=np.float32)
    for slot, first, count in groups:
        for row in range(first, first + count):
            chosen = slice(int(index[row]), int(index[row]) + 1)
            token = Int8Tokens(
                tokens.integers[chosen],
                tokens.scale[chosen],
                None if tokens.shift is None else tokens.shift[chosen],
            )
            of_slot = (None if values is None else values[slot] for values in (row_sums, bias))
            result[row] = numpy_linear(token, weight[slot], scale[slot], *of_slot)
            if gates is not None:
                result[row] *= gates[row].item()
    return result


GROUPS = {
    "one row each": [(2, 0, 1), (0, 1, 1)],
    "out of order": [(3, 0, 3), (0, 3, 5), (1, 8, 2)],
    "empty experts": [(0, 0, 0), (1, 0, 4), (2, 4, 0), (3, 4, 6)],
    "one expert has all": [(2, 0, 40)],
    "many tiles": [(1, 0, 17), (0, 17, 16), (3, 33, 70)],
    "rows of nobody": [(1, 2, 3), (0, 7, 20)],
    "a slot twice": [(1, 0, 3), (0, 3, 2), (1, 5, 3)],
}


def rows_of(groups: list[tuple[int, int, int]]) -> int:
    return max(first + count for _, first, count in groups)


@pytest.mark.parametrize("block_m", [None, 16, 64])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_experts_are_numpys(groups: list[tuple[int, int, int]], block_m: int | None) -> None:
    rows = rows_of(groups)
    tokens, (weight, scale) = random_tokens(rows, 35), random_weight(4, 19, 35)
    tiles = kernels.row_tiles(groups, "cpu", block_m)
    result = kernels.grouped_linear(tokens, weight, scale, tiles, plan=Plan(tiles.block_m, 16, 32))
    expected = numpy_grouped(tokens, weight, scale, groups, torch.arange(rows))
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shifted", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("gate_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_experts_with_everything(
    index_dtype: torch.dtype, gate_dtype: torch.dtype | None, shifted: bool, with_bias: bool
) -> None:
    groups = [(3, 0, 18), (1, 18, 2), (0, 20, 3)]
    tokens, (weight, scale) = random_tokens(7, 64, shifted), random_weight(4, 33, 64)
    index = torch.randint(0, 7, (23,)).to(index_dtype)
    gates = None if gate_dtype is None else torch.rand(23).to(gate_dtype)
    sums = weight.sum(-1, dtype=torch.int32).float() * scale[..., 0] if shifted else None
    bias = torch.randn(4, 33) * 1e3 if with_bias else None
    tiles = kernels.row_tiles(groups, "cpu")
    result = kernels.grouped_linear(
        tokens, weight, scale, tiles, index=index, gates=gates, row_sums=sums, bias=bias
    )
    expected = numpy_grouped(tokens, weight, scale, groups, index, gates, sums, bias)
    np.testing.assert_array_equal(result.numpy(), expected)
    half = kernels.grouped_linear(
        tokens,
        weight,
        scale / 1e3,
        tiles,
        index=index,
        gates=gates,
        row_sums=None if sums is None else sums / 1e3,
        dtype=torch.float16,
    )
    expected = numpy_grouped(
        tokens, weight, scale / 1e3, groups, index, gates, None if sums is None else sums / 1e3
    )
    torch.testing.assert_close(half, torch.from_numpy(expected).half(), rtol=0, atol=0)


def test_no_rows() -> None:
    tiles = kernels.row_tiles([(0, 0, 0)], "cpu")
    weight, scale = random_weight(1, 5, 6)
    result = kernels.grouped_linear(random_tokens(0, 6), weight, scale, tiles)
    assert result.shape == (0, 5)
    result = kernels.grouped_linear(random_tokens(2, 6), weight, scale, tiles)
    torch.testing.assert_close(result, torch.zeros(2, 5), rtol=0, atol=0)


def test_the_height_of_tiles_follows_the_mean() -> None:
    def height(*counts: int) -> int:
        groups = [(0, sum(counts[:place]), count) for place, count in enumerate(counts)]
        return kernels.row_tiles(groups, "cpu").block_m

    assert [height(1), height(16, 0, 0), height(32, 1), height(64), height(65)] == [
        16,
        16,
        64,
        64,
        128,
    ]


# --- Bad input ------------------------------------------------------------------------------------


def linear_with(**changes: Any) -> Callable[[], object]:
    """A call of `int8_linear` in which something is wrong."""
    tokens = {"integers": torch.ones(2, 6).char(), "scale": torch.ones(2, 1), "shift": None}
    weight = {"weight": torch.ones(5, 6).char(), "weight_scale": torch.ones(5, 1)}
    for name, value in changes.items():
        (tokens if name in tokens else weight)[name] = value
    return lambda: kernels.int8_linear(Int8Tokens(**tokens), **weight)  # type: ignore[arg-type]


def tiles_of(*groups: tuple[int, int, int]) -> Tiles:
    return kernels.row_tiles(groups, "cpu")


def grouped_with(tiles: Tiles | None = None, **changes: Any) -> Callable[[], object]:
    tiles = tiles_of((0, 0, 2)) if tiles is None else tiles
    weight = {"weight": torch.ones(3, 5, 6).char(), "weight_scale": torch.ones(3, 5), **changes}
    return lambda: kernels.grouped_linear(random_tokens(2, 6), tiles=tiles, **weight)


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "tokens of integers": (
        lambda: kernels.quantize_tokens(torch.ones(1, 2).int()),
        TypeError,
        r"`tokens` must be a float tensor, got torch.int32",
    ),
    "a token alone": (
        lambda: kernels.quantize_tokens(torch.ones(2)),
        ValueError,
        r"`tokens` must be a matrix \[T, K\], K > 0, got \[2\]",
    ),
    "tokens of nothing": (
        lambda: kernels.quantize_tokens(torch.ones(2, 0)),
        ValueError,
        r"K > 0, got \[2, 0\]",
    ),
    "float integers": (
        linear_with(integers=torch.ones(2, 6)),
        TypeError,
        "`integers` must be int8, got torch.float32",
    ),
    "a float weight": (
        linear_with(weight=torch.ones(5, 6)),
        TypeError,
        "`weight` must be int8, got torch.float32",
    ),
    "other columns": (
        linear_with(integers=torch.ones(2, 7).char()),
        ValueError,
        r"`integers` must be a contiguous matrix \[T, 6\], got shape \[2, 7\]",
    ),
    "a transposed weight": (
        linear_with(weight=torch.ones(6, 5).char().t()),
        ValueError,
        r"`weight` must be a contiguous tensor \[N, K\], got shape \[5, 6\] and strides \[1, 5\]",
    ),
    "half scales": (
        linear_with(weight_scale=torch.ones(5, 1).half()),
        TypeError,
        "`weight_scale` must be float32, got torch.float16",
    ),
    "too few scales": (
        linear_with(weight_scale=torch.ones(1, 1)),
        ValueError,
        r"`weight_scale` must be a contiguous tensor \[5\], got shape \[1, 1\]",
    ),
    "a bias of another layer": (
        linear_with(bias=torch.ones(4)),
        ValueError,
        r"`bias` must be a contiguous tensor \[5\], got shape \[4\]",
    ),
    "a shift alone": (
        linear_with(shift=torch.ones(2, 1)),
        ValueError,
        "have a shift, got no `row_sums` and a shift",
    ),
    "row sums alone": (
        linear_with(row_sums=torch.ones(5)),
        ValueError,
        "have a shift, got `row_sums` and no shift",
    ),
    "one slot for many": (
        grouped_with(weight=torch.ones(5, 6).char()),
        ValueError,
        r"`weight` must be a contiguous tensor \[S, N, K\], got shape \[5, 6\]",
    ),
    "scales of one slot": (
        grouped_with(weight_scale=torch.ones(5)),
        ValueError,
        r"`weight_scale` must be a contiguous tensor \[3, 5\], got shape \[5\]",
    ),
    "too few rows": (
        grouped_with(tiles_of((0, 1, 2))),
        ValueError,
        "at most 2 rows and 3 slots, which is what there is, got 3 and 1",
    ),
    "too few slots": (
        grouped_with(tiles_of((3, 0, 2))),
        ValueError,
        "at most 2 rows and 3 slots, which is what there is, got 2 and 4",
    ),
    "an index of floats": (
        grouped_with(index=torch.zeros(2)),
        TypeError,
        "`index` must be int32 or int64, got torch.float32",
    ),
    "gates of integers": (
        grouped_with(gates=torch.zeros(2).int()),
        TypeError,
        "`gates` must be a float tensor, got torch.int32",
    ),
    "gates of other rows": (
        grouped_with(gates=torch.zeros(3)),
        ValueError,
        r"`gates` must be a contiguous tensor \[2\], got shape \[3\]",
    ),
    "a plan for other tiles": (
        grouped_with(plan=Plan(64, 16, 32)),
        ValueError,
        "`plan` must be for tiles of 16 rows, unsplit, got Plan",
    ),
    "a plan that splits": (
        grouped_with(plan=Plan(16, 16, 32, split=2)),
        ValueError,
        "`plan` must be for tiles of 16 rows, unsplit, got Plan",
    ),
    "a negative slot": (
        lambda: tiles_of((-1, 0, 2)),
        ValueError,
        r"`groups` must not be negative, got \(-1, 0, 2\)",
    ),
    "rows of two experts": (
        lambda: tiles_of((0, 2, 2), (1, 0, 3)),
        ValueError,
        "must not share rows, got one that starts at row 2, while another one ends at row 3",
    ),
    "tiles of another height": (
        lambda: kernels.row_tiles([], "cpu", block_m=32),
        ValueError,
        r"`block_m` must be one of \[16, 64, 128\], got 32",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_kernel_that_fails_is_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what the choice of a backend passes over."""
    monkeypatch.setattr(kernels, "_PLANS", {16: (Plan(16, 16, 33),)})  # no power of 2
    with pytest.raises(RuntimeError, match="Triton cannot run its kernels here: "):
        cuda.TritonWeight(*random_weight(5, 6)).product(torch.ones(1, 6))


def test_no_launch_lets_the_compiler_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter fuses nothing anyway; a GPU's compiler would, unless it is told."""
    fused = []

    class Kernel:
        def __getitem__(self, launch_grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *operands, enable_fp_fusion, **options: fused.append(enable_fp_fusion)

    for name in ("_quantize_kernel", "_linear_kernel", "_add_kernel", "_grouped_kernel"):
        monkeypatch.setattr(kernels, name, Kernel())
    tokens, (weight, scale) = random_tokens(2, 6), random_weight(1, 5, 6)
    kernels.quantize_tokens(torch.ones(2, 6))
    kernels.int8_linear(tokens, weight[0], scale[0], plan=Plan(16, 16, 32, split=2))
    kernels.grouped_linear(tokens, weight, scale, tiles_of((0, 0, 2)))
    assert fused == [False] * 4


# --- The choice of a plan -------------------------------------------------------------------------

SLOW, FAST = Plan(16, 32, 32), Plan(16, 16, 32)
WRONG, TOO_LARGE = Plan(16, 16, 64), Plan(16, 16, 128)
KEY = ("linear", torch.device("cpu"), 16, 1024, 1024, torch.float32)


class Clock:
    """A GPU on which plans take known times, of which one is wrong and one does not start."""

    def __init__(self) -> None:
        self.calls: list[Plan] = []
        self.result = torch.tensor([torch.nan, 1.0])

    def run(self, plan: Plan) -> Tensor:
        self.calls.append(plan)
        if plan == TOO_LARGE:
            raise RuntimeError("out of resource: shared memory")
        return self.result + (plan == WRONG)

    def seconds(self, run: Callable[[], Tensor]) -> float:
        run()
        return {SLOW: 2.0, FAST: 1.0, WRONG: 0.5}[self.calls[-1]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(kernels, "_seconds", clock.seconds)
    monkeypatch.setattr(kernels, "_fastest_plans", {})
    monkeypatch.setattr(kernels, "_can_measure", lambda: True)
    return clock


def test_the_fastest_plan_that_is_right_is_measured_once(clock: Clock) -> None:
    plans = (SLOW, WRONG, TOO_LARGE, FAST)
    assert kernels._fastest(KEY, plans, clock.run, 1) == FAST
    calls = len(clock.calls)
    assert kernels._fastest(KEY, plans, clock.run, 1) == FAST
    assert len(clock.calls) == calls
    other = (*KEY[:3], 2048, *KEY[4:])
    assert kernels._fastest(other, (SLOW, WRONG), clock.run, 1) == SLOW


@pytest.mark.parametrize("where", ["unmeasurable", "small", "idle"])
def test_the_first_plan_where_nothing_is_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    key, work = KEY, 1
    if where == "unmeasurable":
        monkeypatch.setattr(kernels, "_can_measure", lambda: False)
    elif where == "small":
        key = (*KEY[:3], 64, 64, torch.float32)
    else:
        work = 0
    assert kernels._fastest(key, (SLOW, FAST), clock.run, work) == SLOW
    assert clock.calls == []
    assert kernels._fastest_plans == {}


@pytest.mark.parametrize("capturing", [False, True], ids=["free", "capturing"])
@pytest.mark.parametrize("interpreted", [False, True], ids=["compiled", "interpreted"])
def test_where_time_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, interpreted: bool, capturing: bool
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert kernels._can_measure() == (not interpreted and not capturing)


def test_products_choose_by_their_size_and_tokens(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size and range of tokens is measured by its own plans, the result is that of one."""
    monkeypatch.setattr(kernels, "_WORTH_TUNING", 1)
    monkeypatch.setattr(kernels, "_PLANS", {16: (SLOW, FAST), float("inf"): (Plan(32, 16, 32),)})
    monkeypatch.setattr(kernels, "_seconds", lambda run: float(run().shape[0]))
    weight, scale = random_weight(5, 6)
    for count in (1, 16, 17):
        tokens = random_tokens(count, 6)
        result = kernels.int8_linear(tokens, weight, scale)
        np.testing.assert_array_equal(result.numpy(), numpy_linear(tokens, weight, scale))
    kernels.grouped_linear(tokens, weight[None], scale[None], tiles_of((0, 0, 17)))
    assert sorted(key[0] for key in kernels._fastest_plans) == ["grouped", "linear", "linear"]

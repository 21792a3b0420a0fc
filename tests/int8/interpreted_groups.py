"""The products of many experts, under Triton's interpreter: see `interpreted_kernels.py`."""

import numpy as np
import pytest
import torch
from torch import Tensor

from haq.int8 import kernels
from haq.int8.kernels import Int8Tokens, Plan
from tests.int8.interpreted_kernels import numpy_linear, random_tokens, random_weight


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

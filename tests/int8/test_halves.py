"""A layer in 16 bits for one token, in each way that processors have, against float64."""

from typing import Any

import pytest
import torch

from haq.int8 import matmul

if not matmul.compiles():
    pytest.skip("LLVM's kernels do not run here", allow_module_level=True)

from haq.int8.llvm import compiler, halves
from haq.int8.llvm.dots import FoursOfBytes, PairsOfWords, ahead
from haq.int8.llvm.halves import Pairs

WAYS = {"widened": None, "pairs": Pairs(), "pairs, written out": Pairs(instruction=False)}

COMPILED: dict[Any, dict[tuple[Any, ...], compiler.Kernel]] = {}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pairs | None:
    pairs: Pairs | None = request.param
    if pairs == Pairs() and halves.pairs_here() is None:
        pytest.skip("this processor does not multiply pairs of bfloat16")
    if pairs is not None and compiler.dots_here().sums != halves._PAIRS:
        pytest.skip("this processor has no registers of 512 bits")
    monkeypatch.setattr(halves, "pairs_here", lambda: pairs)
    monkeypatch.setattr(compiler, "_kernels", COMPILED.setdefault(pairs, {}))
    return pairs


@pytest.mark.parametrize("width", [1, 31, 32, 96, 257, 2048, 2089])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_those_of_float32(
    dtype: torch.dtype, bias: bool, width: int, way: Pairs | None
) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(37, width, generator=generator).to(dtype)
    weight[5] = 1.0  # The sum of the token's numbers: none may be missing, or come twice.
    x = torch.randn(1, width, generator=generator).to(dtype)
    shift = torch.randn(37, generator=generator).to(dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    result = halves.linear(x, weight, shift)
    assert (result.shape, result.dtype) == ((1, 37), dtype)
    size = x.double().abs() @ weight.double().abs().T
    step = torch.finfo(dtype).eps / 2
    assert ((result - exact).abs() <= step * exact.abs() + 2.0**-20 * size).all()


def test_what_is_neither_number_nor_finite_is_seen(way: Pairs | None) -> None:
    weight, x = torch.ones(3, 64).bfloat16(), torch.ones(1, 64).bfloat16()
    weight[1, 33], weight[2, 7] = torch.nan, torch.inf
    result = halves.linear(x, weight, None)
    assert result[0, 0] == 64
    assert result[0, 1].isnan()
    assert result[0, 2] == torch.inf


@pytest.mark.parametrize(
    ("feature", "sums", "expected"), [(True, 16, Pairs()), (True, 8, None), (False, 16, None)]
)
def test_who_multiplies_pairs(
    feature: bool, sums: int, expected: Pairs | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves.llvm, "get_host_cpu_features", lambda: {"avx512bf16": feature})
    monkeypatch.setattr(compiler, "dots_here", lambda: PairsOfWords(32 * sums))
    halves._has_instruction.cache_clear()
    try:
        assert halves.pairs_here() == expected
    finally:
        halves._has_instruction.cache_clear()


@pytest.mark.parametrize(
    ("dots", "expected"),
    [
        (FoursOfBytes(512, 32, matrices=True), 4096),
        (FoursOfBytes(512, 32), 0),
        (FoursOfBytes(256, 16), 1024),
        (PairsOfWords(512), 0),
        (PairsOfWords(256), 1024),
    ],
    ids=["AMX", "VNNI", "AVX-VNNI", "AVX512", "AVX2"],
)
def test_how_far_ahead_memory_is_asked_for(dots: Any, expected: int) -> None:
    assert ahead(dots) == expected

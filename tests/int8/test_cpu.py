"""Packing for the CPU's products, and what it must not do to the process."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import cpu, matmul

fixtures_are_constant = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**31))
@fixtures_are_constant
def test_unpacking_gives_the_weight_back(
    pack: Callable[[Tensor, Tensor], matmul.PackedWeight], rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    unpacked = pack(weight, torch.ones(rows, 1)).unpack()
    torch.testing.assert_close(unpacked, weight, rtol=0, atol=0)
    assert unpacked.is_contiguous()


@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 300), st.integers(0, 2**31))
@fixtures_are_constant
def test_product_equals_int64(
    pack: Callable[[Tensor, Tensor], matmul.PackedWeight],
    tokens: int,
    rows: int,
    columns: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) + 0.01
    integers = torch.randint(-127, 128, (tokens, columns), generator=generator)
    sums = torch.from_numpy(integers.numpy() @ weight.numpy().astype("int64").T)
    product = pack(weight, scale).product(integers.float())
    torch.testing.assert_close(product, sums.float() * scale.view(1, -1), rtol=0, atol=0)


@pytest.mark.parametrize("weight_value", [127, -128])
@pytest.mark.parametrize("input_value", [127, -127])
def test_product_is_exact_for_the_longest_extreme_rows(
    pack: Callable[[Tensor, Tensor], matmul.PackedWeight], weight_value: int, input_value: int
) -> None:
    length = matmul.MAX_IN_FEATURES
    weight = torch.full((3, length), weight_value, dtype=torch.int8)
    integers = torch.full((2, length), float(input_value))
    expected = torch.full((2, 3), float(weight_value * input_value * length))
    product = pack(weight, torch.ones(3, 1)).product(integers)
    torch.testing.assert_close(product, expected, rtol=0, atol=0)


def test_a_small_sum_of_large_parts_is_exact(
    pack: Callable[[Tensor, Tensor], matmul.PackedWeight],
) -> None:
    """What is above zero, and what is below, each pass what float32 tells apart from the next."""
    half = 1041
    assert half * 127 * 127 > 2**24
    weight = torch.full((2, 2 * half + 1), 127, dtype=torch.int8)
    weight[:, -1] = torch.tensor([1, -3])
    integers = torch.full((3, 2 * half + 1), 127.0)
    integers[:, half:] *= -1
    integers[:, -1] = torch.tensor([1.0, -1.0, 0.0])
    product = pack(weight, torch.tensor([[1.0], [2.0]])).product(integers)
    expected = torch.tensor([[1.0, -6.0], [-1.0, 6.0], [0.0, 0.0]])
    torch.testing.assert_close(product, expected, rtol=0, atol=0)


@pytest.fixture
def qnnpack_engine() -> Iterator[str]:
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no other engine than the one needed")
    chosen = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    yield "qnnpack"
    torch.backends.quantized.engine = chosen


def test_the_process_keeps_the_quantized_engine_it_has_chosen(
    pack: Callable[[Tensor, Tensor], matmul.PackedWeight], qnnpack_engine: str
) -> None:
    weight = torch.tensor([[127, -128, 3]], dtype=torch.int8)
    product = pack(weight, torch.ones(1, 1)).product(torch.tensor([[127.0, 1.0, 0.0]]))
    torch.testing.assert_close(product, torch.tensor([[127.0 * 127 - 128]]), rtol=0, atol=0)
    assert torch.backends.quantized.engine == qnnpack_engine


def test_no_warning_reaches_the_user() -> None:
    program = (
        "import torch, haq.int8.matmul as m\n"
        "m.backends()\n"
        "m.pack(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1)).unpack()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stride", [0, 1, 1000])
def test_the_stride_of_a_single_row_does_not_matter(
    pack: Callable[[Tensor, Tensor], matmul.PackedWeight], stride: int
) -> None:
    integers = torch.arange(12.0).as_strided((1, 12), (stride, 1))
    weight = torch.arange(12, dtype=torch.int8).as_strided((1, 12), (stride, 1))
    product = pack(weight, torch.ones(1, 1)).product(integers)
    torch.testing.assert_close(product, torch.tensor([[506.0]]), rtol=0, atol=0)


def test_onednn_makes_few_kernels_however_many_numbers_of_tokens_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps the last 1024 kernels, hundreds of kilobytes each, one for every number of rows."""
    weight = cpu.OneDnnWeight(torch.ones(8, 16, dtype=torch.int8), torch.ones(8, 1))
    rows, linear = set(), weight._linear

    def note(tokens: Tensor, *arguments: object) -> Tensor:
        rows.add(len(tokens))
        result: Tensor = linear(tokens, *arguments)
        return result

    monkeypatch.setattr(weight, "_linear", note)
    for number in range(1, 1025):
        values = torch.arange(float(number)).remainder_(127)[:, None].expand(-1, 16).contiguous()
        product = weight.product(values.clone())
        assert torch.equal(product, values[:, :8] * 16)
        assert max(rows) < 1.25 * number + 1
    assert len(rows) == 8 + 4 * 4 + 3 * 8

"""The padding around cuBLASLt's int8 product: its arithmetic anywhere, the product on a GPU."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import cuda, matmul, reference


def demanding_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm`` as it is on CUDA: exact, and particular about shapes and layout."""
    if a.shape[0] <= 16:
        raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {a.shape[0]}")
    if a.shape[1] % 8 or b.shape[1] % 8:
        raise RuntimeError(f"sizes must be multiples of 8, but got {a.shape} and {b.shape}")
    if not (a.is_contiguous() and b.t().is_contiguous()):
        raise RuntimeError("layouts must be row-major and column-major")
    return reference.int_product(a, b.t())


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_padding_changes_nothing(tokens: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) + 0.01
    rounded = torch.randint(-127, 128, (tokens, columns), generator=generator).float()
    packed = cuda.PaddedWeight(weight, scale, demanding_int_mm)
    expected = (rounded.long() @ weight.long().t()).float() * scale.view(1, -1)
    torch.testing.assert_close(packed.product(rounded), expected, rtol=0, atol=0)
    torch.testing.assert_close(packed.unpack(), weight, rtol=0, atol=0)


def test_a_weight_that_fits_is_not_copied() -> None:
    weight = torch.ones(16, 24, dtype=torch.int8)
    packed = cuda.PaddedWeight(weight, torch.ones(16, 1), demanding_int_mm)
    assert packed.unpack().data_ptr() == weight.data_ptr()


def test_the_proof_accepts_the_padding() -> None:
    def pack(weight: Tensor, scale: Tensor) -> cuda.PaddedWeight:
        return cuda.PaddedWeight(weight, scale, demanding_int_mm)

    assert reference.difference(pack, torch.device("cpu")) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["triton", "int_mm", "reference"])
def test_a_gpu_is_exact(name: str) -> None:
    status = {(status.name, status.device): status for status in matmul.backends()}
    assert status[name, "cuda"].exact, status[name, "cuda"].reason


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "flattened": (lambda x: x.view(6, 4), True),
    "with one dimension more": (lambda x: x[None], True),
    "a view of a view": (lambda x: x.view(-1)[:24].view(3, 2, 4), True),
    "a part": (lambda x: x[1], False),
    "other rows": (lambda x: x.view(3, 8), False),
    "in another order": (lambda x: x.transpose(0, 1), False),
    "other numbers": (lambda x: x.view(torch.int32), False),
    "a copy": (lambda x: x.clone(), False),
    "repeated": (lambda x: x[:1].expand(2, 3, 4), False),
}


@pytest.mark.parametrize(("view", "same"), VIEWS.values(), ids=VIEWS)
def test_a_view_with_the_same_tokens_is_the_tensor_itself(
    view: Callable[[Tensor], Tensor], same: bool
) -> None:
    with torch.no_grad():
        x = torch.randn(2, 3, 4)
        other = view(x)
        assert cuda.whole(other) is (x if same else other)
        assert cuda.whole(x) is x
    with torch.inference_mode():
        x = torch.randn(2, 3, 4)
        other = view(x)
        assert cuda.whole(other) is other

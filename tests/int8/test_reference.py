"""The reference product, and the proof that judges the others."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import reference

CPU = torch.device("cpu")


def random_integers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def numpy_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)


# K around one and two pieces of the exact length, 1024.
@given(
    st.integers(0, 5), st.integers(1, 5), st.sampled_from([1, 2, 1023, 1024, 1025, 2049]), st.data()
)
def test_int_product_equals_int64(
    rows: int, columns: int, length: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 2**31))
    a = random_integers((rows, length), seed)
    b = random_integers((columns, length), seed + 1)
    product = reference.int_product(a, b)
    assert product.dtype == torch.int32
    torch.testing.assert_close(product.long(), numpy_product(a, b), rtol=0, atol=0)


@pytest.mark.parametrize("value", [127, -128])
def test_int_product_is_exact_where_float32_sums_are_not(value: int) -> None:
    """An odd sum far above 2^24, which a single float32 accumulator would round away."""
    a = torch.full((1, 100_001), -128, dtype=torch.int8)
    a[0, -1] = 1
    b = torch.full((1, 100_001), value, dtype=torch.int8)
    b[0, -1] = 1
    torch.testing.assert_close(
        reference.int_product(a, b).long(), numpy_product(a, b), rtol=0, atol=0
    )


def test_int_product_is_exact_in_reduced_precision() -> None:
    a, b = random_integers((3, 2049), 0), random_integers((4, 2049), 1)
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        product = reference.int_product(a, b)
    finally:
        torch.set_float32_matmul_precision(chosen)
    torch.testing.assert_close(product.long(), numpy_product(a, b), rtol=0, atol=0)


def plain(int_product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., reference.PackedWeight]:
    return lambda weight, scale: reference.PlainWeight("broken", weight, scale, int_product)


def saturating_int16(a: Tensor, b: Tensor) -> Tensor:
    """What ``vpmaddubsw`` does: unsigned times signed bytes, neighbours added in int16."""
    products = (a.int() + 128)[:, None] * b.int()[None]  # [T, N, K]
    products = torch.nn.functional.pad(products, (0, products.shape[-1] % 2))
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return pairs.sum(-1, dtype=torch.int32) - 128 * b.sum(1, dtype=torch.int32)


def off_by_one_in_one_place(a: Tensor, b: Tensor) -> Tensor:
    product = reference.int_product(a, b)
    product[-1, -1] += 1
    return product


def without_the_last_column(a: Tensor, b: Tensor) -> Tensor:
    return reference.int_product(a[:, :-1], b[:, :-1])


def wrong_for_one_token(a: Tensor, b: Tensor) -> Tensor:
    return reference.int_product(a, b) + (len(a) == 1)


def wrong_for_several_tokens(a: Tensor, b: Tensor) -> Tensor:
    return reference.int_product(a, b) + (len(a) > 1)


def clamping_128(a: Tensor, b: Tensor) -> Tensor:
    return reference.int_product(a, b.clamp(min=-127))


@pytest.mark.parametrize(
    "int_product",
    [
        saturating_int16,
        off_by_one_in_one_place,
        without_the_last_column,
        wrong_for_one_token,
        wrong_for_several_tokens,
        clamping_128,
    ],
    ids=lambda function: function.__name__,
)
def test_the_proof_finds_what_is_wrong(int_product: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "int64" in reference.difference(plain(int_product), CPU)


def test_the_proof_passes_the_reference() -> None:
    assert reference.difference(plain(reference.int_product), CPU) == ""


def test_the_proof_finds_scales_in_the_wrong_place() -> None:
    def pack(weight: Tensor, scale: Tensor) -> reference.PackedWeight:
        return reference.pack(weight, scale.flip(0))

    assert "int64" in reference.difference(pack, CPU)


def test_the_proof_finds_a_weight_that_does_not_unpack() -> None:
    def pack(weight: Tensor, scale: Tensor) -> reference.PackedWeight:
        return reference.pack(weight.clamp(min=-127), scale)

    assert "unchanged" in reference.difference(pack, CPU)


def test_the_proof_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reference.difference(reference.pack, CPU)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)

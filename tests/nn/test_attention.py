"""Attention of one new token against softmax in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.nn import attention
from haq.nn.attention import attend


def expected(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Head by head and token by token in float64."""
    result = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            group = head * key.shape[1] // query.shape[1]
            scores = key[row, group].double() @ query[row, head, 0].double() * scale
            if mask is not None:
                here = mask.expand(query.shape[0], query.shape[1], 1, -1)[row, head, 0]
                if mask.dtype == torch.bool:
                    scores[~here] = -torch.inf
                else:
                    scores += here.double()
            result[row, head, 0] = torch.softmax(scores, 0) @ value[row, group].double()
    return result


# batch, heads, groups, tokens, size of a key, size of a value
SHAPES = [(1, 4, 4, 1, 8, 8), (2, 6, 2, 33, 16, 16), (3, 4, 1, 130, 8, 24), (1, 8, 8, 7, 64, 64)]


@pytest.mark.parametrize("at_once", [1, 300, 2**20])
@pytest.mark.parametrize("kind", ["no mask", "bool", "float", "a mask for each head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_float64(
    shape: tuple[int, ...],
    kind: str,
    at_once: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_NUMBERS", at_once)
    batch, heads, groups, tokens, size, width = shape
    query = 2 * torch.randn(batch, heads, 1, size).to(dtype)
    key = torch.randn(batch, groups, tokens, size).to(dtype)
    value = torch.randn(batch, groups, tokens, width).to(dtype)
    mask = {
        "no mask": None,
        "bool": torch.rand(batch, 1, 1, tokens) < 0.7,
        "float": torch.randn(1, 1, 1, tokens).to(dtype),
        "a mask for each head": torch.rand(batch, heads, 1, tokens) < 0.7,
    }[kind]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., -1] = True  # A token sees itself.
    result = attend(query, key, value, mask, 0.3)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(),
        expected(query, key, value, mask, 0.3),
        rtol=2 * torch.finfo(dtype).eps,
        atol=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4,
    )


def test_the_usual_scale_is_that_of_torch() -> None:
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 9, 16)
    result = attend(query, key, key, None, None)
    torch.testing.assert_close(
        result, torch.nn.functional.scaled_dot_product_attention(query, key, key)
    )


def test_views_of_a_larger_cache_are_read_as_they_are() -> None:
    query = torch.randn(2, 4, 1, 8).bfloat16()
    cache = torch.randn(2, 2, 50, 8).bfloat16()
    part = cache[:, :, 3:40]
    result = attend(query, part, part, None, None)
    assert torch.equal(result, attend(query, part.contiguous(), part.contiguous(), None, None))


@given(st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_constant_added_to_all_scores_changes_nothing(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, n, 8, generator=generator).bfloat16() for n in (1, tokens))
    plain = attend(query, key, key, None, None).float()
    moved = attend(query, key, key, torch.full((1, 1, 1, tokens), 3.0), None).float()
    torch.testing.assert_close(moved, plain, rtol=2**-7, atol=1e-3)


def test_arguments_are_not_written_to() -> None:
    tensors = [torch.randn(1, 2, n, 8) for n in (1, 5, 5)]
    before = [tensor.clone() for tensor in tensors]
    attend(*tensors, torch.ones(1, 1, 1, 5, dtype=torch.bool), None)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_gradients_flow() -> None:
    query, key = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 2, 9, 16)
    twin = query.detach().clone().requires_grad_()
    attend(query, key, key, None, None).square().sum().backward()
    torch.nn.functional.scaled_dot_product_attention(twin, key, key).square().sum().backward()
    torch.testing.assert_close(query.grad, twin.grad)


def test_a_mask_of_another_device_is_refused() -> None:
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 9, 16)
    with pytest.raises(RuntimeError):
        attend(query, key, key, torch.ones(1, 1, 1, 9, dtype=torch.bool, device="meta"), None)

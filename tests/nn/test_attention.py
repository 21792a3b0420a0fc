"""Attention of one new token, and of a prompt, against softmax in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.int8 import matmul
from haq.int8.llvm.dots import Dots, FoursOfBytes, PairsOfWords
from haq.int8.matmul import use_backend
from haq.nn import attention
from haq.nn.attention import attend, attend_to_prompt


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


# --- Prompts --------------------------------------------------------------------------------------

needs_a_compiler = pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run")


def expected_of_prompt(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> Tensor:
    """Query by query, each as the last one of a text of its own."""
    rows = []
    for place in range(query.shape[2]):
        seen = place + 1 if causal else key.shape[2]
        one = query[:, :, place : place + 1]
        rows.append(expected(one, key[:, :, :seen], value[:, :, :seen], None, scale))
    return torch.cat(rows, 2)


def prompt_of(
    *sizes: int, dtype: torch.dtype = torch.bfloat16, sharper: float = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """As layers give them: numbers of a token beside each other, whatever the head."""
    batch, heads, groups, queries, tokens, size, width = sizes
    query = sharper * torch.randn(batch, queries, heads, size).to(dtype)
    key = torch.randn(batch, tokens, groups, size).to(dtype)
    value = torch.randn(batch, tokens, groups, width).to(dtype)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


# batch, heads, groups, queries, tokens, size of a key, size of a value
PROMPTS = [
    (1, 2, 2, 2, 2, 8, 8),
    (2, 6, 2, 31, 31, 16, 16),
    (1, 4, 1, 33, 33, 7, 24),
    (3, 2, 2, 70, 70, 12, 9),
    (1, 3, 3, 40, 90, 16, 16),
    (1, 4, 2, 65, 5, 16, 16),
    (1, 1, 1, 130, 130, 64, 64),
]


@needs_a_compiler
@pytest.mark.parametrize("at_once", [1, 900, 2**20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", PROMPTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_prompt_equals_float64(
    shape: tuple[int, ...],
    causal: bool,
    at_once: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_NUMBERS", at_once)
    given = prompt_of(*shape, dtype=dtype)
    before = [part.clone() for part in given]
    result = attend_to_prompt(*given, causal, 0.3)
    assert result is not None
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(),
        expected_of_prompt(*given, causal, 0.3),
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 4,
    )
    assert all(map(torch.equal, given, before))


@needs_a_compiler
def test_scores_of_any_size_have_a_softmax() -> None:
    given = prompt_of(1, 2, 1, 50, 50, 16, 16, sharper=1e4)
    result = attend_to_prompt(*given, True, None)
    assert result is not None
    torch.testing.assert_close(
        result.double(), expected_of_prompt(*given, True, 0.25), rtol=1e-2, atol=1e-3
    )


@needs_a_compiler
def test_a_query_of_a_prompt_does_not_depend_on_those_behind_it() -> None:
    query, key, value = prompt_of(1, 4, 2, 100, 100, 16, 16)
    whole = attend_to_prompt(query, key, value, True, None)
    assert whole is not None
    for length in (2, 31, 32, 64, 99):
        parts = (part[:, :, :length] for part in (query, key, value))
        shorter = attend_to_prompt(*parts, True, None)
        assert shorter is not None
        assert torch.equal(shorter, whole[:, :, :length])


@needs_a_compiler
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_a_prompt(threads: int) -> None:
    given = prompt_of(2, 6, 2, 100, 100, 16, 16)
    one = attend_to_prompt(*given, True, None)
    try:
        torch.set_num_threads(threads)
        several = attend_to_prompt(*given, True, None)
    finally:
        torch.set_num_threads(1)
    assert one is not None
    assert several is not None
    assert torch.equal(one, several)


@needs_a_compiler
@pytest.mark.parametrize("dots", [PairsOfWords(256), FoursOfBytes(256, registers=16)], ids=str)
def test_a_prompt_by_smaller_registers(dots: Dots, monkeypatch: pytest.MonkeyPatch) -> None:
    from haq.int8.llvm import compiler

    monkeypatch.setattr(compiler, "dots_here", lambda: dots)
    monkeypatch.setattr(compiler, "_kernels", {})
    given = prompt_of(1, 4, 2, 70, 70, 16, 9, dtype=torch.float32)
    result = attend_to_prompt(*given, True, 0.3)
    assert result is not None
    exact = expected_of_prompt(*given, True, 0.3)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5)


def test_no_kernel_for_a_prompt() -> None:
    query, key, value = prompt_of(1, 2, 2, 4, 4, 8, 8)
    assert attend_to_prompt(query.clone().requires_grad_(), key, value, True, None) is None
    assert attend_to_prompt(query.float(), key, value, True, None) is None
    assert attend_to_prompt(query, key.float(), value, True, None) is None
    assert attend_to_prompt(query.double(), key.double(), value.double(), True, None) is None
    turned = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert attend_to_prompt(turned, key, value, True, None) is None
    with use_backend("reference"):
        assert attend_to_prompt(query, key, value, True, None) is None

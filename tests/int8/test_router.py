"""What a router chooses for one token, against torch."""

import pytest
import torch
from torch import Tensor

from haq.int8 import matmul

if not matmul.compiles():
    pytest.skip("LLVM's kernels do not run here", allow_module_level=True)

from haq.int8.llvm import router
from haq.int8.llvm.chain import Chain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def chosen(
    token: Tensor, weight: Tensor, slots: int, normed: bool, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and experts, and the token for each of them."""
    (experts, width), dtype = weight.shape, token.dtype
    logits, scores = torch.full((experts + 8,), 77.0), torch.full((slots + 8,), 77.0)
    index = torch.full((slots + 8,), 77)
    tokens = torch.full((slots + 1, width), 77.0, dtype=dtype)
    steps = [
        router.logits_step(
            dtype, token.data_ptr(), weight.data_ptr(), logits.data_ptr(), experts, width
        ),
        router.choice_step(
            dtype,
            normed,
            rounded,
            logits.data_ptr(),
            token.data_ptr(),
            scores.data_ptr(),
            index.data_ptr(),
            tokens.data_ptr(),
            (experts, slots, width),
        ),
    ]
    Chain(steps).run()
    for memory, size in ((logits, experts), (scores, slots), (index, slots), (tokens, slots)):
        assert bool((memory[size:] == 77).all())
    return scores[:slots], index[:slots], tokens[:slots]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "slots", "width"), [(8, 2, 64), (1, 1, 5), (130, 8, 203)])
def test_chooses_what_torch_does(
    experts: int, slots: int, width: int, dtype: torch.dtype, normed: bool, rounded: bool
) -> None:
    generator = torch.Generator().manual_seed(experts)
    for _ in range(5):
        token = torch.randn(width, generator=generator).to(dtype)
        weight = (torch.randn(experts, width, generator=generator) / width**0.5).to(dtype)
        scores, index, tokens = chosen(token, weight, slots, normed, rounded)
        logits = (weight.double() @ token.double()).to(dtype)
        expected = logits.double().softmax(-1)
        largest = expected.topk(slots)
        # Experts whose logits are the same number are chosen in any order.
        assert torch.equal(logits[index], logits[largest.indices])
        assert len(set(index.tolist())) == slots
        values = expected[index] / (largest.values.sum() if normed else 1)
        near = 2**-7 if rounded and dtype != torch.float32 else 1e-6
        torch.testing.assert_close(scores.double(), values, rtol=near, atol=1e-7)
        if rounded:
            assert torch.equal(scores, scores.to(dtype).float())
        assert torch.equal(tokens, token.expand(slots, -1))


def test_the_first_of_equals_is_the_first() -> None:
    token, weight = torch.ones(4), torch.zeros(6, 4)
    weight[3] = 1
    scores, index, _ = chosen(token, weight, 3, True, False)
    assert index.tolist() == [3, 0, 1]
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_what_is_no_number_chooses_experts_that_there_are() -> None:
    token, weight = torch.full((4,), float("nan")), torch.ones(6, 4)
    scores, index, _ = chosen(token, weight, 2, True, False)
    assert all(0 <= expert < 6 for expert in index.tolist())
    assert bool(scores.isnan().all())

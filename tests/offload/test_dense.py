"""Decoder blocks that do not fit on the GPU either: accelerate brings their layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import haq
from haq import Costs, ExpertOffloader, OffloadConfig
from haq.offload.budget import dense_bytes, streamed_bytes
from haq.offload.collect import experts_modules
from haq.offload.dense import DenseSide
from tests.architectures import MIXTURES, VOCABULARY

COSTS = Costs(1e-4, 1e-6, 1e-3, 1e-4, 1e-6, 1e-5)
CONFIG = OffloadConfig(max_length=64)

# With a smaller dense part than two of its largest layers nothing is gained.
STREAMED = ["qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3", "glm4-moe", "hunyuan-moe"]


def offloader_of(model: PreTrainedModel, memory: int | None = None) -> ExpertOffloader:
    return ExpertOffloader(model, device="cpu", gpu_memory=memory, config=CONFIG, costs=COSTS)


def least_streamed(model: PreTrainedModel) -> int:
    """The budget with no expert resident and blocks streamed."""
    budget = offloader_of(model).budget
    streamed = streamed_bytes(model, experts_modules(model).values())
    assert streamed is not None
    return budget.needed - budget.dense + streamed


def identities(model: nn.Module) -> dict[str, int]:
    return {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 12))


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_blocks_give_the_same_answers_and_come_back(family: str, ids: Tensor) -> None:
    model = MIXTURES[family]().eval()
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = model(ids).logits
    before, values = identities(model), {n: p.clone() for n, p in model.named_parameters()}
    with offloader_of(model, least_streamed(model)) as offloader:
        assert offloader.budget.streamed
        # Everything around the blocks is there, what is in them comes and goes.
        block = model.get_submodule(next(iter(experts_modules(model))).rsplit(".", 2)[0])
        assert all(parameter.is_meta for parameter in block.parameters())
        assert not model.get_input_embeddings().weight.is_meta
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-6)
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, expected)
        assert "accelerate" in " ".join(offloader.report().notes)
    assert identities(model) == before
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_blocks_that_fit_are_not_streamed() -> None:
    model = MIXTURES["qwen3-moe"]().eval()
    offloader = offloader_of(model, offloader_of(model).budget.needed)
    assert not offloader.budget.streamed
    with offloader:
        assert offloader.report().notes == ()


def test_one_byte_less_than_streaming_takes_is_refused_with_the_number() -> None:
    model = MIXTURES["qwen3-moe"]().eval()
    least = least_streamed(model)
    with pytest.raises(ValueError, match=rf"at least .* \({least} bytes\)"):
        offloader_of(model, least - 1)


def test_int8_layers_are_not_streamed(ids: Tensor) -> None:
    """accelerate would move their scales, and not their weights."""
    model = MIXTURES["qwen3-moe"]().eval()
    haq.quantize_model(model, [ids], progress=False)
    assert streamed_bytes(model, experts_modules(model).values()) is None
    needed = offloader_of(model).budget.needed
    with pytest.raises(ValueError, match=rf"\({needed} bytes\)"):
        offloader_of(model, needed - 1)


def test_what_is_streamed_is_everything_around_and_twice_the_largest_layer() -> None:
    model = MIXTURES["qwen3-moe"]().eval()
    experts = list(experts_modules(model).values())
    blocks = model.model.layers
    inside = {id(p) for p in blocks.parameters()}
    around = sum(t.nbytes for t in model.parameters() if id(t) not in inside)
    around += sum(buffer.nbytes for buffer in model.buffers())
    largest = max(
        sum(p.nbytes for p in module.parameters(recurse=False))
        for module in blocks.modules()
        if module not in experts
    )
    assert streamed_bytes(model, experts) == around + 2 * largest
    assert dense_bytes(model, experts) == around + sum(
        p.nbytes for n, p in blocks.named_parameters() if ".experts." not in n
    )


def test_a_failure_on_the_way_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    model = MIXTURES["qwen3-moe"]().eval()
    before, with_blocks = identities(model), least_streamed(model)
    original, calls = DenseSide._move, []

    def failing(self: Any, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory left")
        original(self, *arguments)

    monkeypatch.setattr(DenseSide, "_move", failing)
    offloader = offloader_of(model, with_blocks)
    with pytest.raises(RuntimeError, match="less memory free"):
        offloader.attach()
    assert not offloader.attached
    assert identities(model) == before
    model.generate(ids, max_new_tokens=2)

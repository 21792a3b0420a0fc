"""Blocks run alone, from what was caught, must do what they do inside the model: the same bits."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.blocks import (
    capture_block_inputs,
    find_blocks,
    map_tensors,
    run_block,
    token_rows,
)
from tests.architectures import ARCHITECTURES, LAYERS, token_ids
from tests.model.toys import HIDDEN, Residual, ToyModel, batch_of

BLOCK_LISTS = {
    "opt": "model.decoder.layers",
    "opt-post-norm": "model.decoder.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3": "model.layers",
    "phi3": "model.layers",
    "gpt-neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "phi": "model.layers",
    "gptj": "transformer.h",
    "bloom": "transformer.h",
}


def padded(rows: int, columns: int, *, left: int, right: int) -> dict[str, Tensor]:
    """A batch whose first row is padded on the left, and its last one on the right."""
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, :left] = 0
    mask[-1, columns - right :] = 0
    return {"input_ids": token_ids(rows, columns).masked_fill(mask == 0, 0), "attention_mask": mask}


BATCHES: dict[str, list[dict[str, Tensor]]] = {
    "one row": [{"input_ids": token_ids(1, 20)}],
    "several rows": [{"input_ids": token_ids(3, 20)}],
    "one token": [{"input_ids": token_ids(1, 1)}],
    "padding": [padded(2, 20, left=7, right=4)],
    "mask without padding": [padded(2, 20, left=0, right=0)],
    "batches that differ": [
        padded(2, 20, left=3, right=1),
        {"input_ids": token_ids(1, 9, seed=1)},
        padded(3, 20, left=5, right=2),
        {"input_ids": token_ids(2, 20, seed=2)},
    ],
}


def hidden_states_of(model: PreTrainedModel, blocks: nn.ModuleList, batch: dict) -> list[Tensor]:
    """What each block returns in the model's own forward pass."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in blocks]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_list_of_blocks_is_found(name: str) -> None:
    model = ARCHITECTURES[name]()
    found, blocks = find_blocks(model)
    assert found == BLOCK_LISTS[name]
    assert blocks is model.get_submodule(found)
    assert len(blocks) == LAYERS


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_run_one_by_one_give_the_models_own_bits(
    name: str, batches: list[dict[str, Tensor]]
) -> None:
    model = ARCHITECTURES[name]()
    _, blocks = find_blocks(model)
    expected = [hidden_states_of(model, blocks, batch) for batch in batches]

    inputs = capture_block_inputs(model, blocks, batches)
    for i, block in enumerate(blocks):
        inputs.hidden = [run_block(block, batch) for batch in inputs.of_block(i)]
        for got, states in zip(inputs.hidden, expected, strict=True):
            assert torch.equal(got, states[i])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_capturing_leaves_the_model_as_it_was(name: str, training: bool) -> None:
    model = ARCHITECTURES[name]().train(training)
    _, blocks = find_blocks(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules = list(model.named_modules())

    capture_block_inputs(model, blocks, BATCHES["padding"])

    assert list(model.named_modules()) == modules
    assert all(module.training == training for _, module in modules)
    assert not any(module._forward_hooks or module._forward_pre_hooks for _, module in modules)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_masks_and_token_counts_leave_padding_out() -> None:
    model = ToyModel()
    batches = [padded(3, 10, left=4, right=2), {"input_ids": token_ids(2, 5)}]
    inputs = capture_block_inputs(model, model.blocks, batches)
    assert inputs.num_tokens == 3 * 10 - 4 - 2 + 2 * 5
    assert [mask.dtype for mask in inputs.masks] == [torch.bool, torch.bool]
    assert torch.equal(inputs.masks[0], batches[0]["attention_mask"] == 1)
    assert inputs.masks[1].all()


def test_batches_of_one_length_share_their_masks_and_positions() -> None:
    """128 copies of the same mask would take more memory than the hidden states do."""
    model = ARCHITECTURES["mistral"]()
    _, blocks = find_blocks(model)
    batch, other = padded(2, 20, left=7, right=4), padded(2, 20, left=6, right=4)
    inputs = capture_block_inputs(model, blocks, [batch, batch, other])

    first, second, third = (calls[1].kwargs for calls in inputs.calls)
    assert second["attention_mask"] is first["attention_mask"]
    assert second["position_embeddings"][0] is first["position_embeddings"][0]
    assert not torch.equal(third["attention_mask"], first["attention_mask"])
    assert third["position_embeddings"][0] is first["position_embeddings"][0]


def test_hidden_states_and_arguments_of_a_batch_in_float32() -> None:
    model = ARCHITECTURES["llama"]().bfloat16()
    _, blocks = find_blocks(model)
    (batch,) = capture_block_inputs(model, blocks, BATCHES["padding"]).of_block(0)
    assert batch.hidden.dtype == torch.bfloat16
    in_float = batch.float()
    assert in_float.hidden.dtype == torch.float32
    assert torch.equal(in_float.hidden, batch.hidden.float())
    assert in_float.call.kwargs["position_embeddings"][0].dtype == torch.float32
    assert in_float.call.kwargs["attention_mask"].dtype == batch.call.kwargs["attention_mask"].dtype
    # The float32 block must accept what it is given.
    assert run_block(blocks[0].float(), in_float).dtype == torch.float32


def test_blocks_that_look_at_each_other_are_refused() -> None:
    model = ToyModel(blocks=3, between=lambda hidden: hidden * 2)
    with pytest.raises(ValueError, match="changes the hidden states between blocks 0 and 1"):
        capture_block_inputs(model, model.blocks, [{"input_ids": token_ids(1, 4)}])
    assert [type(block) for block in model.blocks] == [Residual] * 3


def test_a_model_may_look_at_a_block_before_it_calls_it() -> None:
    """Some choose a mask by an attribute of the block."""

    class Looks(ToyModel):
        seen: ClassVar[list[object]] = []

        def forward(self, input_ids: Tensor, **options: object) -> Tensor:
            self.seen += [block.activation for block in self.blocks]
            return super().forward(input_ids, **options)

    model = Looks()
    model.blocks[1].activation = torch.abs
    capture_block_inputs(model, model.blocks, [{"input_ids": token_ids(1, 4)}])
    # Once with the first block itself, once with a stand-in for each.
    assert Looks.seen == [torch.relu, torch.abs] * 2


def test_a_model_that_does_not_run_all_its_blocks_is_refused() -> None:
    model = ToyModel(blocks=3, run=2)
    with pytest.raises(ValueError, match="must run all its 3 blocks, but called only 2"):
        capture_block_inputs(model, model.blocks, [{"input_ids": token_ids(1, 4)}])


def test_an_error_in_the_dry_run_leaves_the_blocks_in_place() -> None:
    def between(hidden: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = ToyModel(between=between)
    blocks = list(model.blocks)
    with pytest.raises(KeyboardInterrupt):
        capture_block_inputs(model, model.blocks, [{"input_ids": token_ids(1, 4)}])
    assert list(model.blocks) == blocks
    assert not any(block._forward_hooks for block in blocks)


def test_the_longest_list_of_declared_blocks_is_taken() -> None:
    model = ToyModel(blocks=2)
    model.draft = nn.ModuleList([Residual()])
    model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model.mixed = nn.ModuleList([*(Residual() for _ in range(5)), nn.Linear(2, 2)])
    assert find_blocks(model)[0] == "blocks"


@pytest.mark.parametrize("declared", [None, ["Missing"]], ids=["nothing declared", "no such class"])
def test_a_model_without_blocks_is_refused(declared: list[str] | None) -> None:
    model = ToyModel()
    model._no_split_modules = declared
    with pytest.raises(ValueError, match=r"must be a causal language model.*got ToyModel"):
        find_blocks(model)


def test_token_rows_take_flat_and_batched_values() -> None:
    values = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[False, True, True, True], [True, False, True, True]])
    expected = values[mask]
    assert torch.equal(token_rows(values, mask), expected)
    assert torch.equal(token_rows(values.reshape(8, 3), mask), expected)
    assert torch.equal(token_rows(values, torch.ones(2, 4).bool()), values.reshape(8, 3))


def test_map_tensors_keeps_the_tree() -> None:
    cache = object()
    tree = {"mask": torch.ones(1), "rope": (torch.ones(1), [torch.ones(1), None]), "cache": cache}
    doubled = map_tensors(lambda tensor: 2 * tensor, tree)
    assert doubled == {"mask": 2, "rope": (2, [2, None]), "cache": cache}
    assert isinstance(doubled["rope"], tuple)
    assert tree["mask"] == 1


def test_run_block_takes_the_first_of_a_tuple_and_makes_no_graph() -> None:
    class Pair(Residual):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
            return super().forward(hidden_states), "weights"

    block = Pair()
    output = run_block(block, batch_of(torch.randn(1, 3, HIDDEN)))
    assert output.shape == (1, 3, HIDDEN)
    assert not output.requires_grad

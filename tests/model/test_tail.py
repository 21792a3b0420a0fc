"""What stands between the last block and the head: found by what happens, and run by itself."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from haq.model.blocks import BlockBatch, BlockCall, capture_block_inputs, find_blocks, run_block
from haq.model.heads import find_head
from haq.model.tail import Route, Tail, tail_batches
from haq.model.trace import observe_inputs
from tests.architectures import ARCHITECTURES, MIXTURES, VOCABULARY, token_ids
from tests.heads import MORE_HEADS

MODELS: Mapping[str, Callable[[], PreTrainedModel]] = ARCHITECTURES | MIXTURES | MORE_HEADS

# What a model goes through after its blocks, where that is not one norm.
PARTS = {
    "opt-post-norm": ["model.decoder.project_out"],
    "olmo": [],
    "bert": ["cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"],
    "roberta": ["lm_head.dense", "lm_head.layer_norm"],
}


class Seen:
    """One run of a whole model: what came out of its last block, and what its head read."""

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
        head = model.get_submodule(find_head(model))
        last = find_blocks(model)[1][-1]
        handles = [
            last.register_forward_hook(self._note_block),
            head.register_forward_pre_hook(self._note_head),
        ]
        with torch.no_grad():
            model(**batch, use_cache=False)
        for handle in handles:
            handle.remove()

    def _note_block(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.hidden = output[0] if isinstance(output, tuple) else output

    def _note_head(self, module: nn.Module, arguments: Any) -> None:
        self.inputs = arguments[0]


def route_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Route:
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [batch])
    head = find_head(model)
    assert head is not None
    return Route(model, blocks, head, inputs.wrap, next(tail_batches(inputs, [batch])))


def batch_for_tail(
    hidden: Tensor, batch: dict[str, Tensor], mask: Tensor | None = None
) -> BlockBatch:
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
    return BlockBatch(hidden, BlockCall((), batch), mask)


def padded(name: str) -> dict[str, Tensor]:
    ids = token_ids(2, 12)
    if name == "bloom":  # Its mask has to be one of integers.
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_given_what_it_reads_in_the_whole_model(name: str) -> None:
    model, batch = MODELS[name](), padded(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    seen = Seen(model, batch)
    route = route_of(model, batch)
    found = route.run(seen.hidden, batch, {})
    assert torch.equal(found, seen.inputs)
    assert found.shape == (2, 12, model.get_submodule(find_head(model)).in_features)
    # Hidden states of another run: it is they that count, not the tokens.
    other = route.run(seen.hidden.roll(1, -1), batch, {})
    assert not torch.allclose(other, found)

    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_are_what_it_goes_through(name: str) -> None:
    model = MODELS[name]()
    route = route_of(model, padded(name))
    if name in PARTS:
        assert route.parts == PARTS[name]
    else:
        (part,) = route.parts
        assert "norm" in part.lower() or part.endswith("ln_f")
    assert route.width == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_tail_is_the_route_in_float32(name: str, dtype: torch.dtype) -> None:
    batch = padded(name)
    model = MODELS[name]().to(dtype)
    exact = copy.deepcopy(model).float()
    hidden = Seen(exact, batch).hidden
    tail = Tail(route_of(model, batch))
    rows: list[Tensor] = []
    with torch.no_grad():
        observe_inputs(tail, {"head": rows.append}, [batch_for_tail(hidden, batch)])
        expected = route_of(exact, batch).run(hidden, batch, {})
        output = run_block(tail, batch_for_tail(hidden, batch))
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(rows[0], expected.flatten(0, 1), rtol=0, atol=0)
    head = exact.get_submodule(find_head(exact))
    added = functional.linear(expected, head.weight[:32])
    torch.testing.assert_close(output, hidden + added, rtol=0, atol=0)
    # Copies: what is done to them is not done to the model.
    for parameter in tail.parameters():
        parameter.data.zero_()
    assert torch.equal(Seen(model.float(), batch).hidden, hidden)


def test_padding_is_left_out_of_what_is_observed() -> None:
    model, batch = ARCHITECTURES["llama"](), padded("llama")
    hidden = Seen(model, batch).hidden
    rows: list[Tensor] = []
    mask = batch["attention_mask"].bool()
    tail = Tail(route_of(model, batch))
    observe_inputs(tail, {"head": rows.append}, [batch_for_tail(hidden, batch, mask)])
    assert len(rows[0]) == 2 * 12 - 3


def test_parts_are_called_what_the_model_calls_them() -> None:
    model = MORE_HEADS["bert"]()
    tail = Tail(route_of(model, padded("bert")))
    assert tail.name_of("parts.1") == "cls.predictions.transform.LayerNorm"


def test_with_fewer_tokens_than_channels_rows_of_the_head_come_again() -> None:
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    tail = Tail(route_of(model, {"input_ids": torch.tensor([[0, 4, 2]])}))
    assert tail.head.weight.shape == (16, 16)
    assert torch.equal(tail.head.weight[5], model.lm_head.weight[0])


def test_blocks_that_are_gone_are_still_stood_for() -> None:
    """The model reads `attention_type` of a block before it calls it."""
    model, batch = ARCHITECTURES["gemma3"](), padded("gemma3")
    seen, route = Seen(model, batch), route_of(model, batch)
    blocks = find_blocks(model)[1]
    for i in range(len(blocks)):
        blocks[i] = nn.Identity()
    assert torch.equal(route.run(seen.hidden, batch, {}), seen.inputs)


# --- Models that do something else ----------------------------------------------------------------


class Llama(LlamaForCausalLM):
    """Computes its logits as `logits` does."""

    def forward(self, input_ids: Tensor, **options: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits(self.model(input_ids, **options)[0]))

    def logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class ReadsTheWeight(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.lm_head.weight)


class ReadsTheDtype(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.to(self.lm_head.weight.dtype))


class ReadsTheEmbeddings(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.model.embed_tokens.weight)


class OnlyTheLastToken(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden[:, -1:])


class AsksForABias(Llama):
    def logits(self, hidden: Tensor) -> Tensor:
        assert not hasattr(self.lm_head, "adapter")
        return self.lm_head(hidden.flatten(0, 1)).view(*hidden.shape[:-1], -1)


def llama(kind: type[Llama]) -> Llama:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return kind(config).eval()


@pytest.mark.parametrize(
    "kind", [ReadsTheWeight, ReadsTheDtype, ReadsTheEmbeddings, OnlyTheLastToken]
)
def test_a_head_that_is_not_called_for_every_token(kind: type[Llama]) -> None:
    model = llama(kind)
    modules = dict(model.named_modules())
    match = rf"`lm_head` must be called as a module, once for every token.*{kind.__name__}.*exclude"
    with pytest.raises(ValueError, match=match):
        route_of(model, {"input_ids": token_ids(2, 6)})
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_may_ask_what_its_head_has_and_give_it_rows() -> None:
    model, ids = llama(AsksForABias), token_ids(2, 6)
    seen = Seen(model, {"input_ids": ids})
    found = route_of(model, {"input_ids": ids}).run(seen.hidden, {"input_ids": ids}, {})
    assert torch.equal(found, seen.inputs.view(2, 6, -1))


def test_an_error_of_the_model_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = ARCHITECTURES["llama"](), token_ids(2, 6)
    route = route_of(model, {"input_ids": ids})
    modules = dict(model.named_modules())

    def broken(*arguments: Any) -> None:
        raise AttributeError("of its own")

    monkeypatch.setattr(model.model.norm, "forward", broken)
    with pytest.raises(AttributeError, match="of its own"):
        route.run(torch.zeros(2, 6, 32), {"input_ids": ids}, {})
    assert dict(model.named_modules()) == modules

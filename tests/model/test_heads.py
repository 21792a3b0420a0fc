"""The output head: found, untied, and replaced without anything in between."""

import copy
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTModel, PreTrainedModel

from haq.model.heads import find_head, untied, write_at_once
from tests.architectures import ARCHITECTURES, MIXTURES
from tests.heads import MORE_HEADS

NAMES = {
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "gpt-neox-japanese": "embed_out",
}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES, *MORE_HEADS])
def test_the_head_is_found(name: str) -> None:
    model = (ARCHITECTURES | MIXTURES | MORE_HEADS)[name]()
    assert find_head(model) == NAMES.get(name, "lm_head")


def test_a_model_without_a_head() -> None:
    assert find_head(OPTModel(ARCHITECTURES["opt"]().config)) is None


def test_a_head_that_is_more_than_a_linear() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = ARCHITECTURES["llama"]()
    model.lm_head = Scaled(32, 96)
    assert find_head(model) is None


# --- Untied ---------------------------------------------------------------------------------------


def tied_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def own_head(model: PreTrainedModel, name: str = "lm_head") -> None:
    """A weight of its own for the head."""
    write_at_once(untied(model, name))
    head = model.get_submodule(name)
    head.weight = nn.Parameter(head.weight.detach() + 1)


@pytest.mark.parametrize("name", ["opt", "gemma2", "gpt2", "bloom", "cohere", "roberta", "bert"])
def test_transformers_does_not_tie_it_again(name: str) -> None:
    model = (ARCHITECTURES | MORE_HEADS)[name]()
    head = find_head(model)
    assert head is not None
    embeddings = model.get_input_embeddings().weight
    assert model.get_submodule(head).weight is embeddings
    before = embeddings.clone()
    own_head(model, head)
    for each in (model, copy.deepcopy(model)):
        each.tie_weights()
        each.tie_weights(recompute_mapping=False)
        weights = each.get_submodule(head).weight, each.get_input_embeddings().weight
        assert torch.equal(weights[0], before + 1)
        assert torch.equal(weights[1], before)
        assert each.config.tie_word_embeddings is False
    # All modules still share one configuration: what is set in it reaches all.
    configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert configs == {id(model.config)}


def test_a_configuration_of_two_models_stays_the_others() -> None:
    model = tied_llama()
    other = LlamaForCausalLM(model.config)
    assert other.config is model.config
    own_head(model)
    assert other.config.tie_word_embeddings is True
    assert other.model.config is other.config
    other.tie_weights()
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_what_is_not_tied_keeps_its_configuration() -> None:
    model = ARCHITECTURES["llama"]()
    assert untied(model, "lm_head") == []
    write_at_once([])


# --- At once --------------------------------------------------------------------------------------


def test_all_is_written() -> None:
    one: dict[str, Any] = {"a": 1, "b": 2}
    other: dict[str, Any] = {"a": 3}
    write_at_once([(one, "b", 20), (other, "a", 30), (other, "c", 40)])
    assert (one, other) == ({"a": 1, "b": 20}, {"a": 30, "c": 40})


def test_no_interrupt_comes_between() -> None:
    """Raised at every line and every opcode in turn, as an interrupt may be."""
    outcomes = set()
    for moment in range(60):
        values: list[dict[str, Any]] = [{"x": 0} for _ in range(5)]
        left = moment

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            frame.f_trace_opcodes = True
            if frame.f_code.co_name == "write_at_once":
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            return trace

        sys.settrace(trace)
        try:
            write_at_once([(value, "x", 1) for value in values])
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        outcomes.add(tuple(value["x"] for value in values))
    assert outcomes == {(0, 0, 0, 0, 0), (1, 1, 1, 1, 1)}

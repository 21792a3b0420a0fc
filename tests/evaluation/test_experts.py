"""Which tokens go to other experts: counted while two models read the same text."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import haq
from haq.evaluation.experts import experts_of, watching_experts

ModelFactory = Callable[..., PreTrainedModel]


def chosen(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The experts of every token in each layer, from what transformers returns of its routers."""
    with torch.no_grad():
        logits = model(ids, output_router_logits=True, use_cache=False).router_logits
    return [layer.topk(model.config.num_experts_per_tok).indices.sort().values for layer in logits]


def perturbed(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    other = copy.deepcopy(model)
    weight = other.model.layers[layer].mlp.gate.weight
    weight.data += 0.3 * torch.randn_like(weight)
    return other


@pytest.mark.parametrize("sequence_length", [8, 16])
def test_shares_are_those_of_the_routers(tiny_mixtral: ModelFactory, sequence_length: int) -> None:
    model = tiny_mixtral()
    other = perturbed(model, layer=0)
    ids = torch.randint(64, (1, 64))
    result = haq.compare(model, other, ids, sequence_length=sequence_length, progress=False)
    windows = ids.view(-1, sequence_length)
    expected = [
        (before != after).any(-1).float().mean().item()
        for before, after in zip(chosen(model, windows), chosen(other, windows), strict=True)
    ]
    assert 0 < expected[0] < 1
    assert result.experts_changed == pytest.approx(expected)
    assert "tokens to other experts" in str(result)


def test_an_int8_model_is_compared_with_its_float_model(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    tokens = [torch.randint(64, (2, 32)) for _ in range(4)]
    int8 = haq.quantize_model(copy.deepcopy(model), tokens, progress=False)
    result = haq.compare(model, int8, torch.randint(64, (512,)), sequence_length=32, progress=False)
    assert len(result.experts_changed) == 2
    assert all(share < 0.2 for share in result.experts_changed)


def test_a_model_beside_itself_changes_nothing(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    result = haq.compare(model, model, torch.arange(64), sequence_length=16, progress=False)
    assert result.experts_changed == (0.0, 0.0)


def test_dense_models_have_no_experts(tiny_llama: ModelFactory) -> None:
    model = tiny_llama()
    assert experts_of(model) == {}
    result = haq.compare(model, model, torch.arange(64), sequence_length=16, progress=False)
    assert result.experts_changed == ()
    assert "experts" not in str(result)


def test_models_with_other_layers_are_not_counted(
    tiny_mixtral: ModelFactory, tiny_llama: ModelFactory
) -> None:
    with watching_experts(tiny_mixtral(), tiny_llama()) as changed:
        assert changed.shares() == ()


def test_hooks_are_gone_afterwards(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    with pytest.raises(KeyboardInterrupt), watching_experts(model, model):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in experts_of(model).values())

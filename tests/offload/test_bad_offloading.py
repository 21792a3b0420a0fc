"""What `ExpertOffloader` refuses before anything moves, and what it says."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from haq import Costs, ExpertOffloader, OffloadConfig, RoutingStatistics
from tests.architectures import ARCHITECTURES, EXPERTS, SLOTS
from tests.offload.offloading import COPIES, UNSEEN, build, offloader, shared_model


def make(model: Any, **options: Any) -> ExpertOffloader:
    given: dict[str, Any] = {"device": "cpu", "costs": COPIES}
    return ExpertOffloader(model, **given | options)


@pytest.fixture
def model() -> PreTrainedModel:
    return shared_model("mixtral")


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_dense_model(name: str) -> None:
    with pytest.raises(ValueError, match="mixture of experts") as caught:
        make(ARCHITECTURES[name]())
    assert type(ARCHITECTURES[name]()).__name__ in str(caught.value)


@pytest.mark.parametrize("value", [None, "mixtral", nn.Linear(2, 2), 3])
def test_no_model(value: Any) -> None:
    with pytest.raises(TypeError, match=f"`model` must be .* got {type(value).__name__}"):
        make(value)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_experts_that_are_elsewhere(kind: str) -> None:
    model = build("mixtral", kind).to("meta")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on meta") as caught:
        make(model)
    assert "`model.layers.0.mlp.experts`" in str(caught.value)
    assert 'model.to("cpu")' in str(caught.value)


def test_one_layer_of_experts_that_is_elsewhere() -> None:
    model = build("mixtral")
    model.get_submodule("model.layers.1.mlp.experts").to("meta")
    with pytest.raises(ValueError, match=r"`model\.layers\.1\.mlp\.experts`.*on meta"):
        make(model)


# --- The device -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_no_gpu(model: PreTrainedModel, device: Any) -> None:
    with pytest.raises(ValueError, match=r"`device`.*got 'cuda"):
        make(model, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_gpu_by_default(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"`device`.*'cuda'"):
        ExpertOffloader(model)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_device_that_computes_nothing(model: PreTrainedModel, device: Any) -> None:
    with pytest.raises(ValueError, match='`device` must be "cuda" or "cpu", got \'meta\''):
        make(model, device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_no_such_device(model: PreTrainedModel, device: str) -> None:
    with pytest.raises(ValueError, match=f"`device`.*got {device!r}"):
        make(model, device=device)


# --- The rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("config", {"placement": "latency"}, "OffloadConfig"),
        ("config", "latency", "OffloadConfig"),
        ("statistics", [[1, 2, 3, 4]] * 2, "RoutingStatistics"),
        ("statistics", "counts.json", "RoutingStatistics"),
        ("costs", {"copy": 1.0}, "Costs"),
        ("costs", 1.0, "Costs"),
    ],
)
def test_arguments_of_another_type(
    model: PreTrainedModel, name: str, value: Any, kind: str
) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be .*{kind}, got {type(value).__name__}"):
        make(model, **{name: value})


@pytest.mark.parametrize(("layers", "experts"), [(3, EXPERTS), (1, EXPERTS), (2, EXPERTS + 1)])
def test_statistics_of_another_model(model: PreTrainedModel, layers: int, experts: int) -> None:
    given = RoutingStatistics(layers, experts, SLOTS)
    with pytest.raises(ValueError, match="2 layers of 4 experts") as caught:
        make(model, statistics=given)
    assert f"{layers} layers of {experts}" in str(caught.value)
    assert "RoutingStatistics.collect" in str(caught.value)


COSTS: dict[str, float] = {
    "gpu_expert": 1e-3,
    "gpu_token": 1e-6,
    "cpu_expert": 4e-3,
    "cpu_token": 1e-5,
    "copy": 7e-3,
    "round_trip": 1e-4,
}


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf, True, None, "1", 1j])
@pytest.mark.parametrize("name", COSTS)
def test_costs_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be") as caught:
        Costs(**COSTS | {name: value})
    assert f"got {value!r}" in str(caught.value)
    assert "have them measured" in str(caught.value)


@pytest.mark.parametrize("name", COSTS)
def test_costs_of_zero(name: str) -> None:
    if name in ("gpu_token", "cpu_token", "round_trip"):
        assert Costs(**COSTS | {name: 0}).to_dict() == COSTS | {name: 0}
    else:
        with pytest.raises(ValueError, match=f"`{name}` must be a positive number.*got 0"):
            Costs(**COSTS | {name: 0})


def test_pinned_memory_that_cannot_be_read(model: PreTrainedModel) -> None:
    config = OffloadConfig(pinned_memory="16 elephants", max_length=64)
    modules = list(model.modules())

    def attached() -> None:
        with make(model, config=config):
            pass

    with pytest.raises(ValueError, match=r"`pinned_memory`.*'16 elephants'"):
        attached()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_a_refusal_leaves_the_model_alone() -> None:
    model = build("mixtral")
    names, attributes = [n for n, _ in model.named_modules()], set(vars(model))
    state = copy.deepcopy(model.state_dict())
    for options in (
        {"gpu_memory": 1},
        {"device": "meta"},
        {"statistics": RoutingStatistics(9, 4, 2)},
    ):
        with pytest.raises(ValueError, match="must be"):
            make(model, **options)
    assert [n for n, _ in model.named_modules()] == names
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())


def test_a_wrong_call_of_an_attached_model_is_the_models_own_error() -> None:
    model = build("mixtral")
    with offloader(model, 3) as given:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 2), 10**6))
        # And of the experts: an index that is none.
        stand = model.get_submodule(given.placement.layers[0])
        with pytest.raises(ValueError, match=r"`top_k_index` must be integers in \[0, 4\], got 5"):
            stand(torch.randn(1, 32), torch.tensor([[0, 5]]), torch.ones(1, 2))
        assert model(input_ids=UNSEEN).logits.shape[:2] == UNSEEN.shape

"""Layers that are computed before they are called, beside the same layers one by one."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from haq import Int8Linear
from haq.int8 import matmul
from haq.model import ahead, attention
from haq.nn.several import SeveralSteps
from tests.architectures import token_ids, with_cache
from tests.model.decoding import (
    FAST,
    NEW,
    PROMPT,
    by_llvm,
    decoded,
    int8,
    layers_of,
    needs_llvm,
)

pytestmark = needs_llvm

# Mixtures with shared experts are called as they are, and a cache of a window does not grow.
NOT_AHEAD = {"glm4-moe", "qwen2-moe", "mistral"}


@pytest.fixture(autouse=True)
def llvm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_MATRICES", False)  # As in test_steps.py.
    with by_llvm():
        yield


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that were given what had been computed."""
    seen: list[nn.Module] = []
    computed = ahead.computed

    def note(layer: nn.Module, *rest: Any) -> Tensor | None:
        result = computed(layer, *rest)
        if result is not None:
            seen.append(layer)
        return result

    monkeypatch.setattr(ahead, "computed", note)
    return seen


def one_by_one(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers never learn who follows."""
    twin = copy.deepcopy(model)
    for layer in layers_of(twin):
        known = ahead.known_of(layer)
        assert known is not None
        known.wasted = ahead._MOST_WASTED
    return twin


def deeper() -> PreTrainedModel:
    """A model of three layers."""
    model = int8()
    third: Any = copy.deepcopy(model.model.layers[1])
    third.self_attn.layer_idx = 2
    model.model.layers.append(third)
    model.config.num_hidden_layers = 3
    return model


class Layers:
    """The layers of a model behind a prompt, to be called one by one."""

    def __init__(self, model: PreTrainedModel, learned: bool = True) -> None:
        self.model, self.layers = model, layers_of(model)
        self.cache = DynamicCache(config=model.config)
        model(token_ids(1, PROMPT), **with_cache(model, self.cache))
        if learned:
            self.run(0)

    def arguments(self, seed: int) -> dict[str, Any]:
        position = torch.tensor([[self.cache.get_seq_length()]])
        rotation = self.model.model.rotary_emb(self.token(seed), position)
        return {
            "attention_mask": None,
            "position_embeddings": rotation,
            "position_ids": position,
            **with_cache(self.model, self.cache),
        }

    def token(self, seed: int) -> Tensor:
        return self.model.model.embed_tokens(token_ids(1, 1, seed=seed))

    def run(self, seed: int, between: Callable[[Tensor, dict[str, Any]], Tensor] | None = None):  # type: ignore[no-untyped-def]
        """All layers; between the first and the second one something may be done."""
        x, kwargs = self.token(seed), self.arguments(seed)
        for number, layer in enumerate(self.layers):
            if number == 1 and between is not None:
                x = between(x, kwargs)
            x = layer(x, **kwargs)
        return x.clone()


@pytest.mark.parametrize("name", sorted(FAST))
def test_gives_the_same_bits(name: str, given: list[nn.Module]) -> None:
    model = int8(name)
    expected = decoded(one_by_one(model))
    assert not given
    assert torch.equal(decoded(model), expected)
    # The first token teaches who follows.
    assert given == layers_of(model)[1:] * (0 if name in NOT_AHEAD else NEW - 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_generates_the_same(mode: Any, given: list[nn.Module]) -> None:
    model = int8()
    tokens = token_ids(1, 5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with mode():
        expected = one_by_one(model).generate(tokens, **options)
        assert torch.equal(model.generate(tokens, **options), expected)
    assert len(given) >= 10


def lengths(layers: Layers) -> list[int]:
    return [layer.keys.shape[2] for layer in layers.cache.layers]  # type: ignore[union-attr]


@torch.no_grad()
def test_the_cache_is_given_keys_when_the_layer_is_called(given: list[nn.Module]) -> None:
    layers = Layers(int8())
    before = lengths(layers)
    seen = []

    def look(x: Tensor, _kwargs: Any) -> Tensor:
        seen.append(lengths(layers))
        return x

    layers.run(1, look)
    assert seen == [[before[0] + 1, before[1]]]
    assert lengths(layers) == [length + 1 for length in before]
    assert len(given) == 1


def _another_object(x: Tensor, _kwargs: Any) -> Tensor:
    return x.clone()


def _written_to(x: Tensor, _kwargs: Any) -> Tensor:
    return x.mul_(2)


def _another_rotation(x: Tensor, kwargs: Any) -> Tensor:
    cos, sin = kwargs["position_embeddings"]
    kwargs["position_embeddings"] = sin, cos
    return x


def _rotation_written_to(x: Tensor, kwargs: Any) -> Tensor:
    kwargs["position_embeddings"][0].neg_()
    return x


def _one_argument_more(x: Tensor, kwargs: Any) -> Tensor:
    kwargs["something"] = None
    return x


def _a_mask(x: Tensor, kwargs: Any) -> Tensor:
    kwargs["attention_mask"] = torch.zeros(1, 1, 1, PROMPT + 3, dtype=x.dtype)
    kwargs["attention_mask"][..., :3] = -torch.inf
    return x


def _cut(_x: Tensor, kwargs: Any) -> Tensor:
    cache = next(value for value in kwargs.values() if isinstance(value, DynamicCache))
    cache.layers[1].crop(-2)
    return _x


def _keys_written(x: Tensor, kwargs: Any) -> Tensor:
    cache: Any = next(value for value in kwargs.values() if isinstance(value, DynamicCache))
    cache.layers[1].keys = 2 * cache.layers[1].keys
    return x


CHANGES = [
    _another_object,
    _written_to,
    _another_rotation,
    _rotation_written_to,
    _one_argument_more,
    _a_mask,
    _cut,
    _keys_written,
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_layers_is_seen(
    change: Any, mode: Any, given: list[nn.Module]
) -> None:
    model = int8()
    with mode():
        plain, ours = Layers(one_by_one(model)), Layers(model)
        unchanged = ours.run(1)
        assert torch.equal(plain.run(1), unchanged)
        assert len(given) == 1
        changed = ours.run(1, change)
        assert torch.equal(changed, plain.run(1, change))
        assert len(given) == 1
        assert ahead._ahead.get(ours.cache) is None
        # And nothing is left of it.
        assert torch.equal(ours.run(2), plain.run(2))
        assert torch.equal(ours.run(3), plain.run(3))


@torch.no_grad()
def test_another_mode_between_layers_is_seen(given: list[nn.Module]) -> None:
    layers = Layers(int8())

    def enable(x: Tensor, _kwargs: Any) -> Tensor:
        torch.set_grad_enabled(True)
        return x

    try:
        layers.run(1, enable)
    finally:
        torch.set_grad_enabled(False)
    assert not given


@torch.no_grad()
def test_another_cache_is_seen(given: list[nn.Module]) -> None:
    model = int8()
    layers = Layers(model)
    other = Layers(model, learned=False)
    twin = Layers(one_by_one(model), learned=False)

    def exchange(x: Tensor, kwargs: Any) -> Tensor:
        kwargs.update(with_cache(model, other.cache))
        return x

    twin.run(0)
    found = layers.run(1, exchange)
    # The other's second layer has one token less.
    twin.cache.layers[1].crop(-1)
    assert torch.equal(found, twin.run(1))
    assert not given
    assert lengths(other) == [PROMPT, PROMPT + 1]


@torch.no_grad()
def test_a_cache_of_another_dtype_is_given_keys_as_ever(given: list[nn.Module]) -> None:
    model = int8()
    outputs = []
    for each in (model, one_by_one(model)):
        layers = Layers(each)
        second: Any = layers.cache.layers[1]
        second.keys, second.values = second.keys.float(), second.values.float()
        outputs.append(torch.stack([layers.run(seed) for seed in range(1, 4)]))
        assert second.keys.shape[2] == PROMPT + 4
    assert torch.equal(*outputs)
    assert not given


@torch.no_grad()
def test_layers_that_are_left_out_are_not_computed_again(given: list[nn.Module]) -> None:
    model = int8("qwen3")
    first, second = layers_of(model)
    layers = Layers(model)
    known = ahead.known_of(first)
    assert known is not None
    for number in range(2):
        first(layers.token(number), **layers.arguments(number))
        layers.cache.layers[0].crop(-1)
        assert known.follower is not None or number
    assert known.wasted == 1
    assert known.follower is None
    layers.run(2)
    assert known.follower is not None
    assert known.follower() is second
    layers.run(3)
    assert known.wasted == 0
    assert given == [second]


@torch.no_grad()
def test_three_layers(given: list[nn.Module]) -> None:
    """What was computed in vain counts once, whatever number of layers would have followed."""
    model = deeper()
    first, second, third = layers_of(model)
    plain, ours = Layers(one_by_one(model)), Layers(model)
    assert torch.equal(ours.run(1), plain.run(1))
    assert given == [second, third]
    assert torch.equal(ours.run(1, _a_mask), plain.run(1, _a_mask))
    known = [ahead.known_of(layer) for layer in (first, second)]
    assert [each.wasted for each in known if each is not None] == [1, 0]
    assert torch.equal(ours.run(2), plain.run(2))
    assert torch.equal(ours.run(3), plain.run(3))
    assert given == [second, third, third, second, third]


@torch.no_grad()
def test_what_is_wasted_too_often_is_given_up(given: list[nn.Module]) -> None:
    layers = Layers(int8())
    known = ahead.known_of(layers.layers[0])
    assert known is not None
    for number in range(3 * ahead._MOST_WASTED):
        layers.run(number)
        layers.run(number, _another_object)
    assert known.wasted == ahead._MOST_WASTED
    assert known.follower is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["before", "behind"])
def test_at_a_layer_with_a_hook_nothing_is_computed_before(
    kind: str, given: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = int8()
    plain = one_by_one(model)
    decoded(model)
    given.clear()
    for each in (model, plain):
        first, second = layers_of(each)
        if kind == "before":
            second.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
        else:
            first.register_forward_hook(lambda _module, _args, output: 2 * output)
    monkeypatch.setattr(SeveralSteps, "run", lambda *_: pytest.fail("The next one was computed."))
    assert torch.equal(decoded(model), decoded(plain))
    assert not given


@torch.no_grad()
def test_before_a_layer_that_trains(given: list[nn.Module]) -> None:
    model = int8()
    expected = decoded(model)
    given.clear()
    layers_of(model)[1].train()
    torch.testing.assert_close(decoded(model), expected, rtol=0.02, atol=0.02)
    assert not given


@torch.no_grad()
def test_a_mask_behind_the_token_is_seen(given: list[nn.Module]) -> None:
    model = int8()
    outputs = []
    for each in (model, one_by_one(model)):
        layers = Layers(each)
        for number in range(1, 3):
            x, kwargs = layers.token(number), layers.arguments(number)
            del kwargs["attention_mask"]
            mask = torch.zeros(1, 1, 1, PROMPT + 3, dtype=x.dtype)
            mask[..., :3] = -torch.inf
            x = layers.layers[0](x, **kwargs)
            x = layers.layers[1](x, *([mask] if number == 2 else []), **kwargs)
        outputs.append(x.clone())
    assert torch.equal(*outputs)
    assert len(given) == 1


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_a_layer_that_follows_itself(learned: bool) -> None:
    """As models with shared layers do: its memory is there once."""
    model = int8()
    layer = layers_of(model)[0]
    outputs = []
    for each in (model, one_by_one(model)):
        layers = Layers(each, learned)
        layers.layers = [layers.layers[0], layers.layers[0]]
        outputs.append(torch.stack([layers.run(seed) for seed in range(5)]))
    assert torch.equal(*outputs)
    known = ahead.known_of(layer)
    assert known is not None
    assert known.follower is not None
    assert known.follower() is layer


@torch.no_grad()
def test_an_expert_that_kernels_do_not_know(given: list[nn.Module]) -> None:
    """What comes before it is given all the same."""
    model = int8("mixtral")
    decoded(model)
    first, second = layers_of(model)
    for layer, taken in ((second, 0), (first, 0)):
        with matmul.use_backend("reference"):
            experts = layer.get_submodule("mlp.experts")
            experts.load_state_dict(experts.state_dict())
        assert any(e.backend == "reference" for e in experts.modules() if type(e) is Int8Linear)
        expected = decoded(one_by_one(model))
        given.clear()
        assert torch.equal(decoded(model), expected)
        assert len(given) == taken


@torch.no_grad()
def test_caches_are_let_go() -> None:
    """Also where what was computed was never asked for."""
    layers = Layers(int8())
    layers.layers[0](layers.token(1), **layers.arguments(1))
    assert layers.cache in ahead._ahead
    held = weakref.ref(layers.cache.layers[1].keys)
    copied = copy.deepcopy(layers.cache)
    assert copied not in ahead._ahead
    gc.disable()
    try:
        del layers.cache
        assert held() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_weights_are_let_go() -> None:
    model = int8()
    decoded(model)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    held = [weakref.ref(layer._packed) for layer in layers]
    with matmul.use_backend("reference"):
        for layer in layers:
            layer.load_state_dict(layer.state_dict())
    assert all(packed() is None for packed in held)
    expected = decoded(one_by_one(model))
    assert torch.equal(decoded(model), expected)


@torch.no_grad()
def test_an_interrupted_step_is_repeated(given: list[nn.Module]) -> None:
    model = int8()
    plain, ours = Layers(one_by_one(model)), Layers(model)
    ours.run(1), plain.run(1)

    def stop(_x: Tensor, _kwargs: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.run(2, stop)
    ours.cache.layers[0].crop(-1)
    for seed in range(2, 5):
        assert torch.equal(ours.run(seed), plain.run(seed))
    assert len(given) == 3  # The one that was repeated taught again who follows.

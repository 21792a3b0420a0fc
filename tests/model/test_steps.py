"""Decoder layers that take one new token in two calls, beside their own way."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, StaticCache

from haq import Int8Experts, Int8Linear
from haq.int8 import matmul
from haq.model import anatomy, attention
from haq.model.steps import takes_fast_steps, use_fast_steps
from haq.nn.swapped import Swapped
from tests.architectures import ARCHITECTURES, token_ids, with_cache
from tests.model.decoding import (
    FAST,
    MODELS,
    NEW,
    PROMPT,
    by_itself,
    by_llvm,
    counted,
    decoded,
    int8,
    layers_of,
    needs_llvm,
)


@pytest.fixture(autouse=True)
def llvm() -> Iterator[None]:
    """Whatever was measured to be the fastest one."""
    with by_llvm():
        yield


@pytest.fixture(autouse=True)
def no_attention_by_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplies matrices of bfloat16 (AMX) a layer's own attention is torch's, which
    rounds more than the kernels that it is compared with."""
    monkeypatch.setattr(attention, "_MATRICES", False)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_decodes_as_it_does_by_itself(name: str) -> None:
    if not layers_of(MODELS[name]()):  # Nothing is done to these.
        assert name not in FAST
        return
    model = int8(name)
    expected = decoded(by_itself(model))
    found = decoded(model)
    # A sigmoid's last bit may differ, which moves what is rounded behind it.
    assert (found != expected).float().mean() <= 0.02
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    if matmul.compiles():
        fast = [takes_fast_steps(layer) for layer in layers_of(model)]
        assert set(fast) == {name in FAST}


@needs_llvm
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_float16(name: str) -> None:
    model = int8(name, torch.float16)
    expected = decoded(by_itself(model))
    with counted() as seen:
        found = decoded(model)
    assert len(seen) == NEW * len(layers_of(model))
    assert (found != expected).float().mean() <= 0.02
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


@needs_llvm
def test_where_torch_attends_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention rounds in between; a step in two calls is the faster one all the same."""
    monkeypatch.setattr(attention, "_MATRICES", True)
    model = int8()
    expected = decoded(by_itself(model))
    with counted() as seen:
        found = decoded(model)
    assert len(seen) == 2 * NEW
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@needs_llvm
def test_generates_what_it_generates_by_itself() -> None:
    model = int8()
    prompt = token_ids(1, 5)
    expected = by_itself(model).generate(prompt, max_new_tokens=80, do_sample=False)
    with counted() as seen:
        found = model.generate(prompt, max_new_tokens=80, do_sample=False)
    assert torch.equal(found, expected)
    assert len(seen) == 2 * 79


def _hooked(model: PreTrainedModel) -> dict[str, Any]:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: None)
    return {}


def _replaced_forward(model: PreTrainedModel) -> dict[str, Any]:
    for layer in layers_of(model):
        norm: Any = layer.post_attention_layernorm
        norm.forward = norm.forward
    return {}


def _another_attention(model: PreTrainedModel) -> dict[str, Any]:
    model.set_attn_implementation("sdpa")
    return {}


def _with_weights_of_attention(model: PreTrainedModel) -> dict[str, Any]:
    model.set_attn_implementation("eager")
    return {"output_attentions": True}


def _float32(model: PreTrainedModel) -> dict[str, Any]:
    model.float()
    return {}


def _fixed_cache(model: PreTrainedModel) -> dict[str, Any]:
    return {"cache": StaticCache(config=model.config, max_cache_len=PROMPT + NEW)}


OWN_WAYS: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "hooks": _hooked,
    "a forward that was replaced": _replaced_forward,
    "another attention": _another_attention,
    "weights of the attention": _with_weights_of_attention,
    "float32": _float32,
    "training": lambda model: model.train() and {},
    "a cache of fixed size": _fixed_cache,
}


@needs_llvm
@pytest.mark.parametrize("way", OWN_WAYS)
def test_goes_its_own_way_with(way: str) -> None:
    model = int8()
    prepared = OWN_WAYS[way](model)
    plain = by_itself(model)
    again = OWN_WAYS[way](plain)
    expected = decoded(plain, **again)
    with counted() as seen:
        found = decoded(model, **prepared)
    assert torch.equal(found, expected)
    assert not seen


@needs_llvm
@torch.no_grad()
def test_masks_batches_and_prompts_go_their_own_way() -> None:
    model = int8()
    plain = by_itself(model)
    tokens = token_ids(2, 8)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    results = []
    with counted() as seen:
        for each in (model, plain):
            cache = with_cache(each, DynamicCache(config=each.config))
            logits = [each(tokens[:, :6], attention_mask=mask[:, :6], **cache).logits]
            logits += [each(tokens[:, 6:7], attention_mask=mask[:, :7], **cache).logits]
            one = with_cache(each, DynamicCache(config=each.config))
            logits += [each(tokens[:1, :5], attention_mask=mask[:1, :5], **one).logits]
            logits += [each(tokens[:1, 5:6], attention_mask=mask[:1, :6], **one).logits]
            logits += [each(tokens[1:, :1]).logits, each(tokens[1:, :1], use_cache=False).logits]
            results.append(logits)
    # A model that is given no cache makes one, and its first token is one behind none.
    assert len(seen) == 2
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@needs_llvm
def test_gradients_to_the_input_go_their_own_way() -> None:
    model = int8()
    cache = with_cache(model, DynamicCache(config=model.config))
    states = torch.randn(1, 1, model.config.hidden_size).bfloat16().requires_grad_()
    with counted() as seen:
        model(inputs_embeds=states, **cache).logits.sum()
    assert not seen


@needs_llvm
def test_a_hook_that_comes_later_is_called() -> None:
    model = int8()
    seen: list[tuple[int, ...]] = []
    decoded(model)
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda _module, _args, output: seen.append(output.shape)
    )
    decoded(model)
    assert len(seen) == NEW + 1
    handle.remove()
    with counted() as taken:
        decoded(model)
    assert len(seen) == NEW + 1
    assert len(taken) == 2 * NEW


@needs_llvm
def test_all_hidden_states() -> None:
    model = int8()
    decoded(model)
    plain = by_itself(model)
    tokens = token_ids(1, 9)
    states = []
    for each in (model, plain):
        cache = with_cache(each, DynamicCache(config=each.config))
        with torch.no_grad():
            each(tokens[:, :8], **cache)
            states.append(each(tokens[:, 8:], output_hidden_states=True, **cache).hidden_states)
    assert len(states[0]) == 3
    for found, expected in zip(*states, strict=True):
        assert torch.equal(found, expected)
    with counted() as seen:  # The hooks stay, and sleep.
        decoded(model)
    assert len(seen) == 2 * NEW


@needs_llvm
def test_logits_of_routers() -> None:
    """They are collected by hooks of transformers, which sleep until they are asked for."""
    model = int8("mixtral")
    plain = by_itself(model)
    tokens = token_ids(1, 9)
    for _ in range(2):
        logits = []
        for each in (model, plain):
            cache = with_cache(each, DynamicCache(config=each.config))
            with torch.no_grad():
                each(tokens[:, :8], **cache)
                found = each(tokens[:, 8:], output_router_logits=True, **cache)
            logits.append(found.router_logits)
        assert len(logits[0]) == 2
        for found, expected in zip(*logits, strict=True):
            assert torch.equal(found, expected)
        with counted() as seen:
            decoded(model)
        # Before it had hooks for that, transformers left its mark on the modules.
        assert len(seen) == (2 * NEW if anatomy._collector is not None else 0)


def _loaded(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn.o_proj
    state = layer.state_dict()
    layer.load_state_dict(state | {"weight": state["weight"].flip(1)})


def _written(model: PreTrainedModel) -> None:
    layer: Int8Linear = model.model.layers[0].mlp.gate_proj
    layer.write([layer.weight.flip(1).clone(), *layer.vectors()])


def _replaced(model: PreTrainedModel) -> None:
    block = model.model.layers[1].mlp
    block.up_proj = Int8Linear.from_float(torch.randn(block.up_proj.weight.shape))


def _excluded(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    rows, columns = attention.v_proj.weight.shape
    attention.v_proj = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)


class _Doubled(nn.Module):
    def forward(self, *args: Any) -> Any:
        return 2 * super().forward(*args)


def _of_another_class(model: PreTrainedModel) -> None:
    block = model.model.layers[1].mlp
    block.__class__ = type("Doubled", (_Doubled, type(block)), {})


def _shared(model: PreTrainedModel) -> None:
    model.share_memory()


def _there_and_back(model: PreTrainedModel) -> None:
    model.float()
    model.bfloat16()


@needs_llvm
@pytest.mark.parametrize(
    "change",
    [_loaded, _written, _replaced, _excluded, _of_another_class, _shared, _there_and_back],
)
def test_sees_what_changed_since(change: Callable[[PreTrainedModel], None]) -> None:
    model = int8()
    before = decoded(model)
    with torch.no_grad():
        change(model)
    expected = decoded(by_itself(model))
    found = decoded(model)
    assert (found != expected).float().mean() <= 0.02
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert torch.equal(before, expected) == (change in (_shared, _there_and_back))


@needs_llvm
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_take_steps_with_their_own_weights(copied: Callable[[Any], Any]) -> None:
    model = int8()
    expected = decoded(model)
    twin = copied(model)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight_scale.zero_().add_(1)
    with counted() as seen:
        assert torch.equal(decoded(twin), expected)
    assert len(seen) == 2 * NEW
    assert isinstance(twin.model.layers[0], Swapped)


@needs_llvm
def test_several_threads_share_a_model() -> None:
    model = int8()
    expected = [decoded(by_itself(model), seed) for seed in range(4)]
    results: dict[int, list[Tensor]] = {seed: [] for seed in range(4)}

    def work(seed: int) -> None:
        for _ in range(5):
            results[seed].append(decoded(model, seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed, found in results.items():
        assert len(found) == 5
        for logits in found:
            assert (logits != expected[seed]).float().mean() <= 0.02
            torch.testing.assert_close(logits, expected[seed], rtol=0.02, atol=0.02)


@needs_llvm
def test_a_long_text() -> None:
    """More keys than there was room for at first."""
    model = int8()
    model.config.max_position_embeddings = 4096
    cache = with_cache(model, DynamicCache(config=model.config))
    tokens = token_ids(1, 1500)
    plain = by_itself(model)
    with torch.no_grad():
        model(tokens[:, :-2], **cache)
        found = [model(tokens[:, at:][:, :1], **cache).logits for at in (-2, -1)]
        cache = with_cache(plain, DynamicCache(config=plain.config))
        plain(tokens[:, :-2], **cache)
        expected = [plain(tokens[:, at:][:, :1], **cache).logits for at in (-2, -1)]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=0.02, atol=0.02)


@needs_llvm
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_mode_of_gradients(name: str) -> None:
    """Where they are enabled, norms may be asked for them; what is found out then is not kept."""
    model = int8(name)
    tokens = token_ids(1, PROMPT + 1)
    for mode, steps_taken in (
        (torch.enable_grad, 0),
        (torch.no_grad, 2),
        (torch.inference_mode, 2),
    ):
        results = []
        with mode(), counted() as seen:  # type: ignore[no-untyped-call]
            for each in (model, by_itself(model)):
                given = with_cache(each, DynamicCache(config=each.config))
                each(tokens[:, :PROMPT], **given)
                results.append(each(tokens[:, PROMPT:], **given).logits)
        assert torch.equal(*results)
        assert results[0].requires_grad == (mode is torch.enable_grad)
        assert len(seen) == steps_taken


MIXED = ["mixtral", "qwen3-moe", "olmoe"]


@needs_llvm
@pytest.mark.parametrize("name", MIXED)
def test_a_mixture_is_kernels_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its router nor its experts are called."""
    model = int8(name)
    expected = decoded(by_itself(model))
    decoded(model)

    def never(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError

    prompt, rest = token_ids(1, PROMPT), token_ids(1, PROMPT + NEW)[:, PROMPT:]
    given = with_cache(model, DynamicCache(config=model.config))
    with torch.no_grad():
        model(prompt, **given)
        monkeypatch.setattr(Int8Experts, "forward", never)
        monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", never)
        found = [model(rest[:, at : at + 1], **given).logits for at in range(NEW)]
    assert (torch.cat(found) != expected).float().mean() <= 0.02


@needs_llvm
@pytest.mark.parametrize("part", ["gate", "experts"])
def test_hooks_of_a_mixture_are_called(part: str) -> None:
    model = int8("mixtral")
    expected = decoded(model)
    seen: list[Any] = []
    for layer in layers_of(model):
        module = layer.get_submodule(f"mlp.{part}")
        module.register_forward_hook(lambda *args: seen.append(args[-1]))
    assert torch.equal(decoded(model), expected)
    assert len(seen) == 2 * (NEW + 1)


@needs_llvm
def test_experts_that_were_loaded_are_read() -> None:
    model = int8("mixtral")
    before = decoded(model)
    for layer in layers_of(model):
        for expert in layer.get_submodule("mlp.experts.down").children():
            assert isinstance(expert, Int8Linear)
            expert.load_state_dict(expert.state_dict() | {"weight": expert.weight.flip(1)})
    expected = decoded(by_itself(model))
    with counted() as seen:
        found = decoded(model)
    assert len(seen) == 2 * NEW
    assert (found != expected).float().mean() <= 0.02
    assert not torch.equal(found, before)


@needs_llvm
def test_experts_that_were_laid_out_for_another_backend_are_called() -> None:
    model = int8("mixtral")
    expected = decoded(model)
    with matmul.use_backend("reference"):
        for layer in layers_of(model):
            experts = layer.get_submodule("mlp.experts")
            experts.load_state_dict(experts.state_dict())
            assert {e.backend for e in experts.modules() if isinstance(e, Int8Linear)} == {
                "reference"
            }
    with counted() as seen:
        found = decoded(model)
    assert len(seen) == 2 * NEW
    assert (found != expected).float().mean() <= 0.02


class _OneMore(nn.Module):
    """An attention whose output is multiplied by what is one now."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(attention.__dict__)
        self.inner = [attention]  # No module of this one's.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.inner[0](*args, **kwargs)
        return output * 1.0, weights


@needs_llvm
@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "mixtral", "olmoe"])
def test_one_product_more_is_not_trusted(name: str) -> None:
    """Whatever the block of the layer may do itself."""
    model = int8(name)
    layer: Any = model.model.layers[0]
    layer.self_attn = _OneMore(layer.self_attn)
    decoded(model)
    assert [takes_fast_steps(each) for each in layers_of(model)] == [False, True]


@needs_llvm
def test_another_activation_of_experts_is_called() -> None:
    model = int8("mixtral")
    decoded(model)
    for layer in layers_of(model):
        experts: Any = layer.get_submodule("mlp.experts")
        experts.activation = lambda x: functional.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    expected = decoded(by_itself(model))
    found = decoded(model)
    assert (found != expected).float().mean() <= 0.02


class _Biased(nn.Module):
    """A router that prefers its last expert."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        shifted = logits.clone()
        shifted[:, -1] += 1
        scores, index = shifted.float().softmax(-1).topk(self.top_k)
        return logits, scores / scores.sum(-1, keepdim=True), index


@needs_llvm
def test_another_router_is_called() -> None:
    model = int8("mixtral")
    before = decoded(model)
    for layer in layers_of(model):
        block: Any = layer.get_submodule("mlp")
        block.gate = _Biased(block.gate)
    expected = decoded(by_itself(model))
    with counted() as seen:
        found = decoded(model)
    assert len(seen) == 2 * NEW  # What is before the block is kernels.
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_counts_the_layers_it_may_help() -> None:
    model = ARCHITECTURES["llama"]().bfloat16()
    assert use_fast_steps(model) == 2
    assert use_fast_steps(model) == 2
    assert use_fast_steps(ARCHITECTURES["gpt2"]().bfloat16()) == 0
    assert not takes_fast_steps(model.model.layers[0])


class _LateScale(nn.Module):
    """An attention whose output is scaled from a position on."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(attention.__dict__)
        self.inner = [attention]  # No module of this one's.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.inner[0](*args, **kwargs)
        late = kwargs["position_ids"][0, -1] > 100
        return output * torch.where(late, 2.0, 1.0).to(output.dtype), weights


@needs_llvm
def test_what_may_make_a_difference_later_is_not_trusted() -> None:
    model = int8()
    layer = model.model.layers[0]
    layer.self_attn = _LateScale(layer.self_attn)
    with counted() as seen:
        decoded(model)
    assert [takes_fast_steps(each) for each in layers_of(model)] == [False, True]
    assert len(seen) == NEW

"""The attention implementation that quantized models use, in transformers' own models."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import sdpa_attention

from haq.int8 import matmul
from haq.model import attention
from haq.model.attention import NAME, use_fast_attention
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids, with_cache

MODELS = ARCHITECTURES | MIXTURES

# Others have no torch attention, or one that is not to be changed, by version of transformers.
USUAL = {"opt", "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral", "olmoe"}


@pytest.fixture(autouse=True)
def without_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors that multiply matrices in bfloat16 have an attention of torch's that is faster."""
    monkeypatch.setattr(attention, "_MATRICES", False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens were attended to, each time the fast one was used."""
    seen: list[int] = []
    original = attention.attend

    def note(query: Tensor, key: Tensor, *rest: Tensor) -> Tensor:
        seen.append(key.shape[2])
        return original(query, key, *rest)

    monkeypatch.setattr(attention, "attend", note)
    return seen


@torch.no_grad()
def decoded(model: PreTrainedModel) -> Tensor:
    """Logits of three tokens, one after the other, behind prompts of different lengths."""
    tokens = token_ids(2, 15)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    state = model(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True)
    logits = []
    for end in range(13, 16):
        state = model(
            tokens[:, end - 1 : end],
            attention_mask=mask[:, :end],
            **with_cache(model, state.past_key_values),
        )
        logits.append(state.logits.double())
    return torch.cat(logits)


@pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prompts_are_as_near_to_float32_as_torchs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended = []
    original = attention.attend_to_prompt

    def note(*given: Any) -> Tensor | None:
        attended.append(original(*given))
        return attended[-1]

    monkeypatch.setattr(attention, "attend_to_prompt", note)
    model, tokens = MODELS[name]().bfloat16(), token_ids(2, 40)
    exact = copy.deepcopy(model).float()(tokens).logits
    theirs = model(tokens).logits.float()
    use_fast_attention(model)
    ours = model(tokens).logits.float()
    assert attended or name not in USUAL - {"mistral"}  # Its window is a mask.
    assert all(result is not None for result in attended)
    # Of the usual token: a few are sent to other experts for a difference of a bit.
    errors = [
        ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).median() for logits in (ours, theirs)
    ]
    assert errors[0] < 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_it_is_as_near_to_float32_as_torchs(name: str, calls: list[int]) -> None:
    model = MODELS[name]().bfloat16()
    exact = decoded(copy.deepcopy(model).float())
    theirs = decoded(model)
    use_fast_attention(model)
    assert not calls
    ours = decoded(model)
    assert bool(calls) == (model.config._attn_implementation == NAME)
    assert calls or name not in USUAL
    errors = [((logits - exact).norm() / exact.norm()).item() for logits in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1] + 1e-3
    model.set_attn_implementation(model.config._attn_implementation.replace(NAME, "sdpa"))
    assert torch.equal(decoded(model), theirs)


def test_everything_else_is_torchs(calls: list[int]) -> None:
    model = ARCHITECTURES["llama"]()
    tokens = token_ids(2, 15)
    expected = [model(tokens).logits, decoded(model)]  # Prompts, and one token in float32.
    use_fast_attention(model)
    assert model.config._attn_implementation == NAME
    for before, now in zip(expected, [model(tokens).logits, decoded(model)], strict=True):
        assert torch.equal(now, before)
    model.bfloat16()
    in_training = model.train()
    for layer in in_training.model.layers:
        layer.self_attn.attention_dropout = 0.5
    decoded(in_training)
    assert not calls


def test_torchs_is_used_where_it_multiplies_matrices(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MATRICES", True)
    monkeypatch.setattr(attention, "attend_to_prompt", lambda *_: pytest.fail("a prompt"))
    model, tokens = ARCHITECTURES["llama"]().bfloat16(), token_ids(2, 40)
    expected = [model(tokens).logits, decoded(model)]
    use_fast_attention(model)
    assert torch.equal(model(tokens).logits, expected[0])
    assert torch.equal(decoded(model), expected[1])
    assert not calls
    decoded(model.half())
    assert calls  # Of float16 it multiplies none.


@pytest.mark.parametrize("matrices", [True, False])
@torch.no_grad()
def test_compiled_code_is_one_graph(matrices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MATRICES", matrices)
    model, tokens = ARCHITECTURES["llama"]().bfloat16(), token_ids(1, 20)
    use_fast_attention(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(tokens, use_cache=False).logits.double()
    result = compiled(tokens, use_cache=False).logits.double()
    assert float((result - expected).norm() / expected.norm()) < 2**-6  # A bfloat16 has 8 bits.
    assert attention._is_the_faster_one(torch.bfloat16) is not matrices
    with attention.always_ours():
        assert attention._is_the_faster_one(torch.bfloat16)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_what_the_user_chose_stays(implementation: str) -> None:
    model = ARCHITECTURES["llama"]()
    model.set_attn_implementation(implementation)
    use_fast_attention(model)
    assert model.config._attn_implementation == implementation


def test_a_model_of_it_copies_pickles_and_saves(tmp_path: str) -> None:
    model = ARCHITECTURES["qwen2"]().bfloat16()
    use_fast_attention(model)
    expected = decoded(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config._attn_implementation == NAME
        assert torch.equal(decoded(twin), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


def test_arguments_that_it_does_not_know_are_torchs(calls: list[int]) -> None:
    query, key = torch.randn(1, 2, 1, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    module = torch.nn.Module()
    bias = torch.randn(1, 2, 1, 5).bfloat16()
    result, _ = attention.attention_forward(module, query, key, key, None, position_bias=bias)
    expected, _ = sdpa_attention.sdpa_attention_forward(
        module, query, key, key, None, position_bias=bias
    )
    assert torch.equal(result, expected)
    assert not calls
    attention.attention_forward(module, query, key, key, None, position_bias=None)
    assert calls == [5]

"""Published names and rows against the files that `transformers` itself writes."""

import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from haq.model import published
from haq.model.published import Piece, _LargeOnMeta, published_pieces, skeleton, tied_names
from tests.architectures import ARCHITECTURES, EXPERTS, HIDDEN, INNER, MIXTURES
from tests.conftest import ModelFactory

MODELS = ARCHITECTURES | MIXTURES


def pieces_of(model: PreTrainedModel) -> list[Piece]:
    return published_pieces(skeleton(type(model), model.config))


@functools.cache
def known(name: str) -> tuple[PreTrainedModel, list[Piece]]:
    """To be looked at only."""
    model = MODELS[name]()
    return model, pieces_of(model)


def written(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """What `transformers` publishes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def rows_of(value: Tensor, piece: Piece, shape: torch.Size) -> Tensor:
    """What is called a piece, of the value of its parameter, without haq's own code for it."""
    if piece.rows is None:
        return value
    return value.reshape(-1, *shape[1:])[piece.rows].reshape(shape)


# --- Every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_what_transformers_writes(name: str, tmp_path: Path) -> None:
    model, pieces = known(name)
    files, state = written(model, tmp_path), model.state_dict()
    names = [piece.name for piece in pieces]
    assert len(names) == len(set(names))
    assert set(names) == set(files)
    for piece in pieces:
        tensor = files[piece.name]
        taken = rows_of(state[piece.parameter], piece, tensor.shape)
        assert taken.shape == tensor.shape, piece.name
        assert torch.equal(taken, tensor), piece.name


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_every_parameter_is_published_once(name: str) -> None:
    model, pieces = known(name)
    state = model.state_dict()
    by_parameter: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_parameter[piece.parameter].append(piece)
    assert set(by_parameter) == set(state) - set(tied_names(model))
    for parameter, parts in by_parameter.items():
        if len(parts) == 1 and parts[0].rows is None:
            continue
        value = state[parameter]
        rows = torch.cat([part.rows for part in parts if part.rows is not None])
        # Of fused experts [E, N, K] the rows are those of all experts.
        assert torch.equal(rows.sort().values, torch.arange(value.numel() // value.shape[-1]))
        assert all(part.rows is not None and part.rows.dtype == torch.int64 for part in parts)


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_in_the_order_of_the_state(name: str) -> None:
    model, pieces = known(name)
    order = list(model.state_dict())
    positions = [order.index(piece.parameter) for piece in pieces]
    assert positions == sorted(positions)


# --- What they are called -------------------------------------------------------------------------


def test_the_matrices_of_mixtral() -> None:
    """Gate is w1, up is w3, down is w2, one expert after the other."""
    found = {p.name: p for p in known("mixtral")[1] if ".experts." in p.name}
    expected = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            disk = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            memory = f"model.layers.{layer}.mlp.experts"
            start = expert * 2 * INNER
            gate = torch.arange(start, start + INNER)
            down = torch.arange(expert * HIDDEN, (expert + 1) * HIDDEN)
            expected |= {
                f"{disk}.w1.weight": (f"{memory}.gate_up_proj", gate),
                f"{disk}.w3.weight": (f"{memory}.gate_up_proj", gate + INNER),
                f"{disk}.w2.weight": (f"{memory}.down_proj", down),
            }
    assert set(found) == set(expected)
    for name, (parameter, rows) in expected.items():
        assert found[name].parameter == parameter
        assert torch.equal(found[name].rows, rows), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_is_not_published(tied: bool, tiny_llama: ModelFactory, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    assert tied_names(model) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    names = {piece.name for piece in pieces_of(model)}
    assert ("lm_head.weight" in names) is not tied
    assert names == set(written(model, tmp_path))


# --- The skeleton ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_skeleton_has_names_and_shapes_and_no_weights(name: str) -> None:
    model = known(name)[0]
    bones = skeleton(type(model), model.config)
    assert type(bones) is type(model)
    assert not bones.training
    assert all(parameter.is_meta for parameter in bones.parameters())
    assert {n: t.shape for n, t in bones.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert tied_names(bones) == tied_names(model)
    # What is computed from the configuration is there.
    ours, theirs = dict(bones.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys()
    stored = set(model.state_dict())
    for buffer in ours.keys() - stored:
        torch.testing.assert_close(ours[buffer], theirs[buffer], rtol=0, atol=0)


# --- What is unknown ------------------------------------------------------------------------------


def test_a_tensor_of_two_parameters_is_refused(
    tiny_llama: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merging(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(state)
        parts = [state.pop(f"model.layers.0.self_attn.{n}_proj.weight") for n in "kv"]
        return state | {"kv.weight": torch.cat(parts)}

    monkeypatch.setattr(published, "revert_weight_conversion", merging)
    with pytest.raises(ValueError, match=r"`kv\.weight` .* made of several parameters"):
        pieces_of(tiny_llama())


def test_a_skeleton_asks_for_no_memory_that_large_experts_would_take() -> None:
    """One layer of these experts is 8 TB: no machine would even promise it."""
    config = MixtralConfig(
        hidden_size=2**15,
        intermediate_size=2**19,
        num_local_experts=64,
        num_hidden_layers=1,
        num_attention_heads=2**8,
        num_key_value_heads=8,
        vocab_size=32,
    )
    model = skeleton(MixtralForCausalLM, config)
    assert model.model.layers[0].mlp.experts.down_proj.is_meta
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("shape", [(2**26,), (2**13, 2**13)])
def test_only_what_is_large_is_made_on_meta(shape: tuple[int, ...]) -> None:
    smaller = (2, 3, *shape[1:])
    with _LargeOnMeta():
        assert torch.empty(*shape).is_meta
        assert torch.empty(shape).is_meta
        assert torch.empty(size=shape, dtype=torch.int8).is_meta
        for made in (torch.empty(*smaller), torch.empty(smaller), torch.empty(size=smaller)):
            assert made.device.type == "cpu"
            assert made.shape == smaller

"""The budget: what a model takes without experts, and that the smallest one that will do, does."""

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq import ExpertOffloader, OffloadConfig
from haq.nn import Int8Linear
from haq.offload.budget import Budget, dense_bytes, format_bytes, parse_memory, working_bytes
from haq.offload.collect import experts_modules
from haq.offload.placement import POLICIES
from haq.offload.rehearsal import rehearse
from haq.offload.weights import expert_weights
from tests.architectures import EXPERTS, HIDDEN, INNER, MIXTURES, SLOTS, VOCABULARY, token_ids
from tests.offload.offloading import (
    KINDS,
    MIXED,
    assert_close,
    build,
    bytes_of_an_expert,
    experts_of,
    generated,
    logits_of,
    offloader,
    plain_logits,
    plain_tokens,
    shared_model,
)

MIB = 2**20


def with_memory(model: PreTrainedModel, memory: Any, **options: Any) -> ExpertOffloader:
    config = OffloadConfig(**{"max_length": 64} | options)
    return ExpertOffloader(model, device="cpu", gpu_memory=memory, costs=MIXED, config=config)


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("16 GiB", 16 * 2**30),
        ("16GB", 16 * 10**9),
        ("500MB", 500 * 10**6),
        ("512MiB", 512 * 2**20),
        ("0.5GiB", 2**29),
        ("2KB", 2000),
        (123456789, 123456789),
        (" 4096 ", 4096),
        (1, 1),
    ],
)
def test_sizes(memory: str | int, size: int) -> None:
    assert parse_memory(memory) == size


@pytest.mark.parametrize(
    "memory",
    [
        "16 elephants",
        "",
        "GiB",
        "sixteen GB",
        "nanGB",
        "infGB",
        "1e400GB",
        "-1GB",
        "-16",
        "1.5",
        0,
        -1,
    ],
)
def test_sizes_that_make_no_sense(memory: str | int) -> None:
    model = shared_model("mixtral")
    with pytest.raises(ValueError, match="`gpu_memory`") as caught:
        with_memory(model, memory)
    assert repr(memory) in str(caught.value)
    assert '"16GiB"' in str(caught.value)


@pytest.mark.parametrize("memory", [True, False, 1.5, b"16GiB", [16]])
def test_sizes_of_another_type(memory: Any) -> None:
    with pytest.raises(TypeError, match="`gpu_memory`") as caught:
        with_memory(shared_model("mixtral"), memory)
    assert repr(memory) in str(caught.value)


def test_nothing_may_be_pinned_but_it_must_be_a_size() -> None:
    assert parse_memory(0, "pinned_memory", least=0) == 0
    with pytest.raises(ValueError, match=r"`pinned_memory`.*at least 0.*-1"):
        parse_memory(-1, "pinned_memory", least=0)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (2**30 - 1, "1024.0 MiB"),
        (5 * 2**29, "2.50 GiB"),
        (-(2**21), "-2.0 MiB"),
    ],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


# --- Everything but the experts -------------------------------------------------------------------


def dense_tensors(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """What is saved of a model but for experts, and the buffers that are not saved."""
    inside = tuple(f"{name}." for name in experts_modules(model))
    tensors = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
    once = {id(t): n for n, t in reversed(tensors.items()) if not n.startswith(inside)}
    return {name: tensors[name] for name in once.values()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXTURES)
def test_dense_bytes(name: str, kind: str) -> None:
    model = shared_model(name, kind)
    tensors = dense_tensors(model, kind)
    assert any(t.dtype == torch.int8 for t in tensors.values()) == (kind == "int8")
    expected = sum(t.nbytes for t in tensors.values())
    # What a zero point needs is derived, and in no state.
    inside = tuple(f"{name}." for name in experts_modules(model))
    expected += sum(
        4 * module.out_features
        for n, module in model.named_modules()
        if isinstance(module, Int8Linear) and module.asymmetric and not n.startswith(inside)
    )
    assert dense_bytes(model, experts_modules(model).values()) == expected
    assert with_memory(model, None).budget.dense == expected


def test_tied_weights_count_once() -> None:
    model = build("mixtral")
    before = dense_bytes(model, experts_modules(model).values())
    model.lm_head.weight = model.get_input_embeddings().weight
    after = dense_bytes(model, experts_modules(model).values())
    assert before - after == 4 * VOCABULARY * HIDDEN


def test_dense_bytes_follow_the_dtype() -> None:
    model = build("mixtral")
    buffers = sum(b.nbytes for b in model.buffers())
    before = dense_bytes(model, experts_modules(model).values()) - buffers
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    buffers = sum(b.nbytes for b in model.buffers())
    assert dense_bytes(model, experts_modules(model).values()) - buffers == before // 2


# --- The cache ------------------------------------------------------------------------------------


def cache_bytes(model: PreTrainedModel, batch: int, length: int) -> int:
    """Of a cache that a real run has left behind."""
    with torch.no_grad():
        outputs = model(token_ids(batch, length), use_cache=True)
    found = []
    for layer in outputs.past_key_values.layers:
        for name in ("keys", "values"):
            found.append(getattr(layer, name, None))
        for name in ("conv_states", "recurrent_states"):
            found += list(getattr(layer, name, {}).values())
        window = getattr(layer, "_sliding_window_tensor", None)
        found.append(window)
    # A window's keys are a view of all that came with the prompt.
    storages = [t.untyped_storage() for t in found if isinstance(t, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 40)])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_cache_of_a_rehearsal_is_that_of_a_run(name: str, batch: int, length: int) -> None:
    model = shared_model(name)
    rehearsal = rehearse(model, batch, length, experts_modules(model))
    assert rehearsal.cache_bytes == cache_bytes(model, batch, length) > 0
    assert rehearsal.experts_per_token == SLOTS
    assert with_memory(model, None, batch_size=batch, max_length=length).budget.cache == (
        rehearsal.cache_bytes
    )


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "jamba"])
def test_a_rehearsal_in_bfloat16(name: str) -> None:
    model = build(name).to(torch.bfloat16)  # type: ignore[arg-type]
    got = rehearse(model, 2, 20, experts_modules(model)).cache_bytes
    assert got == cache_bytes(model, 2, 20) < cache_bytes(shared_model(name), 2, 20)


def test_a_rehearsal_of_an_int8_model() -> None:
    model = shared_model("mixtral", "int8")
    got = rehearse(model, 2, 20, experts_modules(model))
    assert (
        got.cache_bytes == cache_bytes(model, 2, 20) == cache_bytes(shared_model("mixtral"), 2, 20)
    )


def test_a_rehearsal_leaves_the_model_alone() -> None:
    model = build("gpt-oss")
    config, state = copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    rehearse(model, 2, 50, experts_modules(model))
    assert model.config.to_dict() == config.to_dict()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_rehearsal_that_fails_says_what_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")

    def fails(*_: Any, **__: Any) -> None:
        raise IndexError("no such position")

    monkeypatch.setattr(type(model.model), "forward", fails)
    with pytest.raises(RuntimeError, match=r"1 x 64 tokens.*no such position.*max_length"):
        with_memory(model, None)


# --- What is alive on the way ---------------------------------------------------------------------


def test_working_bytes_by_hand() -> None:
    weights = [expert_weights(m) for m in experts_modules(shared_model("mixtral")).values()]
    tokens, batch = 100, 4
    block = 12 * 4 * tokens * HIDDEN
    outputs = 2 * 4 * tokens * SLOTS * HIDDEN
    inner = 4 * tokens * SLOTS * (2 * INNER + INNER)
    logits = 2 * 4 * batch * VOCABULARY
    got = working_bytes(weights, tokens, batch, SLOTS, VOCABULARY)
    assert got == block + outputs + inner + logits + 128 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_longer_prompts_and_larger_batches_need_more(kind: str) -> None:
    model = shared_model("mixtral", kind)
    budgets = [
        with_memory(model, None, batch_size=batch, max_length=length).budget
        for batch, length in ((1, 64), (1, 128), (2, 128))
    ]
    for smaller, larger in itertools.pairwise(budgets):
        assert smaller.dense == larger.dense
        assert smaller.spare == larger.spare
        assert larger.cache == 2 * smaller.cache
        assert larger.working > smaller.working
    assert budgets[0].total is None
    assert budgets[0].experts is None


def test_the_sum() -> None:
    budget = Budget(total=1000, dense=100, cache=20, working=3, spare=500)
    assert budget.needed == 623
    assert budget.experts == 377
    assert str(budget) == "dense 100 B, cache 20 B, working 3 B, spare 500 B, experts 377 B"
    assert str(Budget(None, 1, 2, 3, 4)) == "dense 1 B, cache 2 B, working 3 B, spare 4 B"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spare", [1, 2, 5])
def test_spare_slots_are_paid_for(kind: str, spare: int) -> None:
    model = shared_model("mixtral", kind)
    given = with_memory(model, None, spare_slots=spare)
    assert given.budget.spare == spare * given._weights[0].expert_bytes
    assert given.budget.room_for_experts(given._weights) == 8 * given._weights[0].expert_bytes


# --- Residents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3"])
def test_never_over_budget(name: str, kind: str, placement: str) -> None:
    model = shared_model(name, kind)
    everything = offloader(model)
    layers, experts = experts_of(model)
    size, needed = bytes_of_an_expert(everything), everything.budget.needed
    before = -1
    for extra in (0, 1, size - 1, size, 3 * size + size // 2, 5 * size, 100 * size):
        given = with_memory(model, needed + extra, placement=placement)
        resident = given.placement.num_resident
        assert given.budget.needed == needed
        assert given.budget.needed + resident * size <= needed + extra == given.budget.total
        # Nor is room left for one more.
        assert resident == min(extra // size, layers * experts) >= before
        before = resident
    assert everything.placement.num_resident == layers * experts


def test_a_budget_as_a_string() -> None:
    given = with_memory(shared_model("mixtral"), "1GiB")
    assert given.budget.total == 2**30
    assert given.placement.num_resident == 2 * EXPERTS


# --- The smallest budget --------------------------------------------------------------------------


def minimum(model: PreTrainedModel, **options: Any) -> int:
    with pytest.raises(ValueError, match="`gpu_memory` must be at least") as caught:
        with_memory(model, 1, **options)
    message = str(caught.value)
    assert "got 1 B" in message
    assert "`max_length` or `batch_size`" in message
    found = re.search(r"at least (.*?) \((\d+) bytes\)", message)
    assert found is not None
    assert found[1] == format_bytes(int(found[2]))
    return int(found[2])


@pytest.mark.parametrize("cold", ["auto", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_the_minimum_in_the_message_is_one(name: str, kind: str, cold: str) -> None:
    model = shared_model(name, kind)
    options: dict[str, Any] = {"cold": cold, "spare_slots": 0 if cold == "cpu" else 2}
    least = minimum(model, **options)
    with pytest.raises(ValueError, match=str(least)):
        with_memory(model, least - 1, **options)
    given = with_memory(model, least, **options)
    assert given.placement.num_resident == 0
    assert given.budget.experts == 0
    with given:
        assert_close(logits_of(model), plain_logits(name, kind), kind)
        assert torch.equal(generated(model), plain_tokens(name, kind))


# --- Decoder blocks that do not fit ---------------------------------------------------------------


def hooks_in(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if hasattr(m, "_hf_hook")]


def largest_layer(model: PreTrainedModel) -> int:
    """Bytes of the largest module's own tensors in the decoder blocks, experts left out."""
    sizes: dict[str, int] = {}
    for name, tensor in dense_tensors(model, "float").items():
        if ".layers." in name:
            owner = name.rpartition(".")[0]
            sizes[owner] = sizes.get(owner, 0) + tensor.nbytes
    return max(sizes.values())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_blocks_that_do_not_fit_are_streamed(name: str) -> None:
    model = build(name)
    whole = offloader(model).budget
    blocks = sum(t.nbytes for n, t in dense_tensors(model, "float").items() if ".layers." in n)
    least = minimum(model)
    # Embeddings, the last norm and the head stay; of the blocks there is one layer, twice.
    assert whole.needed - least == blocks - 2 * largest_layer(model) > 0
    modules, parameters = list(model.modules()), list(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    for memory in (least, whole.needed - 1):
        with with_memory(model, memory) as given:
            assert given.budget.streamed
            assert hooks_in(model) != []
            assert_close(logits_of(model), plain_logits(name), "float")
            assert torch.equal(generated(model), plain_tokens(name))
            assert any("decoder blocks do not fit" in note for note in given.report().notes)
        assert hooks_in(model) == []
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        for (one, a), (other, b) in zip(model.named_parameters(), parameters, strict=True):
            assert one == other
            assert a is b
        assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
        assert_close(logits_of(model), plain_logits(name), "float")
    with with_memory(model, whole.needed) as given:
        assert not given.budget.streamed
        assert hooks_in(model) == []
        assert given.report().notes == ()


def test_int8_layers_are_not_streamed() -> None:
    model = shared_model("mixtral", "int8")
    assert minimum(model) == offloader(model).budget.needed

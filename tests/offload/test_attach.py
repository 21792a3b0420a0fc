"""Attached, a model refuses what would tear it apart; detached, it is exactly what it was."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import haq
from haq import ExpertOffloader, RoutingStatistics, find_offloader
from haq.offload import build as build_module
from haq.offload import offloader as offloader_module
from haq.offload.module import OffloadedExperts
from haq.offload.weights import FloatWeights, Int8Weights
from tests.architectures import token_ids
from tests.offload.offloading import (
    COPIES,
    IDS,
    KINDS,
    UNSEEN,
    assert_close,
    build,
    generated,
    logits_of,
    offloader,
    plain_logits,
    plain_tokens,
    shared_model,
    total,
)


class Snapshot:
    """Everything by which a model could be told from what it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.attributes = set(vars(model))
        self.modules = list(model.named_modules())
        self.vars = {name: set(vars(module)) for name, module in self.modules}
        self.hooks = {name: self._hooks(module) for name, module in self.modules}
        self.parameters = list(model.named_parameters(remove_duplicate=False))
        self.buffers = list(model.named_buffers(remove_duplicate=False))
        self.pointers = [tensor.data_ptr() for _, tensor in self.parameters + self.buffers]
        self.state = copy.deepcopy(model.state_dict())

    @staticmethod
    def _hooks(module: nn.Module) -> list[int]:
        return [len(value) for name, value in sorted(vars(module).items()) if "_hooks" in name]

    def check(self) -> None:
        model = self.model
        assert set(vars(model)) == self.attributes
        assert find_offloader(model) is None
        modules = list(model.named_modules())
        assert [name for name, _ in modules] == [name for name, _ in self.modules]
        for (name, module), (_, before) in zip(modules, self.modules, strict=True):
            assert module is before
            assert set(vars(module)) == self.vars[name]
            assert self._hooks(module) == self.hooks[name]
        parameters = list(model.named_parameters(remove_duplicate=False))
        buffers = list(model.named_buffers(remove_duplicate=False))
        for now, then in ((parameters, self.parameters), (buffers, self.buffers)):
            assert [name for name, _ in now] == [name for name, _ in then]
            assert all(a is b for (_, a), (_, b) in zip(now, then, strict=True))
        assert [tensor.data_ptr() for _, tensor in parameters + buffers] == self.pointers
        state = model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(state[name], self.state[name]) for name in state)


def stands_in(model: PreTrainedModel) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, OffloadedExperts)]


# --- Detached -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_a_detached_model_is_what_it_was(name: str, kind: str) -> None:
    model = build(name, kind)
    expected, before = logits_of(model), Snapshot(model)
    given = offloader(model, 3)
    before.check()  # Deciding moves nothing.
    for _ in range(2):
        assert given.attach() is given
        assert stands_in(model) == list(given.placement.layers)
        generated(model)
        given.detach()
        before.check()
    assert torch.equal(logits_of(model), expected)
    given.detach()  # Once more does nothing.
    before.check()


def test_a_detached_model_moves_saves_and_copies(tmp_path: Path) -> None:
    model = build("mixtral")
    with offloader(model, 3):
        generated(model)
    expected = logits_of(model)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), expected)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits_of(model).dtype == torch.bfloat16


def test_a_detached_int8_model_saves(tmp_path: Path) -> None:
    model = build("mixtral", "int8")
    with offloader(model, 3):
        expected = generated(model)
    haq.save_pretrained(model, tmp_path)
    assert torch.equal(generated(haq.from_pretrained(tmp_path)), expected)


def test_a_detached_model_trains() -> None:
    model = build("mixtral")
    with offloader(model, 3), torch.inference_mode():
        generated(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


class OfTheUser(Exception):
    """Nothing that anything here would catch."""


def test_an_exception_inside_detaches() -> None:
    model = build("mixtral")
    before = Snapshot(model)

    def run() -> None:
        with offloader(model, 3):
            generated(model)
            raise OfTheUser

    with pytest.raises(OfTheUser):
        run()
    before.check()


def test_an_exception_in_the_middle_of_the_model_detaches() -> None:
    model = build("mixtral")
    before = Snapshot(model)

    def fails(*_: Any) -> None:
        raise OfTheUser

    given = offloader(model, 3)
    handle = model.lm_head.register_forward_hook(fails)
    with pytest.raises(OfTheUser), given:
        generated(model)
    handle.remove()
    before.check()
    assert given.report().counts[0].calls == 1
    assert_close(logits_of(model), plain_logits("mixtral"), "float")


@pytest.mark.parametrize("kind", KINDS)
def test_threads_end_with_the_offloader(kind: str) -> None:
    with offloader(shared_model("mixtral", kind), 0) as given:
        machine = given._machine
        assert machine is not None
        assert machine.spare is not None
        generated(given.model)
    for pool in (machine.pool, machine.spare._copier):
        assert not any(thread.is_alive() for thread in pool._threads)


# --- While attached -------------------------------------------------------------------------------


def shared(tensor: Tensor) -> bool:
    return bool(tensor.is_shared())


REFUSED: dict[str, Callable[[Any], object]] = {
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "to a device": lambda m: m.to("cpu"),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "cpu": lambda m: m.cpu(),
    "share_memory": lambda m: m.share_memory(),
    "state_dict": lambda m: m.state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
    "haq.save_pretrained": lambda m: haq.save_pretrained(m, "nowhere"),
    "haq.quantize_model": lambda m: haq.quantize_model(m, [IDS], progress=False),
    "another offloader": lambda m: ExpertOffloader(m, device="cpu", costs=COPIES),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_an_attached_model_refuses(
    what: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = build("mixtral", kind)
    before = Snapshot(model)
    with offloader(model, 3):
        tensors = list(model.parameters()) + list(model.buffers())
        known = [(t, t.dtype, t.device, t.data_ptr(), shared(t)) for t in tensors]
        with pytest.raises(RuntimeError, match=r"detach\(\)"):
            REFUSED[what](model)
        # Nothing has moved, and nothing was written.
        for tensor, *rest in known:
            assert [tensor.dtype, tensor.device, tensor.data_ptr(), shared(tensor)] == rest
        now = list(model.parameters()) + list(model.buffers())
        assert all(a is b for a, b in zip(now, tensors, strict=True))
        assert_close(logits_of(model), plain_logits("mixtral", kind), kind)
    assert list(tmp_path.iterdir()) == []
    before.check()


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (lambda m: m.half(), "moved or cast"),
        (lambda m: m.to("cpu"), "moved or cast"),
        (lambda m: m.state_dict(), "saved"),
        (copy.deepcopy, "copied"),
        (pickle.dumps, "pickled"),
    ],
)
@pytest.mark.parametrize("part", ["", ".mlp.experts"])
def test_parts_of_an_attached_model_refuse_too(
    part: str, what: Callable[[Any], object], word: str
) -> None:
    model = build("mixtral")
    with offloader(model, 3):
        module = model.get_submodule(f"model.layers.1{part}") if part else model
        with pytest.raises(RuntimeError, match=rf"cannot be {word} .*detach\(\)"):
            what(module)


def test_the_model_of_transformers_is_not_saved_by_half(tmp_path: Path) -> None:
    model = build("mixtral")
    with offloader(model, 3), pytest.raises(RuntimeError, match=r"saved.*detach\(\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_can_be_loaded_into_an_attached_model() -> None:
    model = build("mixtral")
    state = copy.deepcopy(model.state_dict())
    with offloader(model, 3), pytest.raises(RuntimeError, match=r"loaded into.*detach\(\)"):
        model.load_state_dict(state)


def test_attaching_twice() -> None:
    model = build("mixtral")
    before = Snapshot(model)
    given, other = offloader(model, 3), offloader(model, 0)
    with given:
        with pytest.raises(RuntimeError, match=r"attached already.*detach\(\)"):
            given.attach()
        with pytest.raises(RuntimeError, match=r"`ExpertOffloader` is attached.*detach\(\)"):
            other.attach()
        other.detach()  # It has nothing to give back.
        assert not other.attached
        assert given.attached
        assert find_offloader(model) is given
        assert_close(logits_of(model), plain_logits("mixtral"), "float")
    before.check()
    with other:
        assert find_offloader(model) is other
        assert_close(logits_of(model), plain_logits("mixtral"), "float")
    before.check()


def test_a_model_looks_like_one_with_experts() -> None:
    model = shared_model("mixtral")
    with offloader(model, 3) as given:
        stand = model.get_submodule(given.placement.layers[0])
        assert "num_experts=4" in repr(stand)
        assert f"resident={list(given.placement.resident[0])}" in repr(stand)
        assert list(stand.parameters()) == []
        assert not model.training
        assert model.eval() is model


# --- Attaching that fails -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError("full"), torch.OutOfMemoryError("full"), OfTheUser()]
)
@pytest.mark.parametrize("where", ["spare slots", "first residents", "second residents", "moving"])
def test_attaching_that_fails(
    where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mixtral")
    before = Snapshot(model)
    given = offloader(model, 3)

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        if where == "spare slots":
            patched.setattr(build_module, "make_slots", fails)
        elif where == "moving":
            patched.setattr(given._dense, "to_gpu", fails)
        else:
            residents_of, times = build_module.residents_of, [0]

            def later(*arguments: Any) -> Any:
                times[0] += 1
                if times[0] == (1 if where == "first residents" else 2):
                    raise error
                return residents_of(*arguments)

            patched.setattr(offloader_module, "residents_of", later)
        with pytest.raises((type(error), RuntimeError)) as caught:
            given.attach()
    if isinstance(error, torch.OutOfMemoryError):
        assert type(caught.value) is RuntimeError
        assert "less memory free than `gpu_memory` says" in str(caught.value)
        assert caught.value.__cause__ is error
    else:
        assert caught.value is error
    assert not given.attached
    before.check()
    with given:  # Once there is room.
        assert_close(logits_of(model), plain_logits("mixtral"), "float")
    before.check()


# --- What it tells --------------------------------------------------------------------------------


def test_the_report_stays_after_detaching() -> None:
    model = shared_model("mixtral")
    given = offloader(model, 3)
    with pytest.raises(RuntimeError, match=r"attach\(\)"):
        given.report()
    with given:
        generated(model)
        attached = given.report()
    detached = given.report()
    assert detached.counts == attached.counts
    assert detached == given.report()
    generated(model)  # That of nobody's business.
    assert given.report() == detached
    with given:
        assert total(given.report(), "hits", "copied", "misses") == 0
        assert given.report().copied_bytes == 0


def test_reset_counts_anew_and_keeps_what_was_learned() -> None:
    model = shared_model("mixtral")
    with offloader(model, 0, costs=COPIES) as given:
        generated(model)
        seen = int(given.statistics.counts.sum())
        before = given.report()
        assert before.copied_bytes > 0
        assert before.spans
        given.reset()
        report = given.report()
        assert total(report, "calls", "tokens", "hits", "copied", "misses", "round_trips") == 0
        assert report.copied_bytes == report.prefetches_used == report.prefetches_wasted == 0
        assert report.spans == ()
        assert given.statistics.counts.sum() == seen > 0
        assert total(before, "copied") > 0  # What was told does not change any more.
        logits_of(model)
        assert given.report().counts[0].tokens == UNSEEN.numel()
    given.reset()
    assert given.report().counts[0].tokens == UNSEEN.numel()


def test_the_placement_is_known_before_anything_moves() -> None:
    model = build("mixtral")
    before = Snapshot(model)
    given = offloader(model, 3)
    assert not given.attached
    table = str(given.placement)
    assert all(name in table for name in given.placement.layers)
    assert given.placement.num_resident == 3
    assert "3 of 8 experts resident" in table
    before.check()
    with given:
        assert given.report().resident == tuple(map(len, given.placement.resident))


# --- Statistics -----------------------------------------------------------------------------------


def statistics_equal(one: RoutingStatistics, other: RoutingStatistics) -> None:
    assert one.layers == other.layers
    assert one.tokens == other.tokens
    assert np.array_equal(one.counts, other.counts)
    assert np.array_equal(one.transitions, other.transitions)
    np.testing.assert_allclose(one.gate_mass, other.gate_mass, rtol=1e-4)


@pytest.mark.parametrize("resident", [0, 3, 8])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_statistics_while_running_are_those_collected(name: str, resident: int) -> None:
    model = shared_model(name)
    expected = RoutingStatistics.collect(model, [UNSEEN])
    with offloader(model, resident) as given:
        assert given.statistics.counts.sum() == 0
        logits_of(model)
    statistics_equal(given.statistics, expected)


def test_statistics_token_by_token() -> None:
    model = shared_model("mixtral")
    with offloader(model, 3) as given:
        tokens = generated(model, max_new_tokens=10)
    statistics_equal(given.statistics, RoutingStatistics.collect(model, [tokens[:, :-1]]))


@pytest.mark.parametrize("kind", KINDS)
def test_collecting_from_an_attached_model(kind: str) -> None:
    model, batches = shared_model("mixtral", kind), [UNSEEN, token_ids(1, 5, seed=8)]
    expected = RoutingStatistics.collect(model, batches)
    with offloader(model, 3):
        statistics_equal(RoutingStatistics.collect(model, batches), expected)
        trace = haq.routing_trace(model, batches)
        assert_close(logits_of(model), plain_logits("mixtral", kind), kind)
    assert np.array_equal(trace, haq.routing_trace(model, batches))


def test_given_statistics_are_not_written_to() -> None:
    model = shared_model("mixtral")
    given = RoutingStatistics.collect(model, [UNSEEN])
    before = copy.deepcopy(given)
    with offloader(model, 3, statistics=given) as attached:
        logits_of(model)
    statistics_equal(given, before)
    statistics_equal(attached.statistics, before.merge(before))


@pytest.mark.parametrize("placement", ["popularity", "latency"])
def test_given_statistics_decide(placement: str) -> None:
    counts = [[1, 50, 2, 60], [70, 1, 1, 2]]
    given = RoutingStatistics.from_counts(counts, experts_per_token=2)
    attached = offloader(shared_model("mixtral"), 3, statistics=given, placement=placement)
    assert attached.placement.resident == ((1, 3), (0,))


def test_what_quantizing_counted_decides() -> None:
    model = shared_model("mixtral", "int8")
    counts = np.array([r.tokens for r in haq.quantization_report(model).routing])
    given = offloader(model, 3, placement="popularity")
    assert np.array_equal(given.statistics.counts, counts)
    shares = counts / counts.sum(1, keepdims=True)
    best = np.argsort(-shares.reshape(-1), kind="stable")[:3]
    expected = tuple(tuple(sorted(int(i) % 4 for i in best if i // 4 == layer)) for layer in (0, 1))
    assert given.placement.resident == expected
    # The report itself is left alone.
    with given:
        generated(model)
    assert np.array_equal([r.tokens for r in haq.quantization_report(model).routing], counts)


# --- Weights are the model's own ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_second_copy_on_the_cpu(kind: str) -> None:
    model = shared_model("mixtral", kind)
    given = offloader(model, 3)
    for weights, module in zip(given._weights, given._modules.values(), strict=True):
        if isinstance(weights, FloatWeights):
            own: Tensor = module.get_parameter("gate_up_proj")
            assert weights.on_cpu(1).up.data_ptr() == own[1].data_ptr()
        else:
            assert isinstance(weights, Int8Weights)
            assert weights.on_cpu(1)[0] is module.up[1]  # type: ignore[index]


def test_tokens_are_those_of_the_model_again() -> None:
    for kind in KINDS:
        assert torch.equal(generated(shared_model("mixtral", kind)), plain_tokens("mixtral", kind))

"""`ExpertOffloader` gives the answers of the model that was never offloaded."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from haq import RoutingStatistics
from haq.offload.placement import POLICIES
from tests.architectures import EXPERTS, MIXTURES, SLOTS, token_ids
from tests.offload.offloading import (
    COPIES,
    IDS,
    KINDS,
    MIXED,
    NO_COPIES,
    UNSEEN,
    assert_close,
    build,
    experts_of,
    generated,
    logits_of,
    offloader,
    plain_logits,
    plain_tokens,
    shared_model,
    total,
)

FAMILIES = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss")

# Of those, the ones with more than one layer of experts: what can be prefetched.
SEVERAL_LAYERS = ("mixtral", "qwen3-moe", "olmoe", "gpt-oss")


# --- Every placement, budget and family -----------------------------------------------------------


@pytest.mark.parametrize("prefetch", [True, False], ids=["prefetch", "no prefetch"])
@pytest.mark.parametrize("share", [0, 0.5, 1], ids=["none", "half", "all"])
@pytest.mark.parametrize("placement", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_same_answers(name: str, kind: str, placement: str, share: float, prefetch: bool) -> None:
    model = shared_model(name, kind)
    layers, experts = experts_of(model)
    resident = int(share * layers * experts)
    given = offloader(model, resident, placement=placement, prefetch=prefetch)
    assert given.placement.num_resident == resident
    with given:
        assert_close(logits_of(model), plain_logits(name, kind), kind)
        assert torch.equal(generated(model), plain_tokens(name, kind))
        report = given.report()

    # Each of the lanes was tested: nothing was where it was not to be.
    fed = IDS.numel() + UNSEEN.numel() + (plain_tokens(name, kind).numel() - IDS.numel()) - len(IDS)
    assert [counts.tokens for counts in report.counts] == [fed] * layers
    assert total(report, "hits", "copied", "misses") == fed * layers * SLOTS
    if share == 1:
        assert report.hit_rate == 1
        assert report.copied_bytes == 0
    else:
        assert total(report, "copied") > 0
        assert total(report, "misses") > 0
        assert report.copied_bytes > 0
        assert (total(report, "hits") > 0) or share == 0
    if not prefetch or share == 1:
        assert report.prefetches_used == report.prefetches_wasted == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEVERAL_LAYERS)
def test_experts_are_prefetched(name: str, kind: str) -> None:
    model = shared_model(name, kind)
    with offloader(model, 0, costs=COPIES) as given:
        assert torch.equal(
            generated(model, max_new_tokens=12)[:, : IDS.shape[1] + 6], plain_tokens(name, kind)
        )
        report = given.report()
    assert report.prefetches_used > 0
    assert report.counts[0].hits == 0  # Nothing looks ahead to the first layer.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MIXTURES)
def test_every_family(name: str, kind: str) -> None:
    model = shared_model(name, kind)
    layers, experts = experts_of(model)
    with offloader(model, layers * experts // 2) as given:
        assert_close(logits_of(model), plain_logits(name, kind), kind)
        assert torch.equal(generated(model), plain_tokens(name, kind))
        report = given.report()
    for lane in ("hits", "copied", "misses"):
        assert total(report, lane) > 0


@pytest.mark.parametrize("cold", ["auto", "cpu", "gpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_wherever_cold_experts_run(kind: str, cold: str) -> None:
    model = shared_model("mixtral", kind)
    with offloader(model, 3, cold=cold, spare_slots=1) as given:
        assert_close(logits_of(model), plain_logits("mixtral", kind), kind)
        assert torch.equal(generated(model), plain_tokens("mixtral", kind))
        report = given.report()
    assert (total(report, "misses") == 0) == (cold == "gpu")
    # With "cpu" an expert still comes early where that pays.
    assert (total(report, "copied") == 0) == (cold == "cpu")


def test_without_a_spare_slot() -> None:
    model = shared_model("mixtral")
    with offloader(model, cold="cpu", spare_slots=0) as everything:
        assert everything.budget.spare == 0
    size = everything._weights[0].expert_bytes
    given = type(everything)(
        model,
        device="cpu",
        costs=COPIES,
        config=everything.config,
        gpu_memory=everything.budget.needed + 3 * size,
    )
    with given:
        assert_close(logits_of(model), plain_logits("mixtral"), "float")
        report = given.report()
    assert given.placement.num_resident == 3
    assert report.copied_bytes == total(report, "copied") == 0
    assert total(report, "misses") > 0


@pytest.mark.parametrize("kind", KINDS)
def test_where_an_expert_runs_does_not_change_a_bit(kind: str) -> None:
    model = shared_model("mixtral", kind)
    seen = []
    for resident, costs in ((0, NO_COPIES), (0, COPIES), (3, MIXED), (8, MIXED)):
        with offloader(model, resident, costs=costs):
            seen.append(logits_of(model))
    assert all(torch.equal(logits, seen[0]) for logits in seen)


def test_answers_do_not_depend_on_when_a_copy_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    # An expert that is not there when a layer looks, and is there when it looks again.
    model, ids = shared_model("mixtral"), IDS[:1, :1]
    expected = logits_of(model, ids)
    with offloader(model, 0, costs=COPIES) as given:
        assert given._machine is not None
        assert given._machine.spare is not None
        spare = given._machine.spare
        asked: list[tuple[int, int]] = []

        def ready(key: tuple[int, int]) -> bool:
            asked.append(key)
            if key in spare:
                return True
            spare.load_early(key)
            spare._held[key][1].result()
            return False

        monkeypatch.setattr(spare, "ready", ready)
        assert_close(logits_of(model, ids), expected, "float")
        assert len(set(asked)) == 4


# --- Every way to call a model --------------------------------------------------------------------


def padded() -> dict[str, Tensor]:
    """Three prompts of different lengths, with padding at the left."""
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :5] = mask[2, :2] = 0
    ids = token_ids(3, 9, seed=6)
    return {"input_ids": ids * mask, "attention_mask": mask}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several answers": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sampling, several answers": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "repetition penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "kind"), [("mixtral", "int8"), ("gpt-oss", "float")])
def test_ways_to_generate(name: str, kind: str, way: str) -> None:
    model = shared_model(name, kind)

    def run() -> Tensor:
        torch.manual_seed(5)
        options = padded() | {"max_new_tokens": 6, "do_sample": False} | WAYS[way]
        tokens = model.generate(**options)  # type: ignore[operator]
        assert isinstance(tokens, Tensor)
        return tokens

    expected = run()
    with offloader(model, 3) as given:
        got = run()
        report = given.report()
    assert torch.equal(got, expected)
    assert total(report, "misses") > 0
    assert total(report, "copied") > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_modes_of_autograd(kind: str, mode: str) -> None:
    model = shared_model("mixtral", kind)
    modes = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "plain": torch.enable_grad,
    }
    # One after the other, so that what one mode leaves in a slot or a cache meets the next one.
    with offloader(model, 3):
        for each in (mode, "inference", mode):
            with modes[each]():
                logits = model(input_ids=UNSEEN).logits
                assert_close(logits.detach(), plain_logits("mixtral", kind), kind)
                # Tensors of inference mode cannot be added to outside of it.
                assert logits.is_inference() == (each == "inference")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_router_logits(name: str) -> None:
    model = build(name)  # asked for such outputs, it keeps hooks that cannot be pickled
    with torch.no_grad():
        expected = model(input_ids=UNSEEN, output_router_logits=True)
        with offloader(model, 3):
            got = model(input_ids=UNSEEN, output_router_logits=True)
    assert len(got.router_logits) == len(expected.router_logits) == 2
    for one, other in zip(got.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.aux_loss, expected.aux_loss)


def test_hidden_states() -> None:
    model = build("mixtral")
    with torch.no_grad():
        expected = model(input_ids=UNSEEN, output_hidden_states=True).hidden_states
        with offloader(model, 3):
            got = model(input_ids=UNSEEN, output_hidden_states=True).hidden_states
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_bfloat16(name: str) -> None:
    exact = plain_logits(name)
    model = build(name).to(torch.bfloat16)  # type: ignore[arg-type]
    plain = logits_of(model)
    seen = []
    for resident, costs in ((0, NO_COPIES), (3, MIXED), (8, MIXED)):
        with offloader(model, resident, costs=costs):
            seen.append(logits_of(model))
    assert seen[0].dtype == torch.bfloat16
    assert all(torch.equal(logits, seen[0]) for logits in seen)
    # Sums of experts are float32 here, so the error of bfloat16 is that of the model or less.
    errors = [(logits.float() - exact).square().mean().sqrt() for logits in (seen[0], plain)]
    assert 0 < errors[0] <= 1.1 * errors[1] < 0.2 * exact.std()


def test_an_int8_model_in_bfloat16() -> None:
    model = build("mixtral", "int8").to(torch.bfloat16)  # type: ignore[arg-type]
    expected, tokens = logits_of(model), generated(model)
    with offloader(model, 3):
        assert torch.equal(logits_of(model), expected)
        assert torch.equal(generated(model), tokens)


def test_a_single_token_and_one_that_no_expert_takes() -> None:
    model, ids = shared_model("mixtral"), IDS[:1, :1]
    expected = logits_of(model, ids)
    with offloader(model, 3) as given:
        assert_close(logits_of(model, ids), expected, "float")
        stand = model.get_submodule(given.placement.layers[0])
        hidden, none = torch.randn(2, 32), torch.full((2, 2), 4)
        assert torch.equal(stand(hidden, none, torch.ones(2, 2)), torch.zeros(2, 32))
        # One choice of two is none: the other one counts alone.
        some = torch.tensor([[4, 1], [2, 4]])
        expected = given._modules[given.placement.layers[0]](
            hidden, some.clamp(max=3), torch.tensor([[0.0, 0.7], [0.4, 0.0]])
        )
        got = stand(hidden, some, torch.tensor([[0.5, 0.7], [0.4, 0.9]]))
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


# --- Threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("costs", [MIXED, COPIES], ids=["mixed", "copies"])
def test_threads_that_generate_at_the_same_time(kind: str, costs: Any) -> None:
    model = shared_model("mixtral", kind)
    prompts = [token_ids(1 + i % 2, 5 + i, seed=20 + i) for i in range(4)]
    expected = [generated(model, ids, max_new_tokens=8) for ids in prompts]
    start = threading.Barrier(len(prompts))

    def run(ids: Tensor) -> Tensor:
        start.wait(10)
        return generated(model, ids, max_new_tokens=8)

    blank = RoutingStatistics(2, EXPERTS, SLOTS)
    given = offloader(model, 3, costs=costs, statistics=blank)
    with given, ThreadPoolExecutor(len(prompts)) as pool:
        got = list(pool.map(run, prompts))
        report = given.report()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    fed = sum(ids.numel() + 7 * len(ids) for ids in prompts)
    assert [counts.tokens for counts in report.counts] == [fed, fed]
    # Each thread's layers follow each other, whatever ran between them.
    plain = RoutingStatistics.collect(model, [tokens[:, :-1] for tokens in expected])
    assert np.array_equal(given.statistics.counts, plain.counts)
    assert np.array_equal(given.statistics.transitions, plain.transitions)

"""`haq.from_pretrained(directory, gpu_memory=...)`: from disk into two tiers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import haq
from haq import find_offloader
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids
from tests.offload.offloading import bytes_of_an_expert, generated, logits_of, shared_model, total

FAMILIES = ("mixtral", "deepseek-v3", "gpt-oss")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    for name in FAMILIES:
        haq.save_pretrained(shared_model(name, "int8"), folder / name)
    dense = haq.quantize_model(ARCHITECTURES["llama"](), [token_ids(2, 32)], progress=False)
    haq.save_pretrained(dense, folder / "llama")
    return {name: folder / name for name in (*FAMILIES, "llama")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_two_tiers(saved: dict[str, Path], name: str) -> None:
    tokens, logits = generated(shared_model(name, "int8")), logits_of(shared_model(name, "int8"))
    model = haq.from_pretrained(saved[name], device="cpu", gpu_memory="1GiB")
    given = find_offloader(model)
    assert given is not None
    assert given.attached
    assert given.budget.total == 2**30
    least, size = given.budget.needed, bytes_of_an_expert(given)
    assert torch.equal(generated(model), tokens)
    assert given.report().hit_rate == 1
    for resident in (0, 3):
        model = haq.from_pretrained(saved[name], device="cpu", gpu_memory=least + resident * size)
        given = find_offloader(model)
        assert given is not None
        assert given.placement.num_resident == resident
        assert torch.equal(generated(model), tokens)
        assert torch.equal(logits_of(model), logits)
        report = given.report()
        assert total(report, "misses", "copied") > 0
        assert report.promised_bytes == least + resident * size
        given.detach()
        assert find_offloader(model) is None
        assert torch.equal(generated(model), tokens)


def test_what_quantizing_counted_comes_with_it(saved: dict[str, Path]) -> None:
    model = haq.from_pretrained(saved["mixtral"], device="cpu", gpu_memory="1GiB")
    given = find_offloader(model)
    assert given is not None
    report = haq.quantization_report(shared_model("mixtral", "int8"))
    assert given.statistics.counts.tolist() == [list(r.tokens) for r in report.routing]


def test_without_a_budget_there_is_no_offloader(saved: dict[str, Path]) -> None:
    assert find_offloader(haq.from_pretrained(saved["mixtral"])) is None
    assert find_offloader(MIXTURES["mixtral"]()) is None


def test_a_dense_checkpoint(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"mixture of experts.*LlamaForCausalLM"):
        haq.from_pretrained(saved["llama"], device="cpu", gpu_memory="1GiB")


def test_a_budget_that_is_too_small(saved: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"`gpu_memory` must be at least .* bytes\), got 976.6 KiB"
    ):
        haq.from_pretrained(saved["mixtral"], device="cpu", gpu_memory="1MB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", [None, "cuda"])
def test_no_gpu(saved: dict[str, Path], device: Any) -> None:
    with pytest.raises(ValueError, match=r"`device`.*'cuda'"):
        haq.from_pretrained(saved["mixtral"], device=device, gpu_memory="1GiB")


def test_a_device_that_computes_nothing(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"`device`.*'meta'"):
        haq.from_pretrained(saved["mixtral"], device="meta", gpu_memory="1GiB")

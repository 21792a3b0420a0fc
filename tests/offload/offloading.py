"""What the tests of `ExpertOffloader` share: models, costs, and what models give by themselves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from haq import Costs, ExpertOffloader, OffloadConfig, QuantizationConfig, quantize_model
from haq.offload.collect import experts_modules
from haq.offload.report import OffloadReport
from tests.architectures import EXCLUDE, MIXTURES, token_ids

# A copy takes as long as an expert on the CPU: of two cold experts one is copied while the other is
# computed, and one alone is computed. Prefetching always pays.
MIXED = Costs(1e-6, 0.0, 2e-5, 0.0, 2e-5, 0.0)

# Copies cost nearly nothing: every cold expert is copied.
COPIES = Costs(1e-5, 0.0, 1e-3, 1e-3, 1e-6, 0.0)

# Copies never pay, neither now nor early.
NO_COPIES = Costs(1e-6, 0.0, 1e-5, 0.0, 1e3, 0.0)

LENGTH = 64
NEW_TOKENS = 6
IDS = token_ids(2, 7, seed=3)
UNSEEN = token_ids(3, 11, seed=4)

KINDS = ("float", "int8")


def build(name: str, kind: str = "float") -> PreTrainedModel:
    """A model of its own."""
    model = MIXTURES[name]()
    if kind == "float":
        return model
    config = QuantizationConfig(exclude=("lm_head", *EXCLUDE.get(name, ())), search_tokens=64)
    return quantize_model(model, [token_ids(2, 32)], config, progress=False)


def shared_model(name: str, kind: str = "float") -> PreTrainedModel:
    """One for all tests of a process: to be called and offloaded, and nothing else."""
    return _shared(name, kind)[0]


def plain_logits(name: str, kind: str = "float") -> Tensor:
    """Of the shared model, when it had never been offloaded."""
    return _shared(name, kind)[1]


def plain_tokens(name: str, kind: str = "float") -> Tensor:
    """Likewise."""
    return _shared(name, kind)[2]


@functools.cache
def _shared(name: str, kind: str) -> tuple[PreTrainedModel, Tensor, Tensor]:
    model = build(name, kind)
    return model, logits_of(model), generated(model)


def logits_of(model: PreTrainedModel, ids: Tensor = UNSEEN, **options: Any) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **options).logits
    assert isinstance(logits, Tensor)
    return logits


def generated(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Token ids, greedy unless ``options`` say otherwise."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    tokens = model.generate(ids, **options)  # type: ignore[operator]
    assert isinstance(tokens, Tensor)
    return tokens


def experts_of(model: PreTrainedModel) -> tuple[int, int]:
    """Layers with experts, and experts in each."""
    found = experts_modules(model)
    numbers = {int(module.num_experts) for module in found.values()}  # type: ignore[arg-type]
    return len(found), numbers.pop()


def offloader(
    model: PreTrainedModel,
    resident: int | None = None,
    *,
    costs: Costs = MIXED,
    statistics: Any = None,
    **options: Any,
) -> ExpertOffloader:
    """With a budget for exactly so many resident experts; without one if None."""
    config = OffloadConfig(**{"max_length": LENGTH} | options)
    make: Callable[..., ExpertOffloader] = functools.partial(
        ExpertOffloader, model, device="cpu", costs=costs, config=config, statistics=statistics
    )
    if resident is None:
        return make()
    everything = make()
    size = bytes_of_an_expert(everything)
    return make(gpu_memory=everything.budget.needed + resident * size)


def bytes_of_an_expert(offloader: ExpertOffloader) -> int:
    """From the budget alone: what spare slots take."""
    return offloader.budget.spare // offloader.config.spare_slots


def total(report: OffloadReport, *names: str) -> int:
    """Choices of all layers."""
    return sum(getattr(counts, name) for counts in report.counts for name in names)


def assert_close(got: Tensor, expected: Tensor, kind: str) -> None:
    """Int8 to the bit, float to the rounding of float32 sums in another order."""
    if kind == "int8":
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

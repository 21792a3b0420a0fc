"""A decode step on a GPU can be captured: nothing in it waits for the device, or asks it anything.

Under Triton's interpreter, see `tests/int8/test_kernels.py`: what is run is what a GPU would run,
and every operator on the way is looked at.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from haq.nn import Int8Experts, fuse_norms
from tests.architectures import token_ids
from tests.interpreter import Launches, nothing_waits, triton_on_cpu
from tests.nn.decoding import Decoder, int8_model

WAITING: list[Callable[[Tensor], object]] = [
    lambda x: x.tolist(),
    lambda x: x[0].item(),
    lambda x: int(x[0]),
    lambda x: bool(x[0] > 0),
    lambda x: x.bincount(),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: torch.equal(x, x.clone()),
    lambda x: x.cpu(),
    lambda x: x.numpy(),
    lambda x: x.unique(),
    lambda x: torch.tensor([1, 2]),
]


@pytest.mark.parametrize("way", WAITING)
def test_the_audit_sees_what_waits(
    way: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor([3, 1, 0])
    with nothing_waits(monkeypatch), pytest.raises(AssertionError, match=r"waited for|copies"):
        way(x)


def test_the_audit_lets_everything_else_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([3, 1, 0])
    with nothing_waits(monkeypatch):
        y = (x.float() * 2).sum().add_(1)
    assert y == 9


@pytest.fixture
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    model = int8_model(request.param)
    with triton_on_cpu(monkeypatch), torch.no_grad():
        model = copy.deepcopy(model)
        fuse_norms(model)
        yield Decoder(model)


# What a step starts: norms with the tokens of those who read them, what is left of rounding (the
# attention's output, and what is between two matrices), and the products.
LAUNCHES = {
    "llama": {"norm": 5, "linear": 14, "quantize": 4},
    "qwen3": {"norm": 9, "linear": 14, "quantize": 4},
    "mixtral": {
        "norm": 5,
        "linear": 8,
        "quantize": 4,
        "sort": 2,
        "grouped": 4,
        "add_experts": 2,
    },
}


@pytest.mark.parametrize(("step", "expected"), LAUNCHES.items(), indirect=["step"])
def test_a_step_waits_for_nothing(
    step: Decoder, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = token_ids(2, 1, seed=4)
    step(token)  # As before every capture.
    with nothing_waits(monkeypatch) as launches:
        step(token)
    assert launches.counts() == expected


@pytest.mark.parametrize("step", ["mixtral", "qwen2-moe"], indirect=True)
def test_what_is_started_does_not_depend_on_the_routing(
    step: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a graph can be replayed with tokens that choose other experts."""
    seen: list[list[tuple[Any, ...]]] = []
    chosen: list[list[Tensor]] = []

    def note(_: Any, args: tuple[Any, ...]) -> None:
        chosen[-1].append(args[1].clone())

    for module in step.model.modules():
        if isinstance(module, Int8Experts):
            module.register_forward_pre_hook(note)
    for seed in (4, 4, 5, 6, 7):
        chosen.append([])
        step.reset()
        with monkeypatch.context() as patch:
            launches = Launches(patch)
            step(token_ids(2, 1, seed=seed))
        seen.append(launches.seen)
    assert all(each == seen[1] for each in seen[2:])
    assert len(seen[1]) > 10
    routings = [torch.stack(each) for each in chosen]
    assert torch.equal(routings[0], routings[1])
    assert any(not torch.equal(each, routings[1]) for each in routings[2:])

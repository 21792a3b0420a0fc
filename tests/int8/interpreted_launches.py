"""What kernels are started with, under Triton's interpreter: see `interpreted_kernels.py`."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from haq.int8 import cuda, kernels
from haq.int8.kernels import Int8Tokens, Plan, Tiles, grouped, linear, plans, tokens
from haq.int8.kernels.plans import fastest
from tests.int8.interpreted_kernels import numpy_linear, random_tokens, random_weight

# --- Bad input ------------------------------------------------------------------------------------


def linear_with(**changes: Any) -> Callable[[], object]:
    """A call of `int8_linear` in which something is wrong."""
    tokens = {"integers": torch.ones(2, 6).char(), "scale": torch.ones(2, 1), "shift": None}
    weight = {"weight": torch.ones(5, 6).char(), "weight_scale": torch.ones(5, 1)}
    for name, value in changes.items():
        (tokens if name in tokens else weight)[name] = value
    return lambda: kernels.int8_linear(Int8Tokens(**tokens), **weight)  # type: ignore[arg-type]


def tiles_of(*groups: tuple[int, int, int]) -> Tiles:
    return kernels.row_tiles(groups, "cpu")


def grouped_with(tiles: Tiles | None = None, **changes: Any) -> Callable[[], object]:
    tiles = tiles_of((0, 0, 2)) if tiles is None else tiles
    weight = {"weight": torch.ones(3, 5, 6).char(), "weight_scale": torch.ones(3, 5), **changes}
    return lambda: kernels.grouped_linear(random_tokens(2, 6), tiles=tiles, **weight)


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "tokens of integers": (
        lambda: kernels.quantize_tokens(torch.ones(1, 2).int()),
        TypeError,
        r"`tokens` must be a float tensor, got torch.int32",
    ),
    "a token alone": (
        lambda: kernels.quantize_tokens(torch.ones(2)),
        ValueError,
        r"`tokens` must be a matrix \[T, K\], K > 0, got \[2\]",
    ),
    "tokens of nothing": (
        lambda: kernels.quantize_tokens(torch.ones(2, 0)),
        ValueError,
        r"K > 0, got \[2, 0\]",
    ),
    "float integers": (
        linear_with(integers=torch.ones(2, 6)),
        TypeError,
        "`integers` must be int8, got torch.float32",
    ),
    "a float weight": (
        linear_with(weight=torch.ones(5, 6)),
        TypeError,
        "`weight` must be int8, got torch.float32",
    ),
    "other columns": (
        linear_with(integers=torch.ones(2, 7).char()),
        ValueError,
        r"`integers` must be a contiguous matrix \[T, 6\], got shape \[2, 7\]",
    ),
    "a transposed weight": (
        linear_with(weight=torch.ones(6, 5).char().t()),
        ValueError,
        r"`weight` must be a contiguous tensor \[N, K\], got shape \[5, 6\] and strides \[1, 5\]",
    ),
    "half scales": (
        linear_with(weight_scale=torch.ones(5, 1).half()),
        TypeError,
        "`weight_scale` must be float32, got torch.float16",
    ),
    "too few scales": (
        linear_with(weight_scale=torch.ones(1, 1)),
        ValueError,
        r"`weight_scale` must be a contiguous tensor \[5\], got shape \[1, 1\]",
    ),
    "a bias of another layer": (
        linear_with(bias=torch.ones(4)),
        ValueError,
        r"`bias` must be a contiguous tensor \[5\], got shape \[4\]",
    ),
    "a shift alone": (
        linear_with(shift=torch.ones(2, 1)),
        ValueError,
        "have a shift, got no `row_sums` and a shift",
    ),
    "row sums alone": (
        linear_with(row_sums=torch.ones(5)),
        ValueError,
        "have a shift, got `row_sums` and no shift",
    ),
    "one slot for many": (
        grouped_with(weight=torch.ones(5, 6).char()),
        ValueError,
        r"`weight` must be a contiguous tensor \[S, N, K\], got shape \[5, 6\]",
    ),
    "scales of one slot": (
        grouped_with(weight_scale=torch.ones(5)),
        ValueError,
        r"`weight_scale` must be a contiguous tensor \[3, 5\], got shape \[5\]",
    ),
    "too few rows": (
        grouped_with(tiles_of((0, 1, 2))),
        ValueError,
        "at most 2 rows and 3 slots, which is what there is, got 3 and 1",
    ),
    "too few slots": (
        grouped_with(tiles_of((3, 0, 2))),
        ValueError,
        "at most 2 rows and 3 slots, which is what there is, got 2 and 4",
    ),
    "an index of floats": (
        grouped_with(index=torch.zeros(2)),
        TypeError,
        "`index` must be int32 or int64, got torch.float32",
    ),
    "gates of integers": (
        grouped_with(gates=torch.zeros(2).int()),
        TypeError,
        "`gates` must be a float tensor, got torch.int32",
    ),
    "gates of other rows": (
        grouped_with(gates=torch.zeros(3)),
        ValueError,
        r"`gates` must be a contiguous tensor \[2\], got shape \[3\]",
    ),
    "a plan for other tiles": (
        grouped_with(plan=Plan(64, 16, 32)),
        ValueError,
        "`plan` must be for tiles of 16 rows, unsplit, got Plan",
    ),
    "a plan that splits": (
        grouped_with(plan=Plan(16, 16, 32, split=2)),
        ValueError,
        "`plan` must be for tiles of 16 rows, unsplit, got Plan",
    ),
    "a negative slot": (
        lambda: tiles_of((-1, 0, 2)),
        ValueError,
        r"`groups` must not be negative, got \(-1, 0, 2\)",
    ),
    "rows of two experts": (
        lambda: tiles_of((0, 2, 2), (1, 0, 3)),
        ValueError,
        "must not share rows, got one that starts at row 2, while another one ends at row 3",
    ),
    "tiles of another height": (
        lambda: kernels.row_tiles([], "cpu", block_m=32),
        ValueError,
        r"`block_m` must be one of \[16, 64, 128\], got 32",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_kernel_that_fails_is_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what the choice of a backend passes over."""
    monkeypatch.setattr(linear, "_PLANS", {16: (Plan(16, 16, 33),)})  # no power of 2
    with pytest.raises(RuntimeError, match="Triton cannot run its kernels here: "):
        cuda.TritonWeight(*random_weight(5, 6)).product(torch.ones(1, 6))


def test_no_launch_lets_the_compiler_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter fuses nothing anyway; a GPU's compiler would, unless it is told."""
    fused = []

    class Kernel:
        def __getitem__(self, launch_grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *operands, enable_fp_fusion, **options: fused.append(enable_fp_fusion)

    monkeypatch.setattr(tokens, "_quantize_kernel", Kernel())
    monkeypatch.setattr(linear, "_linear_kernel", Kernel())
    monkeypatch.setattr(linear, "_add_kernel", Kernel())
    monkeypatch.setattr(grouped, "_grouped_kernel", Kernel())
    rounded, (weight, scale) = random_tokens(2, 6), random_weight(1, 5, 6)
    kernels.quantize_tokens(torch.ones(2, 6))
    kernels.int8_linear(rounded, weight[0], scale[0], plan=Plan(16, 16, 32, split=2))
    kernels.grouped_linear(rounded, weight, scale, tiles_of((0, 0, 2)))
    assert fused == [False] * 4


# --- The choice of a plan -------------------------------------------------------------------------

SLOW, FAST = Plan(16, 32, 32), Plan(16, 16, 32)
WRONG, TOO_LARGE = Plan(16, 16, 64), Plan(16, 16, 128)
KEY = ("linear", torch.device("cpu"), 16, 1024, 1024, torch.float32)


class Clock:
    """A GPU on which plans take known times, of which one is wrong and one does not start."""

    def __init__(self) -> None:
        self.calls: list[Plan] = []
        self.result = torch.tensor([torch.nan, 1.0])

    def run(self, plan: Plan) -> Tensor:
        self.calls.append(plan)
        if plan == TOO_LARGE:
            raise RuntimeError("out of resource: shared memory")
        return self.result + (plan == WRONG)

    def seconds(self, run: Callable[[], Tensor]) -> float:
        run()
        return {SLOW: 2.0, FAST: 1.0, WRONG: 0.5}[self.calls[-1]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(plans, "_seconds", clock.seconds)
    monkeypatch.setattr(plans, "_fastest_plans", {})
    monkeypatch.setattr(plans, "_can_measure", lambda: True)
    return clock


def test_the_fastest_plan_that_is_right_is_measured_once(clock: Clock) -> None:
    choices = (SLOW, WRONG, TOO_LARGE, FAST)
    assert fastest(KEY, choices, clock.run, 1) == FAST
    calls = len(clock.calls)
    assert fastest(KEY, choices, clock.run, 1) == FAST
    assert len(clock.calls) == calls
    other = (*KEY[:3], 2048, *KEY[4:])
    assert fastest(other, (SLOW, WRONG), clock.run, 1) == SLOW


@pytest.mark.parametrize("where", ["unmeasurable", "small", "idle"])
def test_the_first_plan_where_nothing_is_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    key, work = KEY, 1
    if where == "unmeasurable":
        monkeypatch.setattr(plans, "_can_measure", lambda: False)
    elif where == "small":
        key = (*KEY[:3], 64, 64, torch.float32)
    else:
        work = 0
    assert fastest(key, (SLOW, FAST), clock.run, work) == SLOW
    assert clock.calls == []
    assert plans._fastest_plans == {}


@pytest.mark.parametrize("capturing", [False, True], ids=["free", "capturing"])
@pytest.mark.parametrize("interpreted", [False, True], ids=["compiled", "interpreted"])
def test_where_time_can_be_measured(
    monkeypatch: pytest.MonkeyPatch, interpreted: bool, capturing: bool
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert plans._can_measure() == (not interpreted and not capturing)


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of calls before each of which the cache was overwritten, in seconds."""
    log: list[str] = []
    taken = iter([9.0, 2.0, 3.0] * plans._TIMES)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            assert end is not self
            return next(taken)

    def run() -> Tensor:
        log.append("run")
        return torch.ones(2)

    zero = Tensor.zero_
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(Tensor, "zero_", lambda x: (log.append(f"zero {x.nbytes}"), zero(x))[1])
    assert plans._seconds(run) == 3e-3
    once = ["zero 1000"] * plans._BUSY + ["event", "run", "event"]
    assert log == ["run", *once * plans._TIMES, "wait"]


def test_products_choose_by_their_size_and_tokens(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size and range of tokens is measured by its own plans, the result is that of one."""
    monkeypatch.setattr(plans, "_WORTH_TUNING", 1)
    monkeypatch.setattr(linear, "_PLANS", {16: (SLOW, FAST), float("inf"): (Plan(32, 16, 32),)})
    monkeypatch.setattr(plans, "_seconds", lambda run: float(run().shape[0]))
    weight, scale = random_weight(5, 6)
    for count in (1, 16, 17):
        tokens = random_tokens(count, 6)
        result = kernels.int8_linear(tokens, weight, scale)
        np.testing.assert_array_equal(result.numpy(), numpy_linear(tokens, weight, scale))
    kernels.grouped_linear(tokens, weight[None], scale[None], tiles_of((0, 0, 17)))
    assert sorted(key[0] for key in plans._fastest_plans) == ["grouped", "linear", "linear"]

"""How is a kernel started, cut into which programs?

At decode a product takes as long as reading its weight. Blocks of few weight rows then keep every
processor reading, and where there are not enough rows each is cut into `Plan.split` pieces, whose
exact sums a second kernel adds. Which plan is the fastest one is measured, once per process for
each size of the weight and range of token numbers; a plan whose bits differ is not used.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

# Smaller products take no time worth measuring.
_WORTH_TUNING = 2**20

# Calls of each plan that are timed; and how often the cache is overwritten before one of them: as
# long as that takes, its launches are on their way to the device, which then need not wait.
_TIMES, _BUSY = 11, 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut into programs.

    Attributes:
        block_m: tokens of a program.
        block_n: rows of the weight of a program.
        block_k: columns that it multiplies at a time.
        warps: of 32 threads each.
        stages: blocks of columns that are on their way from memory at a time.
        split: programs among which the columns are divided.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    split: int = 1


def launch(kernel: Any, launch_grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
    """Start a kernel on the device of its tensors; every way to fail is a RuntimeError."""
    if 0 in launch_grid:
        return
    try:
        with torch.cuda.device_of(operands[0]):
            kernel[launch_grid](*operands, enable_fp_fusion=False, **options)
    except (TritonError, OSError, SubprocessError, ValueError) as error:
        raise RuntimeError(f"Triton cannot run its kernels here: {error}") from error


def options(plan: Plan, columns: int) -> dict[str, Any]:
    return {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "EVEN": columns % plan.block_k == 0,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }


_fastest_plans: dict[tuple[Any, ...], Plan] = {}


def fastest(
    key: tuple[Any, ...], plans: Sequence[Plan], run: Callable[[Plan], Tensor], work: int
) -> Plan:
    """The plan that is measured to be the fastest, once for each key.

    The first plan is what the others are compared with. It is also the choice where nothing can be
    measured: under the interpreter and while a CUDA graph is captured.

    Args:
        key: what the choice depends on; its fourth and fifth entries are N and K.
        plans: to choose from.
        run: computes the product by a plan.
        work: tokens, or tiles; nothing is measured without.
    """
    plan = _fastest_plans.get(key)
    if plan is not None:
        return plan
    if work == 0 or key[3] * key[4] < _WORTH_TUNING or not _can_measure():
        return plans[0]
    expected = run(plans[0])
    seconds = {}
    for plan in plans:
        try:
            if torch.allclose(run(plan), expected, rtol=0, atol=0, equal_nan=True):
                seconds[plan] = _seconds(functools.partial(run, plan))
        except RuntimeError:  # Too much shared memory for this card, or too little left on it.
            continue
    _fastest_plans[key] = min(seconds, key=lambda plan: seconds[plan], default=plans[0])
    return _fastest_plans[key]


def _can_measure() -> bool:
    return not (triton.knobs.runtime.interpret or torch.cuda.is_current_stream_capturing())


def _seconds(run: Callable[[], Tensor]) -> float:
    """The median of some calls; before each, what the cache held is overwritten.

    No more than that takes memory, since a model may be under a promise of how much it takes.
    """
    device = run().device
    with torch.cuda.device(device):
        size = torch.cuda.get_device_properties(device).L2_cache_size
        cache = torch.empty(size, dtype=torch.int8, device=device)
        spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_TIMES)]
        for start, end in spans:
            for _ in range(_BUSY):
                cache.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
    milliseconds = [float(start.elapsed_time(end)) for start, end in spans]
    return statistics.median(milliseconds) / 1e3

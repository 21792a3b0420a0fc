"""Which of two exact products is the faster one on this machine: measured, since no table can know.

fbgemm and oneDNN each win on some processors, by more than half at one token, and give the same
bits. A token at a time, a batch of them and a prompt count the same: the score is the geometric
mean of the seconds for 1, 16 and 128 tokens.
"""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from haq.int8.reference import PackedWeight

Pack = Callable[[Tensor, Tensor], PackedWeight]

# Weights that take turns, together 48 MiB: in a model, too, no cache holds the next one.
_SHAPE = (4096, 4096)
_COPIES = 3

_TOKENS = (1, 16, 128)
_ROUNDS = 5


def seconds_per_product(packs: Mapping[str, Pack]) -> dict[str, float]:
    """Time products in turn, on the CPU; about half a second for two.

    Args:
        packs: by name, what packs a weight int8 ``[N, K]`` with its scale float32 ``[N, 1]``.

    Returns:
        Seconds by name, the geometric mean over the numbers of tokens.
    """
    with torch.inference_mode(), torch.device("cpu"):
        weight = torch.ones(_SHAPE, dtype=torch.int8)
        scale = torch.ones(_SHAPE[0], 1, dtype=torch.float32)  # whatever the default is
        inputs = [torch.ones(tokens, _SHAPE[1], dtype=torch.float32) for tokens in _TOKENS]
        copies = {n: [pack(weight, scale) for _ in range(_COPIES)] for n, pack in packs.items()}
        fastest = {name: [math.inf] * len(inputs) for name in packs}
        for _ in range(_ROUNDS):
            for name, packed in copies.items():
                times = [_seconds(packed, x) for x in inputs]
                fastest[name] = [min(pair) for pair in zip(fastest[name], times, strict=True)]
    return {name: math.prod(times) ** (1 / len(times)) for name, times in fastest.items()}


def _seconds(weights: list[PackedWeight], inputs: Tensor) -> float:
    start = time.perf_counter()
    for weight in weights:
        weight.product(inputs)
    return (time.perf_counter() - start) / len(weights)

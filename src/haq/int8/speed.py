"""Which of several exact products is the fastest here: measured, since no table can know.

Each wins on some processors, by more than half at one token, and all give the same bits. A token at
a time, a batch of them and a prompt count the same: the score is the geometric mean of the seconds
for 1, 16 and 128 tokens, from the tokens in bfloat16 to the outputs.
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


def seconds_per_layer(
    packs: Mapping[str, Pack], linear: Callable[[Tensor, PackedWeight], Tensor]
) -> dict[str, float]:
    """Time layers in turn, on the CPU; less than a second for three.

    Args:
        packs: by name, what packs a weight int8 ``[N, K]`` with its scale float32 ``[N, 1]``.
        linear: tokens ``[T, K]`` times a packed weight.

    Returns:
        Seconds by name, the geometric mean over the numbers of tokens.
    """
    with torch.inference_mode(), torch.device("cpu"):
        weight = torch.ones(_SHAPE, dtype=torch.int8)
        scale = torch.ones(_SHAPE[0], 1, dtype=torch.float32)  # whatever the default is
        inputs = [torch.ones(tokens, _SHAPE[1], dtype=torch.bfloat16) for tokens in _TOKENS]
        copies = {n: [pack(weight, scale) for _ in range(_COPIES)] for n, pack in packs.items()}
        fastest = {name: [math.inf] * len(inputs) for name in packs}
        for _ in range(_ROUNDS):
            for name, packed in copies.items():
                times = [_seconds(linear, packed, x) for x in inputs]
                fastest[name] = [min(pair) for pair in zip(fastest[name], times, strict=True)]
    return {name: math.prod(times) ** (1 / len(times)) for name, times in fastest.items()}


def _seconds(
    linear: Callable[[Tensor, PackedWeight], Tensor], weights: list[PackedWeight], inputs: Tensor
) -> float:
    start = time.perf_counter()
    for weight in weights:
        linear(inputs, weight)
    return (time.perf_counter() - start) / len(weights)

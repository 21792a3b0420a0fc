"""Costs of one machine, measured with the very experts that it will run: about a second."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from haq.offload.costs import Costs
from haq.offload.host import HostSide
from haq.offload.slots import DeviceSlot, SharedSlot, Slot
from haq.offload.weights import ExpertWeights

# Experts that take turns, so that no cache holds the next one, as in a model.
_EXPERTS = 4

# Tokens of the second point of the line through seconds against tokens.
_MANY = 16

# How long one measurement may take, and how often it is taken at least.
_SECONDS, _LEAST, _MOST = 0.12, 3, 50

_SHORTEST = 1e-9

_measured: dict[tuple[object, ...], Costs] = {}


def measure_costs(
    weights: ExpertWeights, device: torch.device, dtype: torch.dtype, experts_per_token: int
) -> Costs:
    """Seconds per expert and token on both sides, per copy, per round trip; kept for the process.

    If the GPU is the CPU, its lanes share one processor and take the sum of their times, where
    those of a machine with two take the longer one. So that no plan counts on the difference, an
    expert of the CPU's lane is taken to be as slow as all of a token's experts together.

    Args:
        weights: of a layer like all others.
        device: of the GPU lane.
        dtype: of the hidden states.
        experts_per_token: A.
    """
    key = (weights.shape, str(device), dtype, torch.get_num_threads())
    if key not in _measured:
        with torch.inference_mode():
            _measured[key] = _measure(weights, device, dtype)
    costs = _measured[key]
    if device.type != "cpu":
        return costs
    return replace(
        costs,
        cpu_expert=costs.cpu_expert * experts_per_token,
        cpu_token=costs.cpu_token * experts_per_token,
    )


def _measure(weights: ExpertWeights, device: torch.device, dtype: torch.dtype) -> Costs:
    numbers = range(min(_EXPERTS, weights.num_experts))
    on_cpu = [weights.on_cpu(e) for e in numbers]
    cpu = [_seconds_of(weights, on_cpu, count, torch.device("cpu"), dtype) for count in (1, _MANY)]
    slot: Slot = SharedSlot()
    gpu = cpu
    if device.type != "cpu":
        rooms = weights.slots(len(on_cpu), device)
        for room, expert in zip(rooms, numbers, strict=True):
            weights.write(room, weights.parts(expert))
        gpu = [_seconds_of(weights, rooms, count, device, dtype) for count in (1, _MANY)]
        slot = DeviceSlot(rooms[0], None)
    copy = _least_seconds(lambda i: slot.fill(weights, i % len(on_cpu), None), device)
    (gpu_expert, gpu_token), (cpu_expert, cpu_token) = _line(*gpu), _line(*cpu)
    round_trip = _round_trip(weights.hidden, device, dtype)
    return Costs(gpu_expert, gpu_token, cpu_expert, cpu_token, max(copy, _SHORTEST), round_trip)


def _seconds_of(
    weights: ExpertWeights,
    experts: list[object],
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Of one expert with ``count`` tokens."""
    hidden = torch.randn(count, weights.hidden, dtype=torch.float32).to(device, dtype)
    tokens = torch.arange(count, device=device)
    return _least_seconds(
        lambda i: weights.rows([experts[i % len(experts)]], [count], hidden, tokens), device
    )


def _line(one: float, many: float) -> tuple[float, float]:
    """Seconds for the expert and for each token, from those of 1 and of 16 tokens."""
    token = max(many - one, 0.0) / (_MANY - 1)
    return max(one - token, _SHORTEST), token


def _round_trip(hidden: int, device: torch.device, dtype: torch.dtype) -> float:
    """A token to a thread of the CPU, and a row of float32 back."""
    host = HostSide(device, pinned=True)
    token = torch.zeros(1, hidden, dtype=dtype, device=device)
    index, gates = (torch.zeros(1, 2, device=device).to(t) for t in (torch.int64, torch.float32))
    row = torch.zeros(1, hidden)

    def there_and_back(_: int) -> Tensor:
        host.fetch(token, index, gates, routing_only=False)
        result: Tensor = pool.submit(lambda: row).result()
        return host.bring(result)

    with ThreadPoolExecutor(1) as pool:
        return _least_seconds(there_and_back, device)


def _least_seconds(run: Callable[[int], object], device: torch.device) -> float:
    """Seconds of a call: the least of as many as fit into a moment. Other work only adds."""
    run(0)
    _wait(device)
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < _LEAST or (
        len(seconds) < _MOST and time.perf_counter() - start < _SECONDS
    ):
        before = time.perf_counter()
        run(len(seconds))
        _wait(device)
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

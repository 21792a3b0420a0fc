"""From a plan to the parts that run it: slots that are filled, lanes that share them."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from haq.config import OffloadConfig
from haq.offload.budget import parse_memory
from haq.offload.costs import Costs
from haq.offload.executor import Machine
from haq.offload.host import HostSide
from haq.offload.meter import Meter
from haq.offload.placement import Placement
from haq.offload.prefetch import Prefetcher
from haq.offload.routing import RoutingStatistics
from haq.offload.schedule import prefetch_gain
from haq.offload.slots import Key, Slot, SpareSlots, make_slots
from haq.offload.watch import RoutingWatch
from haq.offload.weights import ExpertWeights, spare_slots


def make_machine(
    device: torch.device,
    config: OffloadConfig,
    costs: Costs,
    placement: Placement,
    statistics: RoutingStatistics,
    weights: Sequence[ExpertWeights],
) -> Machine:
    """What all layers share.

    Args:
        device: the GPU.
        config: what the user decided.
        costs: of the experts.
        placement: which experts are on the GPU.
        statistics: added to while the model runs.
        weights: of every layer.
    """
    pinned = parse_memory(config.pinned_memory, "pinned_memory", least=0)
    meter, watch = Meter(len(weights), device), RoutingWatch(statistics)
    spare, notes = _make_spare(device, config, placement, statistics, weights, pinned)
    prefetcher = None
    if spare is not None and config.prefetch and prefetch_gain(1.0, costs) > 0:
        prefetcher = Prefetcher(
            spare,
            [frozenset(experts) for experts in placement.resident],
            watch,
            costs,
            lambda: meter.pace,
            depth=len(statistics.transitions),
        )
    host = HostSide(device, pinned=pinned > 0)
    return Machine(device, costs, config.cold, spare, host, meter, watch, prefetcher, notes)


def residents_of(
    weights: ExpertWeights, experts: Sequence[int], device: torch.device
) -> dict[int, Slot]:
    """Experts of a layer on the GPU, in one buffer, by number."""
    slots = make_slots(weights, len(experts), device, None)
    for slot, expert in zip(slots, experts, strict=True):
        slot.fill(weights, expert, None)
    return dict(zip(experts, slots, strict=True))


def _make_spare(
    device: torch.device,
    config: OffloadConfig,
    placement: Placement,
    statistics: RoutingStatistics,
    weights: Sequence[ExpertWeights],
    pinned: int,
) -> tuple[SpareSlots | None, list[str]]:
    """Slots for experts that come and go, if any can; what did not go as configured."""
    number = spare_slots(weights, config.spare_slots)
    cold = [
        (layer, expert)
        for layer, each in enumerate(weights)
        for expert in range(each.num_experts)
        if expert not in placement.resident[layer]
    ]
    if number == 0 or not cold:
        return None, []
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    slots = make_slots(weights[0], number, device, stream)
    if stream is None:
        return SpareSlots(slots, weights, {}), []
    cold.sort(key=lambda key: -statistics.popularity[key])
    copies, notes = _pinned_copies(weights, cold, pinned)
    return SpareSlots(slots, weights, copies), notes


def _pinned_copies(
    weights: Sequence[ExpertWeights], keys: Sequence[Key], limit: int
) -> tuple[Mapping[Key, tuple[Tensor, ...]], list[str]]:
    """Plain copies of experts, the first ones, as many as ``limit`` bytes allow."""
    copies: dict[Key, tuple[Tensor, ...]] = {}
    for layer, expert in itertools.islice(keys, limit // weights[0].expert_bytes):
        try:
            parts = weights[layer].parts(expert)
            copies[layer, expert] = tuple(part.contiguous().pin_memory() for part in parts)
        except RuntimeError as error:  # The system has a limit of its own.
            reason = str(error).partition("\n")[0]
            return copies, [f"{len(copies)} experts in pinned memory, no more: {reason}"]
    return copies, []

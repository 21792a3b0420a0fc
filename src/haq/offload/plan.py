"""What an offloader knows and promises before it decides: statistics, and bytes for what."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from haq.config import OffloadConfig
from haq.model.linears import weight_of
from haq.offload.budget import (
    Budget,
    dense_bytes,
    format_bytes,
    parse_memory,
    streamed_bytes,
    working_bytes,
)
from haq.offload.collect import number_of_experts
from haq.offload.rehearsal import Rehearsal
from haq.offload.routing import RoutingStatistics
from haq.offload.weights import ExpertWeights, spare_slots
from haq.quantization.report import find_report

# Of the memory that is free on a GPU, what is used if nobody says how much.
_SHARE_OF_FREE = 0.9


def known_statistics(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    given: RoutingStatistics | None,
    experts_per_token: int,
) -> RoutingStatistics:
    """Statistics to be added to: a copy of what was given, or what quantizing the model counted.

    Args:
        model: whose report is looked for.
        modules: its experts by name.
        given: by the user.
        experts_per_token: A.

    Raises:
        ValueError: those that were given are of another model.
    """
    layers, number = list(modules), number_of_experts(modules)
    if given is not None:
        given.check(len(layers), number)
        own = RoutingStatistics(layers, number, experts_per_token)
        own.tokens = given.tokens
        for name in ("counts", "gate_mass", "transitions"):
            getattr(own, name)[:] = getattr(given, name)
        return own
    report = find_report(model)
    counted = {} if report is None else {r.name: r.tokens for r in report.routing}
    if not set(layers) <= set(counted):
        return RoutingStatistics(layers, number, experts_per_token)
    return RoutingStatistics.from_counts(
        [counted[name] for name in layers], experts_per_token=experts_per_token, layers=layers
    )


def make_budget(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    weights: Sequence[ExpertWeights],
    device: torch.device,
    memory: str | int | None,
    config: OffloadConfig,
    rehearsal: Rehearsal,
) -> Budget:
    """Bytes by what they are for.

    Args:
        model: what is to run.
        modules: its experts by name.
        weights: of each of them.
        device: the GPU.
        memory: what may be used of it; None for nine tenths of what is free.
        config: for what length, and how many spare slots.
        rehearsal: what the model keeps.

    Raises:
        TypeError: ``memory`` is neither a string nor an integer.
        ValueError: it cannot be read, or is too small for the model without any expert.
    """
    total: int | None = None
    if memory is not None:
        total = parse_memory(memory)
    elif device.type == "cuda":
        total = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE)
    vocabulary = len(weight_of(model.get_input_embeddings()))
    tokens = config.batch_size * config.max_length
    top_k = rehearsal.experts_per_token
    budget = Budget(
        total=total,
        dense=dense_bytes(model, modules.values()),
        cache=rehearsal.cache_bytes,
        working=working_bytes(weights, tokens, config.batch_size, top_k, vocabulary),
        spare=spare_slots(weights, config.spare_slots) * weights[0].expert_bytes,
    )
    if not _too_small(budget):
        return budget
    dense = streamed_bytes(model, modules.values())
    if dense is not None:
        budget = replace(budget, dense=min(dense, budget.dense), streamed=True)
    if _too_small(budget):
        raise ValueError(
            f"`gpu_memory` must be at least {format_bytes(budget.needed)} ({budget.needed} bytes), "
            f"got {format_bytes(budget.total or 0)}: without any expert the model needs {budget}. "
            "A smaller `max_length` or `batch_size` in the config needs less."
        )
    return budget


def _too_small(budget: Budget) -> bool:
    return budget.experts is not None and budget.experts < 0

"""A model run with shapes only: what it keeps for each token, and how many experts a token has.

Architectures differ in what they cache: keys and values of few heads, of compressed ones, of a
window, the state of a recurrence. No table knows them all, and none is needed: a model of the same
configuration runs on the meta device, where it takes no time and no memory, and its cache is
looked at. Experts, whose shapes depend on numbers, are left out.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.published import skeleton


@dataclass(frozen=True)
class Rehearsal:
    """What a run would leave behind.

    Attributes:
        cache_bytes: keys and values, or whatever the model keeps.
        experts_per_token: A.
    """

    cache_bytes: int
    experts_per_token: int


def rehearse(model: PreTrainedModel, batch: int, length: int, names: Iterable[str]) -> Rehearsal:
    """Run ``batch`` sequences of ``length`` tokens through a twin that has only shapes.

    Args:
        model: whose twin runs; not touched.
        batch: sequences.
        length: tokens of each.
        names: its experts modules.

    Raises:
        RuntimeError: the architecture cannot be run without numbers.
    """
    twin = skeleton(type(model), copy.deepcopy(model.config))
    twin.to(torch.device("meta"), model.dtype)  # type: ignore[arg-type]  # Buffers as well.
    stands = {name: _NoExperts() for name in names}
    for name, stand in stands.items():
        twin.set_submodule(name, stand)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    base = getattr(twin, twin.base_model_prefix, twin)
    try:
        with torch.no_grad():
            outputs = base(input_ids=tokens, use_cache=True)
    except Exception as error:
        raise RuntimeError(
            f"What a {type(model).__name__} keeps for {batch} x {length} tokens cannot be found: "
            f"{error} Check that `config.max_length` is a length that the model takes."
        ) from error
    seen: dict[int, int] = {}
    _collect(getattr(outputs, "past_key_values", None), seen, set())
    experts = {stand.experts_per_token for stand in stands.values()}
    if len(experts) != 1:
        raise RuntimeError(
            f"Every layer must give a token the same number of experts, got {sorted(experts)}."
        )
    return Rehearsal(sum(seen.values()), experts.pop())


class _NoExperts(nn.Module):
    """In the place of experts."""

    experts_per_token = 0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.experts_per_token = top_k_index.shape[1]
        return hidden_states


def _collect(value: Any, found: dict[int, int], visited: set[int]) -> None:
    """Bytes of all memory that a cache holds, whatever it is made of.

    A window's keys may be a view of those of the whole prompt, all of which stay for it.
    """
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, found, visited)
    elif isinstance(value, list | tuple):
        for each in value:
            _collect(each, found, visited)
    elif hasattr(value, "__dict__"):
        _collect(vars(value), found, visited)

"""Which tokens go to other experts than in a reference, while both models read the same text."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from haq.model.experts import is_experts
from haq.model.routing import share_changed
from haq.nn import Int8Experts


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model by name, float or int8, in the order of its layers.

    Examples:
        >>> experts_of(nn.Linear(1, 1))
        {}
    """
    return {
        name: module
        for name, module in model.named_modules()
        if is_experts(module) or isinstance(module, Int8Experts)
    }


class ChangedExperts:
    """Counts, layer by layer, the tokens whose set of experts differs between two models."""

    def __init__(self, layers: int) -> None:
        self._waiting: list[tuple[deque[Tensor], deque[Tensor]]] = [
            (deque(), deque()) for _ in range(layers)
        ]
        self._changed = [0.0] * layers
        self._tokens = [0] * layers

    def shares(self) -> tuple[float, ...]:
        """The share of tokens in each layer."""
        pairs = zip(self._changed, self._tokens, strict=True)
        return tuple(changed / max(tokens, 1) for changed, tokens in pairs)

    def note(self, layer: int, model: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A forward pre-hook for the experts of ``layer`` of the first or second ``model``."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            both = self._waiting[layer]
            both[model].append(args[1].cpu())
            while both[0] and both[1]:
                before, after = both[0].popleft(), both[1].popleft()
                self._changed[layer] += share_changed(before, after) * len(before)
                self._tokens[layer] += len(before)

        return hook


@contextmanager
def watching_experts(reference: nn.Module, model: nn.Module) -> Iterator[ChangedExperts]:
    """Count while both models run, batch for batch the same tokens.

    Models without experts, or with another number of such layers, are not counted.
    """
    experts = [list(experts_of(each).values()) for each in (reference, model)]
    layers = len(experts[0]) if len(experts[0]) == len(experts[1]) else 0
    changed = ChangedExperts(layers)
    handles = [
        experts[which][layer].register_forward_pre_hook(changed.note(layer, which))
        for which in range(2)
        for layer in range(layers)
    ]
    try:
        yield changed
    finally:
        for handle in handles:
            handle.remove()

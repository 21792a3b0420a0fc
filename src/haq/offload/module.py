"""What stands in the place of a layer's experts while a model is attached."""

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from haq.offload.executor import Lanes


class OffloadedExperts(nn.Module):
    """A layer's experts on two sides, with the forward signature of those they stand for.

    It has no parameters: what moves, saves or counts a model's tensors does not see the experts.
    So moving, saving and copying are refused, not done by half.

    Args:
        lanes: of the layer.
    """

    is_offloaded_experts = True
    """What `haq.offload.collect` knows it by."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__()
        self._lanes = lanes
        self.num_experts = lanes.weights.num_experts
        self.moving = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, as `Lanes.run`."""
        with torch.no_grad():
            return self._lanes.run(hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        lanes = self._lanes
        return f"num_experts={self.num_experts}, resident={sorted(lanes.residents)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.moving:
            refuse("moved or cast")
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        refuse("saved")

    def _load_from_state_dict(self, *arguments: Any) -> None:
        refuse("loaded into")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refuse("copied")

    def __getstate__(self) -> NoReturn:
        refuse("pickled")


def refuse(what: str) -> NoReturn:
    """Say that something cannot be done to a model whose experts are on two sides."""
    raise RuntimeError(
        f"A model cannot be {what} while an `ExpertOffloader` is attached: its experts are in two "
        "places. Call `detach()` of the offloader first, or leave its `with` block."
    )

"""Which tokens reach which experts: what enters a layer's experts, and what the router chose."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from haq.model.blocks import token_rows
from haq.processes import ALONE, Processes

# Rows are handed out this many at a time, so that what is computed from them stays small.
_CHUNK = 4096


class RoutedInputs:
    """The inputs of a layer's experts with the experts that were chosen, padding left out.

    Args:
        num_experts: E.
        dtype: in which the inputs are kept. They are handed out in float32.
        processes: each of which keeps the inputs of its own batches.
    """

    def __init__(
        self,
        num_experts: int,
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self._num_experts = num_experts
        self._dtype = dtype
        self._hidden: list[Tensor] = []
        self._index: list[Tensor] = []

    def watch(self, args: tuple[Any, ...], mask: Tensor) -> None:
        """Keep what a call of the experts was given: the watcher of `haq.model.trace`."""
        hidden, index = args[:2]
        self._hidden.append(token_rows(hidden, mask).to(self._dtype))
        self._index.append(token_rows(index, mask))

    @property
    def index(self) -> Tensor:
        """The experts of every token, int64 ``[T, A]``."""
        return torch.cat(self._index)

    def tokens_per_expert(self) -> list[int]:
        """How many tokens of all processes chose each expert: E numbers."""
        counts = self.index.reshape(-1).bincount(minlength=self._num_experts + 1)
        self.processes.sum_(counts)
        return [int(count) for count in counts[: self._num_experts]]

    def of_expert(self, expert: int) -> Iterator[Tensor]:
        """The inputs of this process's tokens that chose ``expert``: float32 ``[<= 4096, D]``."""
        for hidden, index in zip(self._hidden, self._index, strict=True):
            rows = hidden[(index == expert).any(-1)]
            yield from (chunk.float() for chunk in rows.split(_CHUNK) if len(chunk))

    def of_any(self, limit: int) -> Tensor:
        """Inputs of ``limit`` tokens or fewer, evenly spread, whatever they chose: ``[T, D]``."""
        return _spread(self._hidden, limit, self.processes)

    def some_of(self, expert: int, limit: int) -> Tensor:
        """Inputs of ``limit`` or fewer of the tokens that chose ``expert``, evenly spread."""
        pairs = zip(self._hidden, self._index, strict=True)
        chosen = [hidden[(index == expert).any(-1)] for hidden, index in pairs]
        return _spread(chosen, limit, self.processes)


def _spread(parts: Sequence[Tensor], limit: int, processes: Processes) -> Tensor:
    """Rows evenly spread over those of all processes, in the order of their ranks."""
    rows = torch.cat(list(parts))
    numbers = processes.counts(len(rows), rows.device)
    total, start = sum(numbers), sum(numbers[: processes.rank])
    count = min(limit, total)
    taken = torch.arange(count, device=rows.device) * total // max(count, 1) - start
    if processes.count == 1:
        return rows[taken].float()
    # The others' rows are zero here, and come with the sum.
    here = (taken >= 0) & (taken < len(rows))
    spread = torch.zeros(count, rows.shape[1], device=rows.device)
    spread[here] = rows[taken[here]].float()
    return processes.sum_(spread)


def share_changed(before: Tensor, after: Tensor) -> float:
    """The share of tokens whose set of experts differs.

    Args:
        before: int64 ``[T, A]``.
        after: int64 ``[T, A]``.

    Examples:
        >>> share_changed(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 1]]))
        0.5
    """
    differ = (before.sort(-1).values != after.sort(-1).values).any(-1)
    return float(differ.float().mean())

"""Several processes that calibrate together: who reads which batch, and sums over all of them.

Every process quantizes the same block. Batches are shared out; what is added up over tokens is
added up over processes, too, so that all of them come to the same decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """One process of several; alone by default, and then everything here does nothing.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.

    Examples:
        >>> Processes(rank=1, count=2).share([10, 11, 12])
        [11, 12]
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_torch(cls) -> "Processes":
        """Those of `torch.distributed`, if it was initialized."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what all have in common."""
        return self.rank == 0

    def slice(self, number: int) -> slice:
        """Which of ``number`` items in a row are those of this process."""
        return slice(
            number * self.rank // self.count,
            number * (self.rank + 1) // self.count,
        )

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process."""
        return items[self.slice(len(items))]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place: in all of them the same bits."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of all processes, element by element, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    def counts(self, number: int, device: torch.device) -> list[int]:
        """A number of each process, by rank."""
        numbers = torch.zeros(self.count, dtype=torch.int64, device=device)
        numbers[self.rank] = number
        return [int(n) for n in self.sum_(numbers)]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()


ALONE = Processes()

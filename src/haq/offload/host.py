"""Tokens and their routing from the GPU to the CPU, and results back: once a layer each way."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the CPU knows of a layer's call.

    Attributes:
        index: int64 ``[T, A]``.
        gates: float ``[T, A]``.
        hidden: float ``[T, D]``; None if nobody asked for it.
    """

    index: Tensor
    gates: Tensor
    hidden: Tensor | None


class HostSide:
    """Staging memory of one device, reused from call to call.

    Args:
        device: the GPU; the CPU if both tiers are one.
        pinned: use pinned memory, from which copies need not wait.
    """

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self._device = device
        self._pinned = pinned and device.type == "cuda"
        self._staging: dict[str, Tensor] = {}

    def fetch(
        self, hidden_states: Tensor, index: Tensor, gates: Tensor, *, routing_only: bool
    ) -> Seen:
        """Routing, and tokens if they are asked for, in the CPU's memory.

        What it returns is overwritten by the next call.
        """
        hidden = None if routing_only else hidden_states.detach()
        index, gates = index.detach(), gates.detach()
        if self._device.type == "cpu":
            return Seen(index, gates, hidden)
        values = {"index": index, "gates": gates, "hidden": hidden}
        copies = {n: self._to_cpu(n, v) for n, v in values.items() if v is not None}
        if self._pinned:  # One wait for all of them.
            torch.cuda.current_stream(self._device).synchronize()
        return Seen(copies["index"], copies["gates"], copies.get("hidden"))

    def bring(self, values: Tensor) -> Tensor:
        """Values of the CPU on the GPU."""
        return values if self._device.type == "cpu" else values.to(self._device)

    def _to_cpu(self, name: str, values: Tensor) -> Tensor:
        if not self._pinned:
            return values.cpu()
        room = self._staging.get(name)
        if room is None or room.numel() < values.numel() or room.dtype != values.dtype:
            with torch.inference_mode(False):  # The next call may be in another mode.
                room = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
            self._staging[name] = room
        copy = room[: values.numel()].view(values.shape)
        return copy.copy_(values, non_blocking=True)

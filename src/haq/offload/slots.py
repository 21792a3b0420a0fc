"""Where experts are on the GPU: residents that stay, and spare slots whose experts come and go.

A slot is filled by a thread of its own on a stream of its own. Two events keep that in order: the
products wait until a slot is filled, the next filling until the products that read it are done.
With ``device="cpu"`` both tiers are one memory: an expert is where it is and filling copies
nothing, but what is resident, spare and evicted follows the same rules.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from haq.offload.weights import ExpertWeights

Key = tuple[int, int]
"""Layer and expert."""


class Slot(Protocol):
    """Room for one expert."""

    @property
    def expert(self) -> Any:
        """What `ExpertWeights.rows` reads."""

    def fill(self, weights: ExpertWeights, expert: int, parts: Sequence[Tensor] | None) -> None:
        """Put an expert in, from ``parts`` if there is a copy of them to copy from."""

    @property
    def filled(self) -> bool:
        """Whether the expert is there already."""

    def wait(self) -> None:
        """Let the products that follow wait for the expert."""

    def done(self) -> None:
        """Let the next filling wait for the products so far."""


class SharedSlot:
    """A slot of a GPU that is the CPU."""

    def __init__(self) -> None:
        self.expert: Any = None
        self.filled = False

    def fill(self, weights: ExpertWeights, expert: int, parts: Sequence[Tensor] | None) -> None:
        self.expert = weights.on_cpu(expert)
        self.filled = True

    def wait(self) -> None:
        pass

    def done(self) -> None:
        pass


class DeviceSlot:
    """A slot in the memory of a device.

    Args:
        room: one of `ExpertWeights.slots`.
        stream: on which it is filled; None where the device has no streams.
    """

    def __init__(self, room: Any, stream: torch.cuda.Stream | None) -> None:
        self.expert = room
        self._stream = stream
        self._ready = None if stream is None else torch.cuda.Event()
        self._used: torch.cuda.Event | None = None
        self._enqueued = False

    def fill(self, weights: ExpertWeights, expert: int, parts: Sequence[Tensor] | None) -> None:
        parts = weights.parts(expert) if parts is None else parts
        with self._on_stream():
            if self._stream is not None and self._used is not None:
                self._stream.wait_event(self._used)
            weights.write(self.expert, parts)
            if self._ready is not None:
                self._ready.record(self._stream)
        self._enqueued = True

    @property
    def filled(self) -> bool:
        return self._enqueued and (self._ready is None or bool(self._ready.query()))

    def wait(self) -> None:
        if self._stream is not None and self._ready is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._ready)

    def done(self) -> None:
        if self._stream is not None:
            self._used = torch.cuda.Event()
            self._used.record(torch.cuda.current_stream(self._stream.device))

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def make_slots(
    weights: ExpertWeights, number: int, device: torch.device, stream: torch.cuda.Stream | None
) -> list[Slot]:
    """Empty slots on a device, in one buffer; where it shares the CPU's memory, none is needed.

    Args:
        weights: of a layer whose experts fit.
        number: of slots.
        device: where.
        stream: on which they are filled; None for the one that computes.
    """
    if _shares_memory(device):
        return [SharedSlot() for _ in range(number)]
    rooms = weights.slots(number, device) if number else []
    return [DeviceSlot(room, stream) for room in rooms]


def _shares_memory(device: torch.device) -> bool:
    return device.type == "cpu"


class SpareSlots:
    """Slots for any expert of any layer; the one that was used least recently makes room.

    Args:
        slots: the room there is.
        layers: whose experts fit into them.
        copies: plain tensors in pinned memory, of the experts that have them.

    Attributes:
        capacity: how many slots there are.
        copied_bytes: that were brought in so far.
        early_used: experts that were brought in before anybody asked, and then were asked for.
        early_wasted: those that made room for others before they were asked for.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        layers: Sequence[ExpertWeights],
        copies: Mapping[Key, tuple[Tensor, ...]],
    ) -> None:
        self._free = list(slots)
        self._layers = layers
        self._copies = copies
        self._held: OrderedDict[Key, tuple[Slot, Future[None]]] = OrderedDict()
        self._busy: set[Key] = set()
        self._copier = ThreadPoolExecutor(1, "haq-copy")
        self._early: set[Key] = set()
        self._failures: list[BaseException] = []
        self.capacity = len(slots)
        self.copied_bytes = self.early_used = self.early_wasted = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def ready(self, key: Key) -> bool:
        """Whether the expert is there, and nobody would have to wait for it."""
        if key not in self._held:
            return False
        slot, filling = self._held[key]
        return filling.done() and filling.exception() is None and slot.filled

    def load_early(self, key: Key) -> None:
        """Begin to bring an expert in that nobody has asked for, and is not there yet.

        Raises:
            RuntimeError: every slot is in use.
        """
        self._load(key)
        self._early.add(key)

    def ask(self, key: Key) -> None:
        """Begin to bring an expert in unless it is there; either way it stays until `release`.

        Raises:
            RuntimeError: every slot is in use.
        """
        if key not in self._held:
            self._load(key)
        self._busy.add(key)

    def _load(self, key: Key) -> None:
        layer, expert = key
        slot = self._room()
        weights, parts = self._layers[layer], self._copies.get(key)
        self._held[key] = slot, self._copier.submit(slot.fill, weights, expert, parts)
        self.copied_bytes += weights.expert_bytes

    def use(self, key: Key) -> Any:
        """An expert for the products that follow; stays until `release`.

        Raises:
            whatever bringing it in raised; the slot is free then. If that was before anybody asked,
            it is tried once more.
        """
        slot, filling = self._held[key]
        try:
            filling.result()
        except BaseException as error:
            early = key in self._early
            self._drop(key)
            if not early:
                raise
            self._failures.append(error)
            self.ask(key)
            return self.use(key)
        slot.wait()
        self._held.move_to_end(key)
        if key in self._early:
            self._early.remove(key)
            self.early_used += 1
        self._busy.add(key)
        return slot.expert

    def release(self, key: Key) -> None:
        """The products that read it are enqueued. Nothing happens if it was released before."""
        if key in self._busy:
            self._busy.discard(key)
            self._held[key][0].done()

    def forget_failures(self) -> list[BaseException]:
        """Free the slots whose filling failed; why, and why what was tried again had failed."""
        failed = {
            key: error
            for key, (_, filling) in self._held.items()
            if filling.done() and (error := filling.exception()) is not None
        }
        for key in failed:
            self._drop(key)
        failures, self._failures = [*self._failures, *failed.values()], []
        return failures

    def _drop(self, key: Key) -> None:
        """Its slot is free again."""
        self._free.append(self._held.pop(key)[0])
        self._busy.discard(key)
        self._waste(key)

    def _waste(self, key: Key) -> None:
        if key in self._early:
            self._early.remove(key)
            self.early_wasted += 1

    def on_their_way(self) -> int:
        """How many copies have not arrived."""
        return sum(not filling.done() for _, filling in self._held.values())

    def forget_counts(self) -> None:
        """Count from zero again."""
        self.copied_bytes = self.early_used = self.early_wasted = 0

    def close(self) -> None:
        """Wait for what is on its way."""
        self._copier.shutdown(wait=True)

    def _room(self) -> Slot:
        if self._free:
            return self._free.pop()
        for key in self._held:
            if key not in self._busy:
                slot, filling = self._held.pop(key)
                if filling.cancel():
                    self.copied_bytes -= self._layers[key[0]].expert_bytes
                self._waste(key)
                return slot
        raise RuntimeError(f"All {self.capacity} spare slots are in use.")

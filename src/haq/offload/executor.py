"""The lanes: a layer's resident experts on the GPU, its cold ones on the CPU at the same time."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from haq.nn.rows import by_expert, weighted_sum
from haq.offload.costs import Costs
from haq.offload.host import HostSide
from haq.offload.meter import Call, Meter
from haq.offload.prefetch import Prefetcher
from haq.offload.schedule import copies_that_pay
from haq.offload.slots import Slot, SpareSlots
from haq.offload.watch import RoutingWatch
from haq.offload.weights import ExpertWeights


@dataclass
class Machine:
    """What all layers share: they run one after the other.

    Attributes:
        device: of the GPU lane.
        costs: which decide what is copied.
        cold: "auto", "cpu" or "gpu", as in `OffloadConfig`.
        spare: slots for experts that come and go; None if there are none.
        host: what brings tokens to the CPU and back.
        meter: what counts.
        watch: what learns.
        prefetcher: what brings experts early; None if that does not pay.
        notes: what did not go as configured.
        lock: one call of one layer at a time, whatever number of threads generates.
        pool: where the CPU's lane runs.
    """

    device: torch.device
    costs: Costs
    cold: str
    spare: SpareSlots | None
    host: HostSide
    meter: Meter
    watch: RoutingWatch
    prefetcher: Prefetcher | None
    notes: list[str]
    lock: threading.RLock = field(default_factory=threading.RLock)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "haq-cpu"))

    def close(self) -> None:
        """Wait for what is under way."""
        self.pool.shutdown(wait=True)
        if self.spare is not None:
            self.spare.close()


@dataclass(frozen=True)
class Share:
    """Some of the chosen experts and their rows.

    Attributes:
        experts: by number, ascending.
        counts: how many rows each has, none of them zero.
        order: int64 ``[S]`` on the CPU: where the rows belong in the routing, flat.
    """

    experts: Sequence[int]
    counts: Sequence[int]
    order: Tensor


class Lanes:
    """One layer.

    Args:
        layer: its number.
        name: of the experts in the model, for messages.
        weights: of the experts.
        residents: those on the GPU, by number.
        machine: what it shares with the other layers.
    """

    def __init__(
        self,
        layer: int,
        name: str,
        weights: ExpertWeights,
        residents: Mapping[int, Slot],
        machine: Machine,
    ) -> None:
        self.layer = layer
        self.name = name
        self.weights = weights
        self.residents = residents
        self.machine = machine

    def run(self, hidden_states: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float ``[T, D]`` on the GPU.
            index: int64 ``[T, A]``, the experts of each token; E stands for none.
            gates: float ``[T, A]``, their weights.

        Returns:
            ``[T, D]`` in the dtype of ``hidden_states``.
        """
        machine = self.machine
        with machine.lock:
            machine.meter.begin(self.layer)
            everything = len(self.residents) == self.weights.num_experts
            seen = machine.host.fetch(hidden_states, index, gates, routing_only=everything)
            order, counts = by_expert(seen.index, self.weights.num_experts)
            machine.watch.note(self.layer, seen.index, seen.gates)
            here, brought, cold = self._divide(order, counts)
            call = Call(
                self.layer, len(index), sum(here.counts), sum(brought.counts), sum(cold.counts)
            )
            rows = self._both(hidden_states, seen.hidden, index.shape[1], here, brought, cold, call)
            machine.meter.add(call)
            total = weighted_sum(rows, self._order(here, brought, cold), gates)
            return total.to(hidden_states.dtype)

    def _divide(self, order: Tensor, counts: Sequence[int]) -> tuple[Share, Share, Share]:
        """Which of the chosen experts are on the GPU, are brought there, and run on the CPU."""
        chosen = [e for e, count in enumerate(counts) if count]
        # Asked once: one that arrives in this moment must not be on neither side, or on both.
        is_here = {e: self._is_here(e) for e in chosen}
        here, cold = ([e for e in chosen if is_here[e] is side] for side in (True, False))
        brought: list[int] = []
        if cold and self.machine.cold != "cpu" and self.machine.spare is not None:
            cold.sort(key=lambda e: -counts[e])
            number = len(cold)
            if self.machine.cold == "auto":
                tokens = [[counts[e] for e in experts] for experts in (here, cold)]
                number = copies_that_pay(tokens[0], tokens[1], self.machine.costs)
            brought, cold = cold[:number], sorted(cold[number:])
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)

        def share(experts: Sequence[int]) -> Share:
            if len(experts) == len(chosen):  # The order of experts is that of the routing, then.
                experts = chosen
            parts = [order[starts[e] : starts[e + 1]] for e in experts]
            positions = order if experts is chosen else torch.cat([order[:0], *parts])
            return Share(experts, [counts[e] for e in experts], positions)

        return share(here), share(brought), share(cold)

    def _is_here(self, expert: int) -> bool:
        spare = self.machine.spare
        return expert in self.residents or (spare is not None and spare.ready((self.layer, expert)))

    def _both(
        self,
        hidden: Tensor,
        hidden_on_cpu: Tensor | None,
        slots: int,
        here: Share,
        brought: Share,
        cold: Share,
        call: Call,
    ) -> Tensor:
        """The rows of all shares, one after the other: float32 ``[S, D]`` on the GPU."""
        future = None
        if cold.experts:
            assert hidden_on_cpu is not None
            future = self._start_cold(hidden_on_cpu, cold, slots)
        try:
            rows = self._on_gpu(hidden, here, brought, slots, call)
            if self.machine.prefetcher is not None:
                self.machine.prefetcher.look_ahead(self.layer)
        except BaseException as error:
            if future is not None:
                future.exception()  # It reads what the next call would overwrite.
            error.add_note(f"In the experts of `{self.name}`. The model can be used on.")
            raise
        if future is not None:
            outputs, call.cpu = self._result(future)
            rows.append(self.machine.host.bring(outputs))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _on_gpu(
        self, hidden: Tensor, here: Share, brought: Share, slots: int, call: Call
    ) -> list[Tensor]:
        """The lane of the GPU. Its products are only enqueued."""
        if not here.experts and not brought.experts:
            return [hidden.new_empty(0, self.weights.hidden, dtype=torch.float32)]
        start = self.machine.meter.mark()
        rows = [self._rows_here(hidden, here, slots)] if here.experts else []
        rows += list(self._rows_brought(hidden, brought, slots))
        call.gpu = start, self.machine.meter.mark()
        return rows

    def _rows_here(self, hidden: Tensor, share: Share, slots: int) -> Tensor:
        keys = [(self.layer, e) for e in share.experts if e not in self.residents]
        with self._in_use(keys) as guests:
            experts = [
                guests[self.layer, e] if e not in self.residents else self.residents[e].expert
                for e in share.experts
            ]
            tokens = self.machine.host.bring(share.order // slots)
            return self.weights.rows(experts, share.counts, hidden, tokens)

    def _rows_brought(self, hidden: Tensor, share: Share, slots: int) -> Iterator[Tensor]:
        """One expert after the other, as they arrive; as many on their way as there are slots."""
        spare = self.machine.spare
        if not share.experts or spare is None:
            return
        keys = [(self.layer, expert) for expert in share.experts]
        positions = share.order.split(list(share.counts))
        started = 0
        try:
            for i, key in enumerate(keys):
                while started < len(keys) and started < i + spare.capacity:
                    spare.ask(keys[started])
                    started += 1
                tokens = self.machine.host.bring(positions[i] // slots)
                yield self.weights.rows([spare.use(key)], [share.counts[i]], hidden, tokens)
                spare.release(key)
        finally:
            for key in keys[:started]:
                spare.release(key)

    @contextmanager
    def _in_use(self, keys: Sequence[tuple[int, int]]) -> Iterator[dict[tuple[int, int], Any]]:
        spare = self.machine.spare
        taken: dict[tuple[int, int], Any] = {}
        try:
            for key in keys:
                assert spare is not None
                taken[key] = spare.use(key)
            yield taken
        finally:
            for key in taken:
                assert spare is not None
                spare.release(key)

    def _start_cold(
        self, hidden: Tensor, share: Share, slots: int
    ) -> "Future[tuple[Tensor, tuple[float, float]]]":
        experts = [self.weights.on_cpu(e) for e in share.experts]
        inference, clock = torch.is_inference_mode_enabled(), self.machine.meter.clock

        def work() -> tuple[Tensor, tuple[float, float]]:
            start = clock()
            # Modes belong to a thread. A tensor of inference mode could not be added to outside.
            with torch.inference_mode(inference), torch.no_grad():
                tokens = share.order // slots
                rows = self.weights.rows(experts, share.counts, hidden, tokens)
            return rows, (start, clock())

        return self.machine.pool.submit(work)

    def _result(
        self, future: "Future[tuple[Tensor, tuple[float, float]]]"
    ) -> tuple[Tensor, tuple[float, float]]:
        try:
            return future.result()
        except Exception as error:
            raise RuntimeError(
                f"An expert of `{self.name}` failed on the CPU: {error} The model can be used on."
            ) from error

    def _order(self, *shares: Share) -> Tensor:
        used = [share.order for share in shares if share.experts]
        order = used[0] if len(used) == 1 else torch.cat(used) if used else shares[0].order
        return self.machine.host.bring(order)

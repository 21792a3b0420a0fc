"""`ExpertOffloader`: what the user holds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from haq.config import OffloadConfig
from haq.devices import checked_device
from haq.model.experts import check_in_one_place
from haq.offload.budget import parse_memory
from haq.offload.build import make_machine, residents_of
from haq.offload.collect import experts_modules
from haq.offload.costs import Costs
from haq.offload.dense import DenseSide
from haq.offload.executor import Lanes, Machine
from haq.offload.measure import measure_costs
from haq.offload.module import OffloadedExperts, refuse
from haq.offload.placement import Placement, place
from haq.offload.plan import known_statistics, make_budget
from haq.offload.rehearsal import rehearse
from haq.offload.report import OffloadReport
from haq.offload.routing import RoutingStatistics
from haq.offload.weights import ExpertWeights, expert_weights

# Where a model keeps its offloader.
_ATTRIBUTE = "_haq_offloader"

_STREAMED = "decoder blocks do not fit: accelerate brings each of their layers when it is called"


class ExpertOffloader:
    """Runs a mixture of experts in two tiers of memory, inside a budget of the GPU's.

    Everything but the experts is on the GPU, and as many of the experts as fit: those that make a
    token fastest. A layer's other experts are computed on the CPU, at the same time as those on the
    GPU; only tokens and results travel. In long prompts, experts with many tokens are copied to the
    GPU where that is faster. The model stays a model of `transformers`: `generate`, batches, beams
    and sampling work as before, and so do threads, one call at a time.

    Args:
        model: a mixture of experts, float or int8, with its weights on the CPU. Only what is in
            ``with``, or between `attach` and `detach`, runs on two sides.
        device: the GPU. With "cpu" both tiers are on the CPU: the same rules, nothing to gain.
        gpu_memory: what the model may use of it, "16GiB" or a number of bytes: weights, keys and
            values of ``config.batch_size`` sequences of ``config.max_length`` tokens, and what is
            needed on the way. Without it, nine tenths of what is free.
        statistics: which experts are chosen how often; from the model's report if haq quantized it,
            else every expert is as likely as another.
        config: what to do; the defaults are recommended.
        costs: seconds of this machine; measured if they are not given, in about a second.

    Attributes:
        placement: which experts will be on the GPU; prints as a table. Nothing has moved when it
            can be read.
        budget: bytes by what they are for.
        costs: what it was decided with.
        statistics: what was given, and what was seen since.

    Raises:
        TypeError: ``model`` is no model of transformers, or an argument is of another type.
        ValueError: there are no experts, the budget is too small (the message says what would fit)
            or cannot be read, the statistics are of another model, or the device is not there.

    Examples:
        >>> with ExpertOffloader(model, gpu_memory="16GiB") as offloader:  # doctest: +SKIP
        ...     model.generate(**inputs)
        ...     print(offloader.report())
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: str | torch.device = "cuda",
        gpu_memory: str | int | None = None,
        statistics: RoutingStatistics | None = None,
        config: OffloadConfig | None = None,
        costs: Costs | None = None,
    ) -> None:
        self.config = OffloadConfig() if config is None else config
        _check_types(model, statistics, self.config, costs)
        self.model, self.device = model, _checked(device)
        parse_memory(self.config.pinned_memory, "pinned_memory", least=0)
        self._modules = experts_modules(model)
        check_in_one_place(model)
        self._weights = [_weights_of(name, m) for name, m in self._modules.items()]
        self._machine: Machine | None = None
        self._last: OffloadReport | None = None
        batch, length = self.config.batch_size, _longest(model, self.config.max_length)
        rehearsal = rehearse(model, batch, length, self._modules)
        top_k = rehearsal.experts_per_token
        self.statistics = known_statistics(model, self._modules, statistics, top_k)
        self.budget = make_budget(
            model,
            self._modules,
            self._weights,
            self.device,
            gpu_memory,
            replace(self.config, max_length=length),
            rehearsal,
        )
        self._dense = DenseSide(model, self.device, streamed=self.budget.streamed)
        self.costs = costs or measure_costs(self._weights[0], self.device, model.dtype, top_k)
        self.placement: Placement = place(
            self.config.placement,
            self.statistics,
            self.costs,
            [each.expert_bytes for each in self._weights],
            self.budget.room_for_experts(self._weights),
        )

    # --- attached or not -------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self._machine is not None

    # Slots are filled by a thread of its own, which is in no mode that the caller may be in.
    @torch.inference_mode(False)
    def attach(self) -> Self:
        """Put the model on two sides. If that fails, the model is as it was.

        Raises:
            RuntimeError: it is attached already, by this or another offloader; or the GPU has less
                memory than the budget.
        """
        if self.attached:
            raise RuntimeError("This `ExpertOffloader` is attached already. Call `detach()` first.")
        check_in_one_place(self.model)
        self._look_again()
        stands: dict[str, OffloadedExperts] = {}
        machine: Machine | None = None
        try:
            machine = make_machine(
                self.device, self.config, self.costs, self.placement, self.statistics, self._weights
            )
            for layer, (name, weights) in enumerate(zip(self._modules, self._weights, strict=True)):
                residents = residents_of(weights, self.placement.resident[layer], self.device)
                stands[name] = OffloadedExperts(Lanes(layer, name, weights, residents, machine))
            for name, stand in stands.items():
                self.model.set_submodule(name, stand)
            self._dense.to_gpu()
        except BaseException as error:
            self._restore(stands)
            if machine is not None:
                machine.close()
            if isinstance(error, torch.OutOfMemoryError):
                raise RuntimeError(
                    f"{self.device} has less memory free than `gpu_memory` says "
                    f"({self.budget}): {error}"
                ) from error
            raise
        self._machine = machine
        for module in self._around_experts():
            # `to`, `half` and the like end here, before the first tensor has moved.
            vars(module)["_apply"] = lambda *_, **__: refuse("moved or cast")
            vars(module)["load_state_dict"] = lambda *_, **__: refuse("loaded into")
        vars(self.model)[_ATTRIBUTE] = self
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        machine.meter.reset()
        return self

    @torch.inference_mode(False)
    def detach(self) -> None:
        """Give the model back as it was: its own modules, on the CPU. `report` still answers."""
        if self._machine is None:
            return
        machine, self._machine = self._machine, None
        with machine.lock:
            self._last = self._report(machine)
            machine.close()
            for module in self._around_experts():
                vars(module).pop("_apply", None)
                vars(module).pop("load_state_dict", None)
            vars(self.model).pop(_ATTRIBUTE, None)
            stands = {n: self.model.get_submodule(n) for n in self._modules}
            self._restore({n: m for n, m in stands.items() if isinstance(m, OffloadedExperts)})

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    # --- what happened ---------------------------------------------------------------------------

    def report(self) -> OffloadReport:
        """What happened since `attach` or `reset`.

        Raises:
            RuntimeError: it was never attached.
        """
        if self._machine is not None:
            with self._machine.lock:
                return self._report(self._machine)
        if self._last is None:
            raise RuntimeError("There is nothing to report: call `attach()` and run the model.")
        return self._last

    def reset(self) -> None:
        """Start counting anew. `statistics` keeps what it has learned."""
        if self._machine is not None:
            with self._machine.lock:
                self._machine.meter.reset()
                if self._machine.spare is not None:
                    self._machine.spare.forget_counts()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)

    def _report(self, machine: Machine) -> OffloadReport:
        machine.meter.settle()
        spare, prefetcher = machine.spare, machine.prefetcher
        stopped = prefetcher.stopped if prefetcher is not None else ""
        notes = [*machine.notes, *([_STREAMED] if self.budget.streamed else [])]
        notes += [f"prefetching stopped: {stopped}"] if stopped else []
        on_gpu = self.device.type == "cuda"
        return OffloadReport(
            layers=tuple(self._modules),
            resident=tuple(len(experts) for experts in self.placement.resident),
            counts=tuple(machine.meter.counts),
            copied_bytes=0 if spare is None else spare.copied_bytes,
            prefetches_used=0 if spare is None else spare.early_used,
            prefetches_wasted=0 if spare is None else spare.early_wasted,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else 0,
            promised_bytes=self.budget.total,
            notes=tuple(notes),
            spans=tuple(machine.meter.spans),
        )

    def _around_experts(self) -> list[nn.Module]:
        """The model, and every module that has experts somewhere in it."""
        names = {""}
        for name in self._modules:
            parts = name.split(".")[:-1]
            names |= {".".join(parts[: i + 1]) for i in range(len(parts))}
        return [self.model.get_submodule(name) for name in sorted(names)]

    def _look_again(self) -> None:
        """The weights of the experts, which may be others than when the plan was made."""
        modules = experts_modules(self.model)
        weights = [_weights_of(name, module) for name, module in modules.items()]
        planned, found = ([each.shape for each in w] for w in (self._weights, weights))
        if list(modules) != list(self._modules) or planned != found:
            raise RuntimeError(
                "The model is not the one that the placement was made for: its experts have other "
                "shapes or dtypes now. Make a new `ExpertOffloader`."
            )
        self._modules, self._weights = modules, weights

    def _restore(self, stands: Mapping[str, OffloadedExperts]) -> None:
        """Everything on the CPU, and the model's own experts."""
        self._dense.to_cpu()
        for name in stands:
            self.model.set_submodule(name, self._modules[name])


def find_offloader(model: PreTrainedModel) -> ExpertOffloader | None:
    """The offloader that is attached to a model; None if there is none.

    Examples:
        >>> model = from_pretrained("mixtral-int8", gpu_memory="16GiB")  # doctest: +SKIP
        >>> print(find_offloader(model).placement)  # doctest: +SKIP
    """
    return getattr(model, _ATTRIBUTE, None)


def _longest(model: PreTrainedModel, length: int) -> int:
    """No sequence is longer than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(length, positions) if isinstance(positions, int) and positions > 0 else length


def _check_types(model: Any, statistics: Any, config: Any, costs: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a `transformers` model, got {type(model).__name__}.")
    for name, value, kind in (
        ("statistics", statistics, RoutingStatistics),
        ("config", config, OffloadConfig),
        ("costs", costs, Costs),
    ):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}.")


def _checked(device: str | torch.device) -> torch.device:
    place = checked_device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f'`device` must be "cuda" or "cpu", got {str(device)!r}.')
    return torch.device("cuda", torch.cuda.current_device()) if str(place) == "cuda" else place


def _weights_of(name: str, module: nn.Module) -> ExpertWeights:
    try:
        return expert_weights(module)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error

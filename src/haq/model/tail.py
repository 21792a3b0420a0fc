"""What a model computes after its blocks, up to its head, as one more block.

Between the last block and the head stands a norm, in some families also a projection, another norm
or a factor. Nothing here knows an architecture by name: the model's own forward runs, with
stand-ins for its blocks that hand on what the last block gave, and one for its head that stops it
there. So no logits are ever computed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.blocks import BlockBatch, BlockCall, BlockInputs
from haq.model.linears import weight_view
from haq.model.stand_ins import StandIn, installed, replaced


class Route:
    """How a model gets from the output of its last block to its head.

    Args:
        model: a model whose blocks are still there.
        blocks: its blocks.
        head: the name of its head.
        wrap: makes what a block returns of hidden states, as in `BlockInputs`.
        batch: hidden states of any block and the model's arguments, to see which modules are used.

    Attributes:
        parts: names of the modules with parameters or buffers of their own that it goes through,
            in order.
        width: D, the channels of the hidden states.

    Raises:
        ValueError: the model does not call its head, or reads its weight by itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        head: str,
        wrap: Callable[[Tensor], Any],
        batch: BlockBatch,
    ) -> None:
        self.model, self.head, self._blocks = model, head, blocks
        self._stand_ins = [_HandsOn(block, wrap) for block in blocks]
        self.width = batch.hidden.shape[-1]
        self.parts: list[str] = []
        self._note_parts(batch)

    @property
    def matrix(self) -> nn.Module:
        """The head: as long as it is float, a linear."""
        return self.model.get_submodule(self.head)

    def run(
        self, hidden: Tensor, arguments: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
    ) -> Tensor:
        """What the head reads: float ``[B, T, K]``.

        Args:
            hidden: float ``[B, T, D]``, what the last block gave.
            arguments: of the model.
            modules: by name, to be used in the place of the model's own.
        """
        self._stand_ins[-1].result = hidden
        try:
            with (
                replaced(self._blocks, self._stand_ins),
                installed(self.model, {**modules, self.head: _Stop()}),
                torch.no_grad(),
            ):
                self.model(**arguments, use_cache=False)
        except _HeadReached as reached:
            inputs = reached.inputs
            if inputs.shape[:-1].numel() == hidden.shape[:-1].numel():
                return inputs.reshape(*hidden.shape[:-1], -1)
        except _HeadRead:
            pass
        finally:
            self._stand_ins[-1].result = None
        raise ValueError(
            f"`{self.head}` must be called as a module, once for every token, to become int8, and "
            f'{type(self.model).__name__} does something else with it. Add "lm_head" to '
            "`exclude` to keep the head float."
        )

    def _note_parts(self, batch: BlockBatch) -> None:
        inside = {id(module) for module in self._blocks.modules()}

        def note(name: str, module: nn.Module, arguments: Any) -> None:
            if name not in self.parts:
                self.parts.append(name)

        handles = [
            module.register_forward_pre_hook(partial(note, name))
            for name, module in self.model.named_modules()
            # Not what the head is in: it would be copied with it.
            if id(module) not in inside
            and not f"{self.head}.".startswith(f"{name}." if name else "")
            and any(True for _ in _own_tensors(module))
        ]
        self._stand_ins[-1].when_called = self.parts.clear
        try:
            self.run(batch.hidden, batch.call.kwargs, {})
        finally:
            for handle in handles:
                handle.remove()
            self._stand_ins[-1].when_called = None


def tail_batches(
    inputs: BlockInputs, batches: Sequence[Mapping[str, Tensor]]
) -> Iterator[BlockBatch]:
    """What a `Tail` is given, batch by batch, when every block has run.

    Args:
        inputs: what came out of the last block, on any device.
        batches: arguments of the model, on its device.
    """
    for hidden, batch, mask in zip(inputs.hidden, batches, inputs.masks, strict=True):
        here = hidden.to(batch["input_ids"].device)
        yield BlockBatch(here, BlockCall((), dict(batch)), mask)


class Tail(nn.Module):
    """A route in float32, as a block: it adds to the hidden states what a part of the head gives.

    With D rows of the head in the place of all, a tail can be looked at, folded into and compared
    as a block can.

    Args:
        route: of a model with its weights in memory. Copied are its parts and D rows of its head.

    Attributes:
        parts: copies of the modules that the route goes through.
        head: a linear with D rows of the head.
    """

    def __init__(self, route: Route) -> None:
        super().__init__()
        self._route = (route,)  # In a tuple, so that `nn.Module` does not look inside.
        modules = [route.model.get_submodule(name) for name in route.parts]
        self.parts = nn.ModuleList(copy.deepcopy(module).float() for module in modules)
        weight = weight_view(route.matrix)
        rows = torch.arange(route.width, device=weight.device) % len(weight)
        self.head = nn.Linear(weight.shape[1], route.width, bias=False, device="meta")
        self.head.weight = nn.Parameter(weight[rows].float(), requires_grad=False)

    def forward(self, hidden: Tensor, **arguments: Tensor) -> Tensor:
        """The hidden states ``[B, T, D]`` with what ``head`` makes of them added."""
        (route,) = self._route
        modules = dict(zip(route.parts, self.parts, strict=True))
        added: Tensor = self.head(route.run(hidden, arguments, modules))
        return hidden + added

    def name_of(self, part: str) -> str:
        """What a module of this tail is called in the model."""
        (route,) = self._route
        _, number, *rest = part.split(".")
        return ".".join([route.parts[int(number)], *rest])


class _HeadReached(Exception):
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class _HeadRead(AttributeError):
    """An error to who reads, and nothing special to who only asks whether there is something."""


class _Stop(nn.Module):
    """Stands for the head, and ends the forward when it is called."""

    def forward(self, inputs: Tensor) -> Tensor:
        raise _HeadReached(inputs)

    def __getattr__(self, name: str) -> Any:
        raise _HeadRead(name)


class _HandsOn(StandIn):
    """Stands for a block: returns what it was given, or the result that it is to have."""

    def __init__(self, block: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(block)
        # Behind underscores: the names of a block's own attributes have none.
        self._wrap = wrap
        self.result: Tensor | None = None
        self.when_called: Callable[[], None] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.when_called is not None:
            self.when_called()
        return self._wrap(hidden_states if self.result is None else self.result)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)

"""What happens inside a block in one forward pass: who read which tensor, and what came out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from haq.model.blocks import BlockBatch, run_block, token_rows
from haq.model.linears import is_linear


@dataclass(frozen=True, eq=False)
class Event:
    """One call of one module.

    Attributes:
        name: the module in its block.
        module: the module.
        input: its first argument, float ``[..., K]``.
        output: what it returned, float ``[..., N]``.
    """

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def trace_block(block: nn.Module, batch: BlockBatch) -> list[Event]:
    """Every linear and norm that ran, in order.

    The events hold the tensors, so that no address is used twice: equal addresses mean one tensor.
    """
    events: list[Event] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            events.append(Event(name, module, args[0], output))

    watched = [(n, m) for n, m in block.named_modules() if is_linear(m) or is_norm(m)]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in watched]
    try:
        run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    return events


def is_norm(module: nn.Module) -> bool:
    """Anything that owns one vector ``weight`` and no submodules: LayerNorm and every RMSNorm."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children())


def readers_of_one_tensor(trace: list[Event]) -> list[tuple[str, ...]]:
    """The linears of a trace, those that read the same memory together, in order of their calls."""
    by_memory: dict[tuple[int, int], list[str]] = {}
    for event in trace:
        if is_linear(event.module):
            readers = by_memory.setdefault((event.input.data_ptr(), event.input.numel()), [])
            if event.name not in readers:
                readers.append(event.name)
    return [tuple(names) for names in by_memory.values()]


def observe_inputs(
    block: nn.Module,
    watchers: Mapping[str, Callable[[Tensor], None]],
    batches: Iterable[BlockBatch],
) -> None:
    """Run ``block`` on every batch and hand each watched module's input to its watcher.

    Args:
        block: a decoder block.
        watchers: by module name in the block, what to call with the input's rows ``[tokens, K]``,
            padding left out.
        batches: what to run on.
    """
    mask = Tensor()

    def note(watch: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...]) -> None:
        watch(token_rows(args[0], mask))

    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(note, watch))
        for name, watch in watchers.items()
    ]
    try:
        for batch in batches:
            mask = batch.mask
            run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()

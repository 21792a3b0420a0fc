"""What happens inside a block in one forward pass: who read which tensor, and what came out."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from haq.model.blocks import BlockBatch, run_block, token_rows
from haq.model.experts import dense_layers, is_experts
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


class Trace(list[Event]):
    """What happened in a block, in order.

    Attributes:
        output: what the block gave, float ``[B, T, D]``.
    """

    output: Tensor


def trace_block(block: nn.Module, batch: BlockBatch) -> Trace:
    """Every linear, norm and set of experts that ran, in order; not what is inside of experts.

    The events hold the tensors, so that no address is used twice: equal addresses mean one tensor.
    """
    events = Trace()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            events.append(Event(name, module, args[0], output))

    layers = dense_layers(block)
    watched = [
        (n, m) for n, m in block.named_modules() if n in layers or is_norm(m) or is_experts(m)
    ]
    handles = [module.register_forward_hook(partial(note, name)) for name, module in watched]
    try:
        events.output = run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    return events


def is_norm(module: nn.Module) -> bool:
    """Anything that owns one vector ``weight`` and no submodules: LayerNorm and every RMSNorm."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not list(module.children())


def is_reader(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by matrices that become int8."""
    return is_linear(module) or is_experts(module)


def readers_of_one_tensor(trace: Trace) -> list[tuple[str, ...]]:
    """The readers of a trace, those of the same memory together, in order of their calls."""
    by_memory: dict[tuple[int, int], list[str]] = {}
    for event in trace:
        if is_reader(event.module):
            readers = by_memory.setdefault((event.input.data_ptr(), event.input.numel()), [])
            if event.name not in readers:
                readers.append(event.name)
    return [tuple(names) for names in by_memory.values()]


class _Reached(Exception):
    """Ends a pass through a block where it has come to a module."""

    def __init__(self, first: Tensor) -> None:
        self.first = first


def input_of(block: nn.Module, name: str, batch: BlockBatch) -> Tensor:
    """The `input_rows` of a module's first call. What comes after it in the block does not run."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0])

    handle = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        run_block(block, batch)
    except _Reached as reached:
        return token_rows(reached.first, batch.mask)
    finally:
        handle.remove()
    raise RuntimeError(f"`{name}` ran before, but not in this pass.")


Watcher = Callable[[tuple[Any, ...], Tensor], None]
"""Takes the positional arguments of a module's call and the token mask, bool ``[B, T]``."""


def observe_calls(
    block: nn.Module, watchers: Mapping[str, Watcher], batches: Iterable[BlockBatch]
) -> None:
    """Run ``block`` on every batch and show each watched module's calls to its watcher.

    Where a batch calls each watched module once, the next one runs until all have been called: what
    would come then is not looked at.

    Args:
        block: a decoder block.
        watchers: by module name in the block.
        batches: what to run on.
    """
    masks: list[Tensor] = []
    called: list[str] = []
    each_once = False

    def note(name: str, watch: Watcher, module: nn.Module, args: tuple[Any, ...]) -> None:
        watch(args, masks[-1])
        called.append(name)
        if each_once and sorted(called) == sorted(watchers):
            raise _Reached(args[0])

    handles = [
        block.get_submodule(name).register_forward_pre_hook(partial(note, name, watch))
        for name, watch in watchers.items()
    ]
    try:
        for batch in batches:
            masks[:], called[:] = [batch.mask], []
            with contextlib.suppress(_Reached):
                run_block(block, batch)
            each_once = sorted(called) == sorted(watchers)
    finally:
        for handle in handles:
            handle.remove()


def input_rows(watch: Callable[[Tensor], None]) -> Watcher:
    """A watcher that hands on the rows ``[tokens, K]`` of the first argument, without padding."""
    return lambda args, mask: watch(token_rows(args[0], mask))


def observe_inputs(
    block: nn.Module,
    watchers: Mapping[str, Callable[[Tensor], None]],
    batches: Iterable[BlockBatch],
) -> None:
    """Run ``block`` on every batch and hand each watched module's `input_rows` to its watcher."""
    observe_calls(block, {name: input_rows(watch) for name, watch in watchers.items()}, batches)

"""What the float block computes from a sample: seen once, and kept for all steps that judge by it.

Folding a scale changes nothing of what the block computes. It divides what is between the module
that absorbs it and those that read that, and so does `Sample.fold` with what is kept of it here.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from haq.model.blocks import BlockBatch, first_tensor, map_tensors, run_block, token_rows
from haq.model.experts import ExpertList
from haq.model.folding import num_rows
from haq.model.groups import Group
from haq.model.linears import is_linear
from haq.model.routing import RoutedInputs

# Tokens of a call of a linear that is a scope by itself: so that few can be looked at.
_TOKENS_OF_A_CALL = 256


@dataclass(frozen=True)
class ScopeCall:
    """One call of a scope in float.

    Attributes:
        args: its arguments.
        kwargs: those with names.
        output: ``[..., N]``.
        mask: of the tokens, bool.
        tail: the linear whose outputs are those of the scope, if that is known, else empty.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    mask: Tensor
    tail: str = ""


class Sample:
    """Inputs and outputs of linears, and calls of scopes, float32.

    Args:
        block: a decoder block in float32.
        batches: that it is of.
        linears: names of linears to see.
        scopes: names of scopes to see; a linear may be one.
        experts: by name; what enters them is seen, too.
        step: of the tokens of a batch every so many-th is kept for a linear.

    Attributes:
        batches: that it is of.
        routed: what entered the experts, by name.
    """

    def __init__(
        self,
        block: nn.Module,
        batches: Sequence[BlockBatch],
        linears: Iterable[str],
        scopes: Iterable[str] = (),
        experts: Mapping[str, ExpertList] = MappingProxyType({}),
        step: int = 1,
    ) -> None:
        self._block, self.batches, self._step = block, batches, step
        self.routed = {name: RoutedInputs(len(members)) for name, members in experts.items()}
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in linears}
        others = set(scopes).difference(self._rows)
        self._calls: dict[str, list[ScopeCall]] = {scope: [] for scope in others}
        # By what inputs were divided since, and by what outputs were multiplied: by linear.
        self._divisors: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self, mask: Tensor) -> Iterator[None]:
        """See one pass through the block.

        Args:
            mask: of its batch, bool ``[B, T]``, False at padding.
        """
        reader, module = _Reader(mask, self._step), self._block.get_submodule
        handles = [
            module(name).register_forward_hook(partial(reader.note, name, rows))
            for name, rows in self._rows.items()
        ]
        for name, seen in self.routed.items():
            watch = partial(_enter, seen, mask)
            handles.append(module(name).register_forward_pre_hook(watch))
        for scope, calls in self._calls.items():
            handles.append(_first_call(module(scope), mask, calls, reader.tail))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of_linear(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``[T, K]`` and outputs ``[T, N]`` of a linear, batch by batch, as they are now."""
        divisor, factor = self._divisors.get(name), self._factors.get(name)
        for inputs, outputs in self._rows[name]:
            yield (
                inputs if divisor is None else inputs / divisor,
                outputs if factor is None else outputs * factor,
            )

    def calls_of(self, scope: str) -> list[ScopeCall]:
        """Every call of a scope, as it would be now. If what is kept is outdated, batches run."""
        if scope in self._rows:
            return self._calls_of_linear(scope)
        if scope not in self._calls:
            self._calls[scope] = record_scope(self._block, scope, self.batches)
        return self._calls[scope]

    def fold(self, group: Group, applied: Tensor) -> None:
        """A scale was folded: what this divides is not what was seen.

        Args:
            group: whose scale.
            applied: float32 ``[K]``, what the group's input was divided by.
        """
        producer = group.producer
        assert producer is not None
        self._divisors |= dict.fromkeys(group.consumers, applied)
        module = self._block.get_submodule(producer.name)
        if is_linear(module):
            factor = applied.new_ones(num_rows(module))
            factor[producer.rows] = 1 / applied
            self._factors[producer.name] = factor
        for scope in list(self._calls):
            names = producer.name, *group.readers
            inside = [f"{name}.".startswith(f"{scope}." if scope else "") for name in names]
            if any(inside) and not all(inside):  # The scaled tensor enters or leaves it.
                del self._calls[scope]

    def _calls_of_linear(self, name: str) -> list[ScopeCall]:
        """Rows evenly spread over each batch: some of the calls tell of all tokens."""
        pairs = list(self.of_linear(name))
        if not pairs:
            return []
        inputs, outputs = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        step = -(-len(inputs) // _TOKENS_OF_A_CALL)
        masks = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        return [
            ScopeCall((inputs[i::step],), {}, outputs[i::step], masks[i::step]) for i in range(step)
        ]


class _Reader:
    """Takes rows of a pass; linears that read one tensor share what is kept of it."""

    def __init__(self, mask: Tensor, step: int) -> None:
        self._mask, self._step = mask, step
        # The latest input, held, so that equal addresses mean one tensor.
        self._latest: Tensor | None = None
        self._kept: Tensor | None = None
        # The linear that ran last, and what is kept of its output.
        self._last: tuple[str, Tensor] | None = None

    def note(
        self,
        name: str,
        rows: list[tuple[Tensor, Tensor]],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Tensor,
    ) -> None:
        inputs, latest = args[0], self._latest
        if (
            self._kept is None
            or latest is None
            or latest.data_ptr() != inputs.data_ptr()
            or latest.shape != inputs.shape
        ):
            self._latest, self._kept = inputs, self._some(inputs)
        self._last = name, self._some(output)
        rows.append((self._kept, self._last[1]))

    def tail(self, output: Tensor) -> str:
        """The linear that ran last, if an output is its output; else nothing."""
        if self._last is None or output.shape[-1] != self._last[1].shape[-1]:
            return ""
        name, given = self._last
        return name if torch.equal(self._some(output), given) else ""

    def _some(self, values: Tensor) -> Tensor:
        # A copy: what comes later in the block may write to it.
        return token_rows(values, self._mask)[:: self._step].clone()


def _enter(seen: RoutedInputs, mask: Tensor, module: nn.Module, args: tuple[Any, ...]) -> None:
    seen.watch(args, mask)


def record_scope(block: nn.Module, scope: str, batches: Sequence[BlockBatch]) -> list[ScopeCall]:
    """The scope's first call in each batch; what comes after it in the block does not run."""
    calls: list[ScopeCall] = []
    for batch in batches:
        module = block.get_submodule(scope)
        handles = [_first_call(module, batch.mask, calls), module.register_forward_hook(_stop)]
        try:
            with contextlib.suppress(_Seen):
                run_block(block, batch.float())
        finally:
            for handle in handles:
                handle.remove()
    return calls


class _Seen(Exception):
    """Ends a pass through a block where the scope has run."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Seen


def _first_call(
    module: nn.Module,
    mask: Tensor,
    calls: list[ScopeCall],
    tail: Callable[[Tensor], str] = lambda output: "",
) -> Any:
    """A hook that keeps a module's first call from now on."""
    before = len(calls)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if len(calls) == before:
            copied = partial(map_tensors, torch.clone)
            first = first_tensor(output)
            calls.append(ScopeCall(copied(args), copied(kwargs), copied(first), mask, tail(first)))

    return module.register_forward_hook(note, with_kwargs=True)

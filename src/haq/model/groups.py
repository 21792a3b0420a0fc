"""Which layers of a block share an input, and where the effect of that input can be judged.

Layers that read the same tensor share one scale per input channel and one quantized input: linears,
and all experts of a layer together, with whose router they share it too. They are found by what
happens in a forward pass: equal memory is one tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from haq.model.blocks import BlockBatch
from haq.model.experts import is_experts, routers
from haq.model.folding import Producer
from haq.model.producers import find_producer
from haq.model.trace import Event, is_reader, readers_of_one_tensor, trace_block


@dataclass(frozen=True)
class Group:
    """Linears and experts of one block that read the same tensor.

    Attributes:
        consumers: their names in the block, in the order in which they run.
        routers: names of the modules that read it too and stay float.
        producer: what can absorb the inverse of their input scale; None if nothing can.
        scope: the module whose output shows what the block computes from this input ("" is the
            block itself): the attention for {q, k, v}, the MLP for {gate, up}.
    """

    consumers: tuple[str, ...]
    producer: Producer | None
    scope: str
    routers: tuple[str, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """Everything whose input channels a scale divides."""
        return self.consumers + self.routers


def find_groups(block: nn.Module, batch: BlockBatch) -> list[Group]:
    """Group the linears and experts of ``block`` by what they read, with their producers.

    Args:
        block: a decoder block in float32; left as it was.
        batch: what the block is given for one real batch, in float32.

    Returns:
        Groups in the order in which they run. Linears that never ran are in none, and those inside
        of experts are not looked at.
    """
    trace = trace_block(block, batch)
    groups = []
    for consumers in readers_of_one_tensor(trace):
        routed = any(is_experts(block.get_submodule(name)) for name in consumers)
        floats = tuple(routers(block)) if routed else ()
        producer = find_producer(block, batch, trace, consumers, floats)
        groups.append(Group(consumers, producer, _scope(consumers, trace), floats))
    return groups


def _scope(consumers: tuple[str, ...], trace: Sequence[Event]) -> str:
    """The smallest module around all consumers that is not a linear itself.

    A consumer that runs last in it (o_proj, down_proj) is judged by its own output: running its
    siblings again would change nothing.
    """
    scope = ".".join(_common_start([name.split(".")[:-1] for name in consumers]))
    inside = [event for event in trace if is_reader(event.module) and _within(event.name, scope)]
    return consumers[0] if inside[-1].name == consumers[0] else scope


def _common_start(paths: Sequence[list[str]]) -> list[str]:
    return [step[0] for step in takewhile(lambda s: len(set(s)) == 1, zip(*paths, strict=False))]


def _within(name: str, scope: str) -> bool:
    return scope == "" or name.startswith(f"{scope}.")

"""Modules that stand in the place of others for a while."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn


class StandIn(nn.Module):
    """Looks like a block, for models that read attributes of it before they call it.

    Args:
        block: whose plain attributes (``attention_type``) it has, and nothing else.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, value in vars(block).items():
            if not name.startswith("_") and name != "training":
                object.__setattr__(self, name, value)


@contextmanager
def replaced(blocks: nn.ModuleList, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """The list with every block replaced, for a while."""
    originals = list(blocks)
    try:
        for i, stand_in in enumerate(stand_ins):
            blocks[i] = stand_in
        yield
    finally:
        for i, original in enumerate(originals):
            blocks[i] = original


@contextmanager
def installed(module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A module with some of those inside it replaced, for a while."""
    originals = {name: module.get_submodule(name) for name in modules}
    try:
        for name, other in modules.items():
            module.set_submodule(name, other)
        yield
    finally:
        for name, original in originals.items():
            module.set_submodule(name, original)

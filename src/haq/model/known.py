"""What is known of a decoder layer: its kernels, and which layer is called with its output."""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from haq.model.places import Places
from haq.nn.layer import LayerStep
from haq.nn.several import SeveralSteps

_NAME = "_haq_known"


class Found(NamedTuple):
    """What was found out about a layer.

    Attributes:
        slots: where its modules were then.
        kind: for tokens of this dtype, and so many numbers that rotate them.
        step: its kernels, if they do what the layer does.
        replaced: the modules that these stand in for.
    """

    slots: Places
    kind: tuple[torch.dtype, int] | None
    step: LayerStep | None
    replaced: list[nn.Module]


NOTHING = Found(Places([]), None, None, [])


class Known:
    """What is known of a layer. Copies and pickles of the layer have to find it out.

    Attributes:
        lock: of whoever finds it out.
        found: the latest.
        follower: the layer that was called with this one's output.
        wasted: how often in a row the follower was computed, and then not called so.
        several: the kernels of this layer and those that follow.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found = NOTHING
        self.follower: weakref.ref[nn.Module] | None = None
        self.wasted = 0
        self.several: SeveralSteps | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Known, ()

    def __deepcopy__(self, memo: Any) -> "Known":
        return Known()


def know(layer: nn.Module) -> None:
    """Begin to."""
    vars(layer)[_NAME] = Known()


def known_of(layer: nn.Module) -> Known | None:
    """None if nothing ever will be."""
    return vars(layer).get(_NAME)

"""A model that is looked at while it runs: in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, noise in routers and gradients; each module gets back the mode it was in.

    Not `torch.inference_mode`: what a model computes once and keeps (position tables, packed
    weights) would stay unusable for training.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True

"""Numbers for modules: the compiler can pass a number to an operator, but no packed weight."""

import itertools
import weakref

from torch import nn

_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(module: nn.Module) -> int:
    """A number for ``module``, which lives no longer for it."""
    handle = next(_numbers)
    _modules[handle] = module
    return handle


def registered(handle: int) -> nn.Module:
    """The module that was given this number."""
    return _modules[handle]

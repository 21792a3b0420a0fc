"""What the compiler is told of what it cannot look into.

Modules have numbers: it can pass a number to an operator, but no packed weight.
"""

import itertools
import weakref

import torch
from torch import nn

from haq.int8 import matmul

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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_run() -> bool:
    """`haq.int8.matmul.compiles`; compiled code knows what it was when that was compiled."""
    return matmul.compiles()

"""Modules that compute in another way and are, for whoever looks, what they were.

Such a module has the parameters, the names, the class name and, for ``isinstance``, the class that
it had before; copies and pickles of it are swapped, too. Where another way to compute is not
possible, it computes as before.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn


class Swapped:
    """What a swapped module has before the class that it was: a ``forward`` is to be added.

    Attributes:
        haq_way: the class that was given to `swap`.
        haq_original: the class of before.
    """

    haq_way: type["Swapped"]
    haq_original: type[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        kind = type(self)
        return (_restored, (kind.haq_way, kind.haq_original), *reduced[2:])


def swap(module: nn.Module, way: type[Swapped]) -> None:
    """Let a module compute in another way.

    Args:
        module: any; it must not be swapped.
        way: a `Swapped` with a ``forward`` that calls ``super().forward`` for what it cannot do.
    """
    kind: Any = way
    original: Any = type(module)
    module.__class__ = _swapped_class(kind, original)


def swap_back(module: nn.Module) -> None:
    """Undo `swap`."""
    assert isinstance(module, Swapped)
    module.__class__ = type(module).haq_original


def original_class(module: nn.Module) -> type[Any]:
    """The class of a module, that of before if it is swapped."""
    return type(module).haq_original if isinstance(module, Swapped) else type(module)


def computes(module: nn.Module, x: Tensor) -> bool:
    """Whether a kernel that knows no gradients can do what a module would do with ``x``.

    It cannot in training, under autocast, in compiled code or if dtypes or devices differ.
    """
    return not torch.compiler.is_compiling() and fits(module, x)  # The compiler fuses by itself.


def fits(module: nn.Module, x: Tensor) -> bool:
    """`computes`, for a kernel that the compiler is shown as an operator: in its code, too."""
    parameters = [p for p in module._parameters.values() if p is not None]
    alike = all((p.dtype, p.device) == (x.dtype, x.device) for p in parameters)
    if not alike or torch.is_autocast_enabled(x.device.type):
        return False
    trains = x.requires_grad or any(p.requires_grad for p in parameters)
    return not (trains and torch.is_grad_enabled())


@functools.cache
def _swapped_class(way: Any, original: Any) -> Any:
    names = ("__module__", "__qualname__", "__doc__")
    content = {name: getattr(original, name) for name in names}
    content |= {"haq_way": way, "haq_original": original}
    return type(original.__name__, (way, original), content)


def _restored(way: Any, original: Any) -> Any:
    """An empty module, for copies and pickles."""
    kind = _swapped_class(way, original)
    return kind.__new__(kind)

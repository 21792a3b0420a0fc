"""Triton's kernels on tensors of the CPU: what files named ``interpreted_*.py`` share.

They run in a process of their own, see `tests/int8/test_kernels.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from haq.int8 import cuda, kernels, matmul
from haq.int8.kernels import combine, grouped, linear, tiles, tokens
from haq.int8.kernels import norms as norm_kernels
from haq.nn import norms

BACKEND = matmul.Backend("triton", "cpu", cuda.TritonWeight)

MODULES: list[ModuleType] = [combine, grouped, linear, norm_kernels, tiles, tokens]
"""All that start kernels."""


@contextmanager
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights that are packed here are multiplied by the kernels, and fused norms run by them."""
    monkeypatch.setattr(matmul, "BACKENDS", (*matmul.BACKENDS, BACKEND))
    monkeypatch.setattr(norms, "_DEVICE_TYPES", ("cpu",))
    norms._kernels.cache_clear()
    with matmul.use_backend("triton"):
        assert norms._kernels("cpu") is kernels  # Proved: no later launch is a part of that.
        yield
    norms._kernels.cache_clear()


class Launches:
    """The kernels that were started: by name, with the size of the grid and all that is no tensor.

    Attributes:
        seen: them, in order.
        inside: whether the interpreter is at work, which is no part of what a GPU would do.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.inside = False
        for module in MODULES:
            monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *operands: Any, **options: Any) -> None:
        values = [tuple(v.shape) if torch.is_tensor(v) else v for v in operands]
        self.seen.append((kernel.fn.__name__, grid, *values, *sorted(options.items())))
        self.inside = True
        try:
            with _disable_current_modes():
                kernels.plans.launch(kernel, grid, *operands, **options)
        finally:
            self.inside = False

    @property
    def names(self) -> list[str]:
        return [launch[0].strip("_").removesuffix("_kernel") for launch in self.seen]

    def counts(self) -> dict[str, int]:
        return {name: self.names.count(name) for name in dict.fromkeys(self.names)}


WAITS = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
    "unique2",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
)
"""Operators after which a program knows what a GPU has computed, so that it has waited for it."""


class NothingWaits(TorchDispatchMode):
    """Fails where a program would wait for a GPU, or copy from or to it.

    Everything is on the CPU in these tests, where a copy between devices is none. So tensors that
    are made of numbers, which a GPU would be sent, are refused, too.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and _has_mask(args[1])):
            raise AssertionError(f"{func} is waited for")
        if name in ("lift_fresh", "_to_copy") and _moves(name, kwargs or {}):
            raise AssertionError(f"{func} copies from or to a device")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _moves(name: str, options: dict[str, Any]) -> bool:
    return name == "lift_fresh" or options.get("device") is not None


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """`NothingWaits` but for what the interpreter itself does; no way around the dispatcher."""
    with monkeypatch.context() as patch, NothingWaits():
        launches = Launches(patch)
        for way in ("tolist", "numpy", "item", "cpu", "__array__"):
            patch.setattr(torch.Tensor, way, _refuse(way, launches))
        yield launches


def _refuse(way: str, launches: Launches) -> Callable[..., Any]:
    original = getattr(torch.Tensor, way)

    def refused(*args: Any, **kwargs: Any) -> Any:
        if launches.inside:
            return original(*args, **kwargs)
        raise AssertionError(f"Tensor.{way} is waited for")

    return refused

"""Products of float32 matrices by the library that is the faster one here.

torch multiplies float32 by MKL, which chooses its instructions by the maker of the processor: where
that is not Intel it leaves registers of 512 bits alone. oneDNN, which torch brings, too, looks at
the instructions, and is the faster one there. The choice is made by the kind of processor, not
measured: sums in another order have other last bits, and a job that goes on later is to come to the
same integers.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from haq.quantization import outer

# Products of fewer multiplications take longer to hand over than to compute.
_WORTH_IT = 2**20

# oneDNN compiles a kernel for each number of rows, and of columns, and keeps it: more than half a
# megabyte. So there are few numbers.
_STEP = 64

_CPU_INFO = Path("/proc/cpuinfo")


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 matrices on the CPU take the faster way: a context, and a decorator.

    So do those of `haq.quantization.outer`, layers of many tokens among them.

    Examples:
        >>> with fast_products():
        ...     torch.ones(2, 3) @ torch.ones(3, 2)
        tensor([[3., 3.],
                [3., 3.]])
    """
    ours = _faster_products()
    with outer.in_bfloat16(), _FastProducts(ours) if ours else contextlib.nullcontext():
        yield


_Products = Mapping[Any, Callable[..., Tensor | None]]
"""What computes instead of functions of torch; None of it, where torch is to."""


class _FastProducts(TorchFunctionMode):
    def __init__(self, ours: _Products) -> None:
        super().__init__()
        self._ours = ours

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        ours = self._ours.get(func)
        if ours is not None and not kwargs:
            result = ours(*args)
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``x @ weight.T + bias``, ``x`` ``[..., K]`` and ``weight`` ``[N, K]``; None if not served."""
    if not _served(x, weight, bias):
        return None
    rows = x.reshape(-1, x.shape[-1])
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        _filled(rows, _STEP), _filled(weight, 1), bias, "none", [], ""
    )
    return product[: len(rows)].view(*x.shape[:-1], len(weight))


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`_linear` in bfloat16."""
    if not _served(x, weight, bias):
        return None
    product = outer.linear(x.reshape(-1, x.shape[-1]), weight)
    if product is None:
        return None
    product = product if bias is None else product.add_(bias)
    return product.view(*x.shape[:-1], len(weight))


def _served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    if not all(_plain(tensor) for tensor in given) or weight.dim() != 2 or x.dim() < 2:
        return False
    return x.numel() * len(weight) >= _WORTH_IT


def _filled(matrix: Tensor, step: int) -> Tensor:
    """With zeros, to multiples of ``step`` rows and of `_STEP` columns.

    Parts of wider matrices are copied: oneDNN's product of those is a plain loop.
    """
    rows, columns = -len(matrix) % step, -matrix.shape[1] % _STEP
    if rows or columns:
        return functional.pad(matrix, (0, columns, 0, rows))
    whole = matrix.is_contiguous() or matrix.T.is_contiguous()
    return matrix if whole else matrix.contiguous()


def _matmul(a: Tensor, b: Any) -> Tensor | None:
    return _linear(a, b.T) if isinstance(b, Tensor) and b.dim() == 2 else None


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    product = _matmul(a, b)
    return None if product is None else total.add_(product)


_BY_ONEDNN: _Products = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.addmm_: _addmm,
}


_IN_BFLOAT16: _Products = {functional.linear: _layer}


def _faster_products() -> _Products:
    if _onednn_is_faster():
        return _BY_ONEDNN
    return _IN_BFLOAT16 if outer.is_served_here() else {}


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


@functools.cache
def _onednn_is_faster() -> bool:
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and _maker() not in ("", "GenuineIntel")
    )


def _maker() -> str:
    """Of the processor, where Linux tells."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")

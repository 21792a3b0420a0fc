"""Norms by one kernel, which on a GPU also rounds what they give for the int8 layers behind them.

A norm of `transformers` is half a dozen operations, and on a GPU the layers behind it begin with
one more launch, to round its result. `fuse_norms` makes one of all that. Nothing else changes: see
`haq.nn.swapped`.

What a norm's readers need is seen when they read: for whom nobody rounds, nothing is.
"""

import functools
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from haq.int8 import cuda, matmul
from haq.int8.norm import Norm
from haq.nn.formulas import recognized
from haq.nn.swapped import Swapped, computes, swap, swap_back

# Where the kernels may run.
_DEVICE_TYPES = ("cpu", "cuda")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES_OF_CPU = (torch.bfloat16, torch.float16)

# In how many calls a norm looks for readers before it takes it that there are none.
_TRIALS = 2


@dataclass
class _State:
    """What a fused norm knows beside its parameters.

    Attributes:
        norm: what it computes.
        asked: the kinds of tokens that int8 layers made of its results, as in `leave_tokens`.
        trials: calls after which nobody had asked.
    """

    norm: Norm
    asked: set[bool] = field(default_factory=set)
    trials: int = 0


_STATE = "_haq_norm"


def fuse_norms(model: nn.Module) -> int:
    """Let all norms of a model that are recognized run by one kernel each on a GPU, in place.

    Their results are those of before within a few units of the last place of float32, rounded to
    the model's dtype: sums are taken in another order. The int8 tokens are exactly those of the
    results. `unfuse_norms` undoes it.

    Args:
        model: any module, on any device.

    Returns:
        How many norms are fused.

    Examples:
        >>> model = nn.Sequential(nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8))
        >>> fuse_norms(model)
        1
        >>> isinstance(model[0], nn.RMSNorm), model[0]
        (True, RMSNorm((8,), eps=1e-06, elementwise_affine=True))
    """
    for module in model.modules():
        if not isinstance(module, _FusedNorm):
            norm = recognized(module)
            if norm is not None:
                swap(module, _FusedNorm)
                vars(module)[_STATE] = _State(norm)
    return sum(isinstance(module, _FusedNorm) for module in model.modules())


def formula(module: nn.Module) -> Norm | None:
    """What a fused norm computes; None for any other module."""
    if not isinstance(module, _FusedNorm):
        return None
    state: _State = vars(module)[_STATE]
    return state.norm


def may_run(dtype: torch.dtype) -> bool:
    """Whether there are kernels for the norms of a model of this dtype, on any device here.

    On a CPU there are for 16 bits only: in float32 a sum in another order would be seen.
    """
    return torch.cuda.is_available() or (dtype in _DTYPES_OF_CPU and matmul.compiles())


def unfuse_norms(model: nn.Module) -> None:
    """Undo `fuse_norms`.

    Examples:
        >>> model = nn.Sequential(nn.RMSNorm(8, eps=1e-6))
        >>> _ = fuse_norms(model)
        >>> unfuse_norms(model)
        >>> type(model[0]) is nn.RMSNorm
        True
    """
    for module in model.modules():
        if isinstance(module, _FusedNorm):
            swap_back(module)
            del vars(module)[_STATE]


class _FusedNorm(Swapped):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        if len(args) == 1 and not kwargs and _runs_here(self, args[0]):
            if (kernels := _kernels(args[0].device.type)) is not None:
                return _run(kernels, self, args[0])
            state: _State = vars(self)[_STATE]
            if _runs_on_cpu(state.norm, args[0]):
                return _run_on_cpu(state.norm, self, args[0])
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _kernels(device_type: str) -> ModuleType | None:
    """Triton's kernels, if they are what int8 layers run with on such a device."""
    ones = torch.ones(1, 1, device=device_type)
    if not isinstance(matmul.pack(ones.to(torch.int8), ones), cuda.TritonWeight):
        return None
    from haq.int8 import kernels

    return kernels


def _runs_here(module: nn.Module, x: Any) -> bool:
    """Whether a kernel can do what the module would do with ``x``."""
    if not isinstance(x, Tensor) or x.device.type not in _DEVICE_TYPES or x.dtype not in _DTYPES:
        return False
    weight = module._parameters["weight"]
    assert weight is not None
    return x.shape[-1:] == weight.shape and computes(module, x)


def _runs_on_cpu(norm: Norm, x: Tensor) -> bool:
    known = not norm.centered and x.dtype in _DTYPES_OF_CPU
    return known and x.device.type == "cpu" and matmul.compiles()


def _run_on_cpu(norm: Norm, module: nn.Module, x: Tensor) -> Tensor:
    from haq.int8.llvm import norms

    weight = module._parameters["weight"]
    assert weight is not None
    result: Tensor = norms.norm(x.detach(), norm, weight, module._parameters.get("bias"))
    return result


def _run(kernels: ModuleType, module: nn.Module, x: Tensor) -> Tensor:
    state: _State = vars(module)[_STATE]
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    asked = None
    # What is left for a tensor of inference mode could not be told from what it was before.
    leaves = not (x.is_inference() or torch.is_inference_mode_enabled())
    if leaves and state.asked:
        asked = False not in state.asked
    result: Tensor
    result, tokens = kernels.norm_tokens(x, state.norm, weight, bias, asked)
    if leaves and (state.asked or state.trials < _TRIALS):
        state.trials += not state.asked
        cuda.leave_tokens(result, tokens, state.asked)
    return result

"""Linear layers that a model keeps in bfloat16, its head above all, by one kernel for one token.

Decoding reads the head once per token, and where a model's blocks are int8 that is a large part of
all that is read. torch's product of matrices takes twice as long for one token as the memory does.
In float16 it has a way of its own for one token, and in float32 no cast is in its way.
"""

import torch
from torch import Tensor, nn

from haq.nn.handles import kernels_run
from haq.nn.swapped import Swapped, fits, swap


def use_fast_linears(model: nn.Module) -> int:
    """Let the linear layers of a model that are bfloat16 use haq's kernel for one token, in place.

    That is on a CPU; elsewhere, and for more tokens, they compute what they computed before. Sums
    are taken in float32, in an order of their own, and rounded once.

    Args:
        model: any module, on any device.

    Returns:
        How many layers do.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16))
        >>> use_fast_linears(model)
        1
        >>> isinstance(model[1], nn.Linear), model[1]
        (True, Linear(in_features=8, out_features=8, bias=True))
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            swap(module, _FastLinear)
    return sum(isinstance(module, _FastLinear) for module in model.modules())


class _FastLinear(Swapped):
    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self, nn.Linear)
        result: Tensor
        if _is_one_token(input, self.in_features) and fits(self, input) and kernels_run():
            run = torch.ops.haq.kept_linear if torch.compiler.is_compiling() else _run
            result = run(input, self.weight, self.bias)
        else:
            result = super().forward(input)  # type: ignore[misc]
        return result


def _is_one_token(x: Tensor, size: int) -> bool:
    one = x.dtype == torch.bfloat16 and x.numel() == size
    return one and x.is_cpu and x.dim() > 0 and x.shape[-1] == size


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from haq.int8.llvm import halves

    return halves.linear(x, weight, bias)


@torch.library.custom_op("haq::kept_linear", mutates_args=())
def _kept_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _run(x, weight, bias)


@_kept_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))

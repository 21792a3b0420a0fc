"""Which norm is a module? Told by what it computes: there is no table of architectures.

A copy with random weights is compared, in float64, with the formulas of an RMSNorm and a LayerNorm,
whose weight may be stored as its difference from one; and in bfloat16 with the two places where the
result may be rounded.
"""

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from haq.int8.norm import Norm

# What a module may raise that is no norm of one tensor.
_NOT_A_NORM = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)

# Relative: norms of `transformers` compute in float32 whatever they are given.
_TOLERANCE = 1e-5

# Sums in another order move a few results over a tie of bfloat16. A formula that rounds in another
# place gives another result in a third of all places.
_MOST_OTHERS = 0.02


def recognized(module: nn.Module) -> Norm | None:
    """The formula of a norm; None if it is none, or another one.

    Args:
        module: any module, on any device; it is neither run nor changed.

    Examples:
        >>> recognized(nn.LayerNorm(8))
        Norm(eps=1e-05, centered=True, offset=0, cast_first=False)
        >>> recognized(nn.Linear(8, 8)) is None
        True
    """
    parameters = {name for name, p in module._parameters.items() if p is not None}
    weight = module._parameters.get("weight")
    others = (module._modules, module._buffers, module._forward_hooks, module._forward_pre_hooks)
    if weight is None or weight.dim() != 1 or not parameters <= {"weight", "bias"}:
        return None
    if any(others) or "forward" in vars(module) or not weight.is_floating_point():
        return None
    try:
        twin = copy.deepcopy(module).to_empty(device="cpu").double().eval()
        return _kind(twin)
    except _NOT_A_NORM:
        return None


@torch.no_grad()
def _kind(twin: nn.Module) -> Norm | None:
    """Args: a copy, in float64 on the CPU, whose weights may be lost."""
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight, bias = twin.get_parameter("weight"), twin._parameters.get("bias")
    # Small rows tell eps, and means that are not zero tell whether they are subtracted.
    sizes = torch.tensor([1e-3, 1e-2, 1.0, 30.0], dtype=torch.float64)[:, None]
    x = sizes * (0.5 + torch.randn(4, len(weight), generator=generator).double())
    given = twin(x)
    for kind in _kinds(twin):
        expected = _formula(kind, x, weight, bias, torch.float64)
        if given.shape == x.shape and _close(given, expected):
            break
    else:
        return None
    return _rounding(twin.to(torch.bfloat16), kind, x.to(torch.bfloat16))


def _kinds(module: nn.Module) -> Iterator[Norm]:
    """Any number that the module holds may be its eps."""
    numbers = {value for value in vars(module).values() if isinstance(value, float)}
    for eps, centered, offset in itertools.product(sorted(numbers), (False, True), (0, 1)):
        yield Norm(eps, centered, offset, False)


def _close(given: Tensor, expected: Tensor) -> bool:
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((given - expected).abs() <= _TOLERANCE * size).all())


def _rounding(twin: nn.Module, kind: Norm, x: Tensor) -> Norm | None:
    """The same kind with the place where the copy, which is in bfloat16 now, rounds."""
    given = twin(x)
    weight, bias = twin.get_parameter("weight"), twin._parameters.get("bias")
    for cast_first in (False, True):
        found = Norm(kind.eps, kind.centered, kind.offset, cast_first)
        expected = _formula(found, x.float(), weight.float(), bias, x.dtype)
        others = (given != expected).float().mean()
        if given.dtype == x.dtype and others <= _MOST_OTHERS:
            return found
    return None


def _formula(
    kind: Norm, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    mean = x.mean(-1, keepdim=True) if kind.centered else torch.zeros_like(x[:, :1])
    variance = (x - mean).square().mean(-1, keepdim=True)
    normed = (x - mean) / (variance + kind.eps).sqrt()
    if kind.cast_first:
        normed = normed.to(dtype).to(x.dtype)
    scaled = normed * (kind.offset + weight)
    return (scaled if bias is None else scaled + bias.to(x.dtype)).to(dtype)

"""One view of the modules that multiply by a matrix: `nn.Linear` and GPT-2's `Conv1D`.

Everywhere else in haq a weight is ``[N, K]``: N output channels, K input channels. `Conv1D` stores
the transpose; this is the only file that knows.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from haq.nn.swapped import original_class


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes exactly ``x @ W.T + b`` with a float weight.

    Subclasses that compute something else (adapters, other quantizers' layers) are not linear here:
    replacing them would lose what they add.
    """
    plain = original_class(module).forward in (nn.Linear.forward, Conv1D.forward)
    return plain and weight_of(module).is_floating_point()


def weight_of(module: nn.Module) -> Tensor:
    """The parameter called ``weight``, as it is stored, without its gradient."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data


def weight_view(module: nn.Module) -> Tensor:
    """The weight as ``[N, K]``, sharing memory with the module: writing to it writes to the module.

    Examples:
        >>> weight_view(Conv1D(nf=3, nx=2)).shape
        torch.Size([3, 2])
    """
    weight = weight_of(module)
    return weight.T if isinstance(module, Conv1D) else weight


def bias_view(module: nn.Module) -> Tensor | None:
    """The bias ``[N]`` or None, sharing memory with the module."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.data


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a block by name, in registration order.

    Examples:
        >>> list(linears(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
        ['0', '2']
    """
    return {name: module for name, module in block.named_modules() if is_linear(module)}

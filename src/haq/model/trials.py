"""Do a layer and the kernels in its place compute the same? A few tokens go both ways.

Nearly all numbers have to be the same bits. And the layer's own way must not do one operation more
than is known: what makes no difference now, such as a scale that begins at position 8192, may make
one later.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache

Way = Callable[[Tensor, Tensor, Tensor, Cache], Any]
"""What a layer makes of a token, its rotation's cos and sin, and a cache that takes its keys."""

# Tokens that are compared; the first attends to itself only. In one of them the last bit of a
# router's logit may be another one, and then most numbers are.
_TRIALS, _OFF = 4, 1

# Small, so that what a layer adds to its input is not rounded away, but larger than any eps.
_SPREAD = 0.1

# Of a layer's outputs that may be other bits. A sigmoid's last bit may differ, and move others.
_MOST_OTHERS = 0.05

# Of what a layer adds to a token, relative: that far off all trials may be.
_FARTHEST = 0.05

# What computes nothing, and names that one operation has in several modes of torch.
_NO_COMPUTATION = set(
    "_local_scalar_dense _reshape_alias _to_copy _unsafe_view alias as_strided cat clone copy_ "
    "detach empty empty_like empty_strided expand item lift_fresh narrow new_empty permute reshape "
    "resolve_conj resolve_neg select slice split squeeze t to transpose unsqueeze view".split()
)
_SAME = {
    "_softmax": "softmax",
    "addmm": "linear",
    "div_": "div",
    "matmul": "linear",
    "mm": "linear",
}


def agree(own: Way, fast: Way, x: Tensor, rotation: Tensor, known: Counter[str]) -> bool:
    """Whether two ways give a few random tokens the same, and the first does nothing unknown.

    Args:
        own: the layer's.
        fast: by kernels; a None stands for a way that cannot be gone.
        x: a token, for its shape and dtype.
        rotation: cos, for its shape and dtype.
        known: how often the first may do which of torch's operations more than the second does.
    """
    generator = torch.Generator().manual_seed(0)
    caches = DynamicCache(), DynamicCache()
    off = 0
    for _ in range(_TRIALS):
        token = (_SPREAD * torch.randn(x.shape, generator=generator)).to(x)
        angles = torch.randn(rotation.shape[-1] // 2, generator=generator).repeat(2)
        cos, sin = (part.to(rotation).view(rotation.shape) for part in (angles.cos(), angles.sin()))
        with _Operations() as of_own:
            expected = own(token, cos, sin, caches[0])
        with _Operations() as of_fast:
            found = fast(token, cos, sin, caches[1])
        if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
            return False
        if expected.shape != found.shape:
            return False
        far = (expected.float() - found.float()).norm()
        if not far <= _FARTHEST * (expected.float() - token.float()).norm():
            return False
        off += int((expected != found).float().mean() > _MOST_OTHERS)
    # Of the last trial: in the first one modules may do what they do once.
    return off <= _OFF and not (of_own.counts - of_fast.counts) - known


class _Operations(TorchDispatchMode):
    """Counts torch's operations by name, but for those that compute nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _NO_COMPUTATION:
            self.counts[_SAME.get(name, name)] += 1
        return func(*args, **(kwargs or {}))

"""The experts that one token chose, in one call: both products, the gate, and the weighted sum."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from haq.int8.llvm import weight
from haq.nn.held import tensors_of
from haq.nn.linear import Int8Linear
from haq.nn.rows import Activation, group_of

# Rows that tell one activation from another.
_SAMPLE_ROWS = 4


class ChosenExperts:
    """The chain of kernels for some experts of a layer, and its memory.

    Args:
        pair: the two matrices of any expert, ``[2 I, D]`` and ``[D, I]``, with kernels of LLVM.
        count: how many experts the token chose, A.
        dtype: of the token, one of `haq.int8.llvm.weight.TYPES`.

    Attributes:
        kind: the `kind_of` what it serves.
        tokens: ``[A, D]``, what the kernels read.
        steps: they; the last one is the weighted sum.
    """

    def __init__(self, pair: tuple[Int8Linear, Int8Linear], count: int, dtype: torch.dtype) -> None:
        from haq.int8.llvm import between
        from haq.int8.llvm.chain import Chain

        channels, inner = pair[0].in_features, pair[1].in_features
        self.kind = kind_of(pair, count, dtype)
        self._lock = threading.Lock()
        self.tokens = torch.empty(count, channels, dtype=dtype)
        middle, gated, rows = (torch.empty(count, n) for n in (2 * inner, inner, channels))
        groups = [[group_of(layer)] * count for layer in pair]
        memory = torch.empty(max(map(weight.room, groups)), dtype=torch.uint8)
        self._memory = middle, gated, rows, memory
        room = memory.data_ptr()
        places = (
            (self.tokens.data_ptr(), room, middle.data_ptr()),
            (gated.data_ptr(), room, rows.data_ptr()),
        )
        first, second = zip(groups, ((dtype, torch.float32), (torch.float32,) * 2), strict=True)
        self._products = [
            weight.step(*kind, *at) for kind, at in zip((first, second), places, strict=True)
        ]
        self._sum = between.weighted_step(dtype, rows.data_ptr(), 0, 0, count, channels)
        halves = middle.data_ptr(), middle[:, inner:].data_ptr()
        gate = between.gate_step(torch.float32, *halves, gated.data_ptr(), count, inner, 2 * inner)
        self.steps = [self._products[0], gate, self._products[1], self._sum]
        self._chain = Chain(self.steps)
        self._kinds = [_kinds_of(tensors_of([layer])) for layer in pair]

    def tell(self, pairs: Sequence[tuple[Int8Linear, Int8Linear]]) -> list[Any] | None:
        """Let the steps multiply with these experts, as long as what this gives is held.

        Returns:
            None, and nothing was done, if kernels do not know one of them: a layer may be laid out
            anew at any time.
        """
        held = []
        for layers, kinds in zip(zip(*pairs, strict=True), self._kinds, strict=True):
            tensors = tensors_of(layers)
            if _kinds_of(tensors) != kinds:
                return None
            held.append(tensors)
        for product, tensors in zip(self._products, held, strict=True):
            weight.tell_weights(product, list(zip(*tensors, strict=True)))
        return held

    def run(
        self, pairs: Sequence[tuple[Int8Linear, Int8Linear]], x: Tensor, weights: Tensor
    ) -> Tensor | None:
        """What `haq.nn.rows.one_token` gives, in the token's dtype.

        Args:
            pairs: the two matrices of each expert, as the router names them, A of them.
            x: ``[1, D]``.
            weights: float ``[1, A]``.

        Returns:
            ``[1, D]``; None, and nothing was done, if another thread is in here, or as for `tell`.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self.tokens.copy_(x)
            factors = weights.float().contiguous()
            out = x.new_empty(x.shape)
            held = self.tell(pairs)
            if held is None:
                return None
            self._sum.tell("b", factors.data_ptr(), out.data_ptr())
            self._chain.run()
            del held
            return out
        finally:
            self._lock.release()


def _kinds_of(tensors: list[list[Tensor | None]]) -> list[set[Any]]:
    """The classes of tensors and whether they lie in order; an empty set where there are none."""
    return [set(map(_kind, each)) for each in tensors]


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (type(tensor), tensor.is_contiguous())


def kind_of(pair: tuple[Int8Linear, Int8Linear], count: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What is the same in all calls that one `ChosenExperts` serves."""
    forms = [(layer.asymmetric, layer.bias is None) for layer in pair]
    return count, dtype, *forms


def is_gate(activation: Activation, inner: int) -> bool:
    """Whether an activation is the one that there is a kernel for: ``silu(a) * b`` of halves."""
    generator = torch.Generator().manual_seed(0)
    sample = 4 * torch.randn(_SAMPLE_ROWS, 2 * inner, generator=generator)
    expected = F.silu(sample[:, :inner]) * sample[:, inner:]
    found = activation(sample)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)

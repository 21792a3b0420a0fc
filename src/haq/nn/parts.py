"""What a decoder layer consists of, and whether there are kernels for all of it."""

from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from haq.int8.llvm.weight import LlvmWeight
from haq.nn.chosen import kind_of
from haq.nn.experts import Int8Experts
from haq.nn.held import tensors_of
from haq.nn.linear import Int8Linear
from haq.nn.norms import formula
from haq.nn.rows import Activation

DTYPES = (torch.bfloat16, torch.float16)
"""Of the tokens that there are kernels for, all that a layer needs."""


@dataclass(frozen=True)
class Gated:
    """A gated block of linear layers: ``down(silu(gate(x)) * up(x))``."""

    gate: Int8Linear
    up: Int8Linear
    down: Int8Linear


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: ``experts(x, *router(x))``, the largest of a softmax.

    Attributes:
        router: has a weight ``[E, D]``, and nothing else.
        experts: with a gate by silu.
        activation: theirs, which that is.
        slots: experts of a token, A.
        normed: whether the scores of those that are chosen are divided by their sum.
        rounded: whether scores are rounded to the dtype of the token.
    """

    router: nn.Module
    experts: Int8Experts
    activation: Activation
    slots: int
    normed: bool
    rounded: bool


@dataclass(frozen=True)
class Parts:
    """What a decoder layer consists of.

    ``y = x + output(attention(...))``, and then ``y + block(second_norm(y))``. The attention has
    rotary embeddings of halves.

    Attributes:
        norms: the one before the attention and the one before the block.
        query: ``[H D, K]``.
        key: ``[G D, K]``.
        value: ``[G V, K]``.
        output: ``[K, H V]``.
        head_norms: of queries and of keys, of each head or of all at once; or none.
        block: None if it is of another kind.
        size: D.
        scale: of the scores.
    """

    norms: tuple[nn.Module, nn.Module]
    query: Int8Linear
    key: Int8Linear
    value: Int8Linear
    output: Int8Linear
    head_norms: tuple[nn.Module, ...]
    block: Gated | Mixture | None
    size: int
    scale: float

    @property
    def linears(self) -> list[Int8Linear]:
        block = self.block
        more = [block.gate, block.up, block.down] if isinstance(block, Gated) else []
        return [self.query, self.key, self.value, self.output, *more]

    @property
    def all_norms(self) -> list[nn.Module]:
        return [*self.norms, *self.head_norms]

    @property
    def inner(self) -> int:
        """What is between the products of the gated block, I."""
        return self.block.gate.out_features if isinstance(self.block, Gated) else 0

    @property
    def heads(self) -> int:
        return self.query.out_features // self.size

    @property
    def groups(self) -> int:
        """Heads of keys and values, G."""
        return self.key.out_features // self.size

    @property
    def width(self) -> int:
        """Of a value, V."""
        return self.value.out_features // max(1, self.groups)

    def is_as_before(self) -> bool:
        """Whether experts still have the activation that they were recognized by."""
        return not isinstance(self.block, Mixture) or (
            self.block.experts.activation is self.block.activation
        )


class Held:
    """All tensors that kernels read of a layer's parts, looked up for each token.

    None of them is held here: others may let them go.

    Args:
        parts: of the layer. Which experts of a mixture are read is not known before.
    """

    def __init__(self, parts: Parts) -> None:
        self._linears = parts.linears
        self._parameters: list[Any] = [norm._parameters for norm in parts.all_norms]
        if isinstance(parts.block, Mixture):
            self._parameters.append(parts.block.router._parameters)

    def tensors(self) -> list[Tensor | None]:
        """In the same order each time; less if a layer is laid out for another backend."""
        found = tensors_of(self._linears)
        found += (list(map(_GET, self._parameters, repeat(name))) for name in ("weight", "bias"))
        return list(chain.from_iterable(found))


_GET: Any = dict.get


def fits(parts: Parts, dtype: torch.dtype) -> bool:
    """Whether kernels can do all that a layer does with one token of a dtype, on the CPU."""
    if dtype not in DTYPES or not all(
        isinstance(layer._packed, LlvmWeight) for layer in parts.linears
    ):
        return False
    norms = [formula(module) for module in parts.all_norms]
    if any(norm is None or norm.centered for norm in norms):
        return False
    tensors = [tensor for tensor in Held(parts).tensors() if tensor is not None]
    of_norms = [t for norm in parts.all_norms for t in tensors_of_norm(norm) if t is not None]
    plain = all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors)
    if isinstance(parts.block, Mixture):
        of_norms.append(parts.block.router.get_parameter("weight"))
    alike = all(tensor.dtype == dtype for tensor in of_norms)
    return plain and alike and _shapes_fit(parts)


def _shapes_fit(parts: Parts) -> bool:
    channels, size, inner = parts.query.in_features, parts.size, parts.inner
    heads, groups, width = parts.heads, parts.groups, parts.width
    if not groups or heads % groups:
        return False
    expected = [(heads * size, channels), (groups * size, channels)]
    expected += [(groups * width, channels), (channels, heads * width)]
    if isinstance(parts.block, Gated):
        expected += [(inner, channels), (inner, channels), (channels, inner)]
    given = [(layer.out_features, layer.in_features) for layer in parts.linears]
    of_heads = zip(parts.head_norms, (heads * size, groups * size), strict=False)
    if isinstance(parts.block, Mixture) and not _mixture_fits(parts.block, channels):
        return False
    return (
        given == expected
        and all(len(norm.get_parameter("weight")) == channels for norm in parts.norms)
        and all(len(norm.get_parameter("weight")) in (size, all_) for norm, all_ in of_heads)
    )


def _mixture_fits(mixture: Mixture, channels: int) -> bool:
    experts, weight = mixture.experts, mixture.router.get_parameter("weight")
    pairs = [experts.expert(index) for index in range(experts.num_experts)]
    alike = {kind_of(pair, mixture.slots, weight.dtype) for pair in pairs}
    packed = all(isinstance(layer._packed, LlvmWeight) for pair in pairs for layer in pair)
    up, down = pairs[0]
    shape = (up.out_features, up.in_features) == (2 * down.in_features, channels)
    fit = 0 < mixture.slots <= len(pairs) and weight.shape == (len(pairs), channels)
    return len(alike) == 1 and packed and shape and fit and experts.is_gated_by_silu()


def tensors_of_norm(norm: nn.Module) -> list[Tensor | None]:
    """Its weight and its bias."""
    return [norm._parameters["weight"], norm._parameters.get("bias")]

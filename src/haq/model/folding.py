"""Folding a scale into a block: into what produces a tensor, and inverted into all that read it.

The block computes the same as before, if the producer was found to be one; `same_function` looks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from haq.model.experts import ExpertList, input_matrices, routers
from haq.model.linears import bias_view, is_linear, weight_of, weight_view

# Folding random factors of up to two may change the block's output by this fraction of what the
# block adds to its input, and of its output (the rounding of a large residual stream).
_FOLD_TOLERANCE = 1e-3
_ROUNDING_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Producer:
    """A module whose output channels can be rescaled, and how they reach the group.

    Attributes:
        name: the module in its block.
        rows: int64 ``[K]``; row ``rows[k]`` of the producer feeds input channel ``k`` of the
            consumers. Channels with the same row must share one scale.
        offset: the producer multiplies by ``offset + weight``: 1 for Gemma's norms, else 0.
    """

    name: str
    rows: Tensor
    offset: float = 0.0


@dataclass(frozen=True)
class Folded:
    """A scale that was folded, or factors of rows.

    Attributes:
        applied: float32 ``[K]``: the scale, or factors, that were really applied.
        undo: takes them back.
    """

    applied: Tensor
    undo: Callable[[], None]


def fold(
    block: nn.Module,
    producer: Producer,
    readers: tuple[str, ...],
    scale: Tensor,
    dtype: torch.dtype,
) -> Folded:
    """Divide the readers' input channels by ``scale`` and multiply their weights, in place.

    The producer's parameters will be stored in ``dtype``. A norm's weight is rounded to it here and
    the readers take the factor that was really applied, so that folding into a 16-bit norm is as
    exact as into a 32-bit one.

    It can be taken back bit for bit, but for experts by what is no power of two: a copy of all of a
    layer's would be as large as the layer, so they are divided by what they were multiplied with.

    Args:
        block: a decoder block in float32.
        producer: what makes their input.
        readers: linears, experts and routers of the block that read one tensor.
        scale: float32 ``[K]``, positive, equal where ``producer.rows`` is.
        dtype: the dtype in which the model keeps the producer.
    """
    scaled = _into_producer(block, producer, scale, dtype)
    applied = scaled.applied
    exact = _division_is_exact(applied)
    modules = [block.get_submodule(name) for name in readers]
    divided = [module for module in modules if exact or isinstance(module, ExpertList)]
    restore = keep_parameters(*(module for module in modules if module not in divided))
    for module in modules:
        for matrix in _matrices_of(module, len(applied)):
            matrix.mul_(applied)

    def undo() -> None:
        scaled.undo()
        restore()
        for module in divided:
            for matrix in _matrices_of(module, len(applied)):
                matrix.div_(applied)

    return Folded(applied, undo)


def _into_producer(
    block: nn.Module, producer: Producer, scale: Tensor, dtype: torch.dtype
) -> Folded:
    module = block.get_submodule(producer.name)
    factors = torch.ones(num_rows(module), device=scale.device)
    factors[producer.rows] = 1 / scale
    keep = None if is_linear(module) else dtype
    scaled = scale_rows(module, factors, producer.offset, keep)
    return Folded(1 / scaled.applied[producer.rows], scaled.undo)


def _matrices_of(reader: nn.Module, channels: int) -> list[Tensor]:
    """What multiplies ``channels`` input channels; a router may have other matrices, too."""
    return [matrix for matrix in input_matrices(reader) if matrix.shape[1] == channels]


def _division_is_exact(factors: Tensor) -> bool:
    """Whether it takes a multiplication back to the bit: by powers of two."""
    mantissa, _ = torch.frexp(factors)
    return bool((mantissa == 0.5).all())


def same_function(
    hidden: Tensor, reference: Tensor, output: Tensor, share_of_tokens: float = 1.0
) -> bool:
    """Whether two outputs ``[B, T, D]`` of a block for ``hidden`` differ by rounding only.

    Measured against what the block adds to its input, since a large residual stream would hide an
    error in it.

    Args:
        hidden: what entered the block.
        reference: what came out before.
        output: what came out after.
        share_of_tokens: for this many it must hold, by itself for each. Where tokens choose
            experts, rounding alone can turn a choice that is as good as tied.
    """
    over = None if share_of_tokens == 1 else -1
    difference, added, size = (
        torch.linalg.vector_norm(values, dim=over)
        for values in (output - reference, reference - hidden, reference)
    )
    same = difference <= _FOLD_TOLERANCE * added + _ROUNDING_TOLERANCE * size
    return bool(same.float().mean() >= share_of_tokens)


# Tokens whose two best experts are as good as tied may change them by the rounding of float32: one
# in thousands, but a batch may be short. A scale that does not fold shows in every token.
_SHARE_THAT_KEEPS_EXPERTS = 0.9


def same_in_block(block: nn.Module, hidden: Tensor, reference: Tensor, output: Tensor) -> bool:
    """`same_function`, but that in a block with experts some tokens may turn to others."""
    # Attention is before the router: what is done to it can turn a choice, too.
    share = _SHARE_THAT_KEEPS_EXPERTS if routers(block) else 1.0
    return same_function(hidden, reference, output, share)


def num_rows(module: nn.Module) -> int:
    return len(_rows_view(module))


def _rows_view(module: nn.Module) -> Tensor:
    """The weight with its output channels first: ``[N, K]`` of a linear, ``[N]`` of a norm."""
    return weight_view(module) if is_linear(module) else weight_of(module)


def _scale_rows(
    module: nn.Module, factors: Tensor, offset: float, dtype: torch.dtype | None
) -> Tensor:
    """Multiply output row n by ``factors[n]`` in place; return the factors really applied.

    With ``dtype`` the new weight is rounded to it, and the factor applied is the ratio of the new
    weight to the old. Where a weight is zero there is no ratio, and nothing to rescale but a bias.
    """
    weight = _rows_view(module)
    applied = factors
    if dtype is None:
        by_row = factors[:, None] if weight.dim() == 2 else factors
        weight.add_(offset).mul_(by_row).sub_(offset) if offset else weight.mul_(by_row)
    else:
        multiplier = offset + weight
        weight.copy_(((multiplier * factors) - offset).to(dtype))
        rounded = offset + weight
        exact = (multiplier != 0) & (rounded != 0)
        applied = torch.where(exact, rounded / multiplier, factors)
    bias = bias_view(module)
    if bias is not None:
        bias.mul_(applied)
    return applied


def scale_rows(
    module: nn.Module, factors: Tensor, offset: float, dtype: torch.dtype | None
) -> Folded:
    """`_scale_rows`, so that it can be taken back, bit for bit."""
    if dtype is None and not offset and _division_is_exact(factors):
        applied = _scale_rows(module, factors, offset, dtype)

        def undo() -> None:
            _scale_rows(module, 1 / factors, offset, dtype)

        return Folded(applied, undo)
    restore = keep_parameters(module)
    return Folded(_scale_rows(module, factors, offset, dtype), restore)


def keep_parameters(*modules: nn.Module) -> Callable[[], None]:
    """Remember the modules' parameters; calling what is returned puts them back."""
    kept = [(p, p.data.clone()) for module in modules for p in module.parameters()]

    def restore() -> None:
        for parameter, values in kept:
            parameter.data.copy_(values)

    return restore

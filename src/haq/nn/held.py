"""What kernels read of int8 layers, looked up for each token.

Somebody may load, move or share a tensor at any time. A loop in Python would take longer.
"""

from collections.abc import Iterable
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor

from haq.int8.llvm.weight import LlvmWeight
from haq.nn.linear import Int8Linear

_PACKED, _BUFFERS, _BIAS, _ROW_SUMS = map(itemgetter, ("_packed", "_buffers", "bias", "_row_sums"))
_OF_WEIGHT = [attrgetter(name) for name in ("weight", "scale", "sums")]


def tensors_of(layers: Iterable[Int8Linear]) -> list[list[Tensor | None]]:
    """The tensors of layers, by kind: as `haq.int8.llvm.weight.parts_of` orders those of one.

    Returns:
        A list for each kind, with one tensor of each layer, or None; no lists at all if a layer is
        laid out for another backend.

    Examples:
        >>> import haq
        >>> import torch
        >>> with haq.use_backend("reference"):
        ...     layer = Int8Linear.from_float(torch.ones(2, 2))
        >>> tensors_of([layer])
        []
    """
    held = list(map(vars, layers))
    packed: list[Any] = list(map(_PACKED, held))
    if any(kind is not LlvmWeight for kind in map(type, packed)):
        return []
    found = [list(map(part, packed)) for part in _OF_WEIGHT]
    return [*found, list(map(_BIAS, map(_BUFFERS, held))), list(map(_ROW_SUMS, held))]

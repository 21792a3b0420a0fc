"""Int8 matrices of one shape in one memory, for products that take several of them at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from haq.int8.cuda import TritonWeight
from haq.int8.matmul import use_backend
from haq.nn.linear import Int8Linear

if TYPE_CHECKING:  # Only where Triton's kernels run: nobody else is to wait for their import.
    from haq.int8.kernels import Int8Tokens, Tiles


class Stack:
    """S matrices in one memory; each is an `Int8Linear` as well.

    Attributes:
        layers: the matrices one by one. They are parts of the memory, and what is written to one
            of them is written there.
        weight: int8 ``[S, N, K]``.
        scale: float32 ``[S, N, 1]``.
        bias: float32 ``[S, N]``, or None.
        row_sums: float32 ``[S, N]``, for tokens with a zero point; None where there are none.
    """

    def __init__(
        self,
        layers: Sequence[Int8Linear],
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        row_sums: Tensor | None,
    ) -> None:
        self.layers = list(layers)
        self.weight, self.scale = weight, scale
        self.bias, self.row_sums = bias, row_sums

    @classmethod
    def room(cls, like: Int8Linear, number: int, device: torch.device) -> Self:
        """Room for matrices, each with zero points or not, whatever the one that is shown has.

        Args:
            like: has the shape of all of them.
            number: S.
            device: where.
        """
        rows, columns = like.out_features, like.in_features
        weight = torch.zeros(number, rows, columns, dtype=torch.int8, device=device)
        scale = torch.ones(number, rows, 1, dtype=torch.float32, device=device)
        bias = None if like.bias is None else torch.zeros_like(scale[..., 0])
        layers = [
            Int8Linear(w, s, None if bias is None else bias[i], asymmetric=True)
            for i, (w, s) in enumerate(zip(weight, scale, strict=True))
        ]
        return cls(layers, weight, scale, bias, _stacked_sums(layers))

    @classmethod
    @torch.no_grad()
    @torch.inference_mode(False)  # What is made here is written to later, in whatever mode.
    def of(cls, layers: Sequence[Int8Linear]) -> Self:
        """Bring layers of one shape, multiplied by Triton's kernels, together in one memory.

        Each gives its own memory back before the next one comes, so that there is never more than
        one stack too much.

        Args:
            layers: stay as they are but for where their numbers are.
        """
        first, device = layers[0], layers[0].weight_scale.device
        rows, columns = first.out_features, first.in_features
        weight = torch.empty(len(layers), rows, columns, dtype=torch.int8, device=device)
        scale = torch.empty(len(layers), rows, 1, dtype=torch.float32, device=device)
        bias = None if first.bias is None else torch.empty_like(scale[..., 0])
        for i, layer in enumerate(layers):
            parts = {"weight": weight[i].copy_(layer.weight)}
            parts["weight_scale"] = scale[i].copy_(layer.weight_scale)
            if bias is not None and layer.bias is not None:
                parts["bias"] = bias[i].copy_(layer.bias)
            with use_backend(TritonWeight.backend):
                layer._take(parts, copy=False)
        return cls(layers, weight, scale, bias, _stacked_sums(layers))

    @property
    def grouped(self) -> bool:
        """Whether `product` can be called: Triton's kernels are what multiplies these matrices."""
        return isinstance(self.layers[0]._packed, TritonWeight)

    def product(self, tokens: "Int8Tokens", tiles: "Tiles", **rows: Any) -> Tensor:
        """The products of rows, each with its matrix, and the biases.

        Args:
            tokens: ``[T, K]``.
            tiles: which rows belong to which matrix.
            rows: more about them, and where to write, as for `haq.int8.kernels.grouped_linear`.

        Returns:
            float32 ``[R, N]``.
        """
        from haq.int8 import kernels

        sums = None if tokens.shift is None else self.row_sums
        return kernels.grouped_linear(
            tokens, self.weight, self.scale, tiles, row_sums=sums, bias=self.bias, **rows
        )


def _stacked_sums(layers: Sequence[Int8Linear]) -> Tensor | None:
    """The sums of rows in one memory, of which the layers have parts."""
    sums = [layer._row_sums for layer in layers if layer._row_sums is not None]
    if not sums:
        return None
    stacked = torch.stack(sums)
    for layer, part in zip(layers, stacked, strict=True):
        layer._row_sums = part
    return stacked

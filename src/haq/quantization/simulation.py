"""A float linear as it would be in int8, with a scale that can be changed, to try scales with."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from haq.int8 import grid, matmul
from haq.int8.matrix import quantize_matrix
from haq.model.experts import Expert, ExpertList
from haq.model.linears import bias_view, weight_view
from haq.nn import Int8Linear


def simulated(module: nn.Module) -> nn.Module:
    """A linear, or all experts of a layer with their first linears, to take scales."""
    if not isinstance(module, ExpertList):
        return Simulated(module)
    # One expert's weight at a time: those of all would be half as large as the layer.
    experts = [Expert(e.up_name, Simulated(e.up, keep=False), e.down) for e in module.experts]
    return ExpertList(experts, module.activation)


class Simulated(nn.Module):
    """A linear with its input divided by s, its weight multiplied by s, and both on the grid.

    Where the int8 product is the fast one it is what runs, else float32 with the same values.

    Args:
        linear: the linear in float32.
        keep: make the weight when a scale is taken; if not, in every call, and forget it.
    """

    def __init__(self, linear: nn.Module, *, keep: bool = True) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, not to be a submodule
        self._keep = keep
        self._scale: Tensor | None = None
        self._multiply: Callable[[Tensor], Tensor] | None = None
        self._room: tuple[Tensor, Tensor] | None = None

    def take(self, scale: Tensor) -> None:
        """Have s, float32 ``[K]``, from now on."""
        self._scale = scale
        self._multiply = self._made(scale) if self._keep else None

    def forward(self, inputs: Tensor) -> Tensor:
        assert self._scale is not None
        multiply = self._multiply or self._made(self._scale)
        return multiply(inputs * (1 / self._scale))

    def _made(self, scale: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = weight_view(self._linear[0]), bias_view(self._linear[0])
        if not (weight.is_cpu and matmul.compiles()):
            on_the_grid = grid.fake_quantize_rows_(weight * scale)
            return lambda x: functional.linear(grid.fake_quantize_rows_(x), on_the_grid, bias)
        # Where a scale was tried before, its memory is there already.
        room = quantize_matrix(weight, scale, out=self._room)
        self._room = room if self._keep else None
        last, parts = self._multiply, [*room, *([] if bias is None else [bias])]
        if isinstance(last, Int8Linear) and last.backend == "llvm":
            last.write(parts)
            return last
        return Int8Linear(*parts)


class Projected(nn.Module):
    """A linear whose outputs are seen in some directions only.

    Args:
        linear: the linear in float32.
        directions: float32 ``[D, N]``.
    """

    def __init__(self, linear: nn.Module, directions: Tensor) -> None:
        super().__init__()
        bias = bias_view(linear)
        self._weight = directions @ weight_view(linear)
        self._bias = None if bias is None else directions @ bias

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self._weight, self._bias)

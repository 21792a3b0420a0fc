"""Linears to int8: to nearest by themselves, or together with the Hessian of what they all read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from haq.int8 import grid
from haq.int8.tokens import round_tokens
from haq.model.linears import bias_view, weight_view
from haq.nn import Int8Linear
from haq.quantization.hessian import Root, SecondMoment, triangular_root
from haq.quantization.rounding import round_with_compensation

# Share of the squared error that may be left. It tells most inputs that come out of an activation,
# which leave clearly less, from most others, which are centered and leave nearly all of it.
_WORTH_A_ZERO_POINT = 0.8

# Of a batch, and of the rows of a weight, these are enough to tell, evenly spread: a hundred
# thousand errors.
_TOKENS_FOR_ZERO_POINTS, _ROWS_FOR_ZERO_POINTS = 128, 1024


@dataclass(frozen=True)
class Rounded:
    """Int8 layers by name, and what did not go as configured.

    Attributes:
        modules: the layers; empty if the Hessian was of no use.
        remark: empty if all is well.
    """

    modules: dict[str, Int8Linear] = field(default_factory=dict)
    remark: str = ""


def nearest(linear: nn.Module, asymmetric: bool = False) -> Int8Linear:
    """A linear on the grid by itself."""
    weight, bias = weight_view(linear), bias_view(linear)
    return Int8Linear.from_float(weight, bias, asymmetric=asymmetric)


def round_together(
    linears: Mapping[str, nn.Module],
    moment: SecondMoment,
    damping: float,
    asymmetric: bool = False,
) -> Rounded:
    """Linears that share an input share the root of its Hessian.

    Args:
        linears: by name, float32.
        moment: of their input as the int8 product will see it. Used up: its memory is freed.
        damping: fraction of the Hessian's mean diagonal to start with.
        asymmetric: how their input is rounded.
    """
    found = factored(moment, damping)
    if found.root is None:
        return Rounded(remark=found.remark)
    modules = {n: compensated(m, found.root, asymmetric) for n, m in linears.items()}
    return Rounded(modules, found.remark)


def compensated(linear: nn.Module, root: Root, asymmetric: bool = False) -> Int8Linear:
    """A linear, or some rows of one, rounded with compensation: each row is by itself."""
    weight, bias = weight_view(linear), bias_view(linear)
    scale = grid.row_scale(weight)
    integers = round_with_compensation(weight, scale, root.upper)
    return Int8Linear(integers, scale, bias, asymmetric=asymmetric)


@dataclass(frozen=True)
class Factored:
    """What rounding takes of a Hessian, and what did not go as configured.

    Attributes:
        root: None if the Hessian is of no use.
        remark: empty if all is well.
    """

    root: Root | None
    remark: str = ""


def factored(moment: SecondMoment, damping: float) -> Factored:
    """The root of a Hessian.

    Args:
        moment: of an input as the int8 product will see it. Used up: its memory is freed.
        damping: fraction of the Hessian's mean diagonal to start with.
    """
    hessian = moment.take_mean()
    if not bool(hessian.diagonal().any()):
        return Factored(None, "its input was zero for every token: rounded to nearest")
    root = triangular_root(hessian, damping, use_up=True)
    if root is None:
        return Factored(None, "its Hessian could not be factored: rounded to nearest")
    if root.damping == damping:
        return Factored(root)
    return Factored(root, f"damping raised to {root.damping:g}, diagonal floor {root.floor:g}")


def update_quantized(moment: SecondMoment, inputs: Tensor, asymmetric: bool = False) -> None:
    """Add the tokens of ``inputs`` ``[T, K]`` as the int8 product will see them."""
    rounded = round_tokens(inputs.contiguous(), asymmetric)
    moment.update(rounded.steps(), rounded.scale)


class InputErrors:
    """What rounding the inputs of linears costs them, without a zero point and with one.

    Sums over all tokens and outputs, which of a large batch and of a large weight some tell.

    Args:
        linears: that read the same tensor, float32.
    """

    def __init__(self, linears: Iterable[nn.Module]) -> None:
        self._weights = [_some_rows(weight_view(linear)) for linear in linears]
        self.symmetric = self.asymmetric = 0.0

    def update(self, inputs: Tensor) -> None:
        """Add the tokens of ``inputs``, float32 ``[T, K]``."""
        step = max(1, len(inputs) // _TOKENS_FOR_ZERO_POINTS)
        inputs = inputs[::step].contiguous()
        self.symmetric += step * self._error(round_tokens(inputs).dequantize() - inputs)
        self.asymmetric += step * self._error(round_tokens(inputs, True).dequantize() - inputs)

    def _error(self, difference: Tensor) -> float:
        outputs = ((functional.linear(difference, some), step) for some, step in self._weights)
        return sum(step * float(output.square().sum()) for output, step in outputs)


def _some_rows(weight: Tensor) -> tuple[Tensor, int]:
    """Every n-th, and n. In one piece: products of others are slow."""
    step = max(1, len(weight) // _ROWS_FOR_ZERO_POINTS)
    return weight[::step].contiguous(), step


def zero_point_pays(errors: Iterable[InputErrors]) -> bool:
    """Whether zero points take enough of the error away to be worth an addition per output."""
    errors = list(errors)
    symmetric = sum(error.symmetric for error in errors)
    return sum(error.asymmetric for error in errors) < _WORTH_A_ZERO_POINT * symmetric


class OutputError:
    """|Y' - Y|^2 and |Y|^2 of one layer, summed over tokens.

    Args:
        linear: the float layer.
        module: its int8 version.
    """

    def __init__(self, linear: nn.Module, module: Int8Linear) -> None:
        self._weight, self._bias = weight_view(linear), bias_view(linear)
        self._module = module
        self.error = self.energy = 0.0

    def update(self, inputs: Tensor, exact: Tensor | None = None) -> None:
        """Add the tokens of ``inputs``, float32 ``[T, K]``.

        Args:
            inputs: what the layer reads.
            exact: what it gives, float32 ``[T, N]``; None to compute it.
        """
        if exact is None:
            exact = functional.linear(inputs, self._weight, self._bias)
        self.error += float((self._module(inputs) - exact).square().sum())
        self.energy += float(exact.square().sum())

    def relative(self) -> float:
        """The error as a share of the output; 0 where the output was zero or no token came."""
        return self.error / self.energy if self.energy > 0 else 0.0


def output_error(linear: nn.Module, module: Int8Linear, inputs: Tensor) -> float:
    """`OutputError` of a single batch."""
    error = OutputError(linear, module)
    error.update(inputs)
    return error.relative()

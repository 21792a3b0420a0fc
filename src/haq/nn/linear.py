"""A linear layer whose weight and input are int8 and whose product runs in int8."""

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, Self

import torch
from torch import Tensor, nn

from haq.int8 import matmul
from haq.int8.matrix import quantize_matrix
from haq.int8.tokens import RoundedTokens, row_sums
from haq.nn.handles import register, registered

# What `_set_weight` makes of the weight and nothing else keeps.
_DERIVED = ("_packed", "_row_sums")


class Int8Linear(nn.Module):
    """``nn.Linear`` with an int8 weight, one scale per output channel, and int8 inputs.

    Every token of the input is quantized with a scale of its own as it arrives, the integers are
    multiplied exactly, and the result has the input's dtype: see :mod:`haq.int8.matmul`.

    The weight exists once, in the layout of the product that reads it. Casts (``.half()``,
    ``.to(torch.bfloat16)``) change no dtype in here; moves, copies and pickles work as for any
    module, and the weight is laid out anew where it arrives. On the meta device the layer is a
    shape, to be filled by ``load_state_dict``.

    It does not train: its output is detached from its input, with gradients enabled too, because a
    model that is called without ``torch.no_grad()`` only to predict has to work.

    Args:
        weight: int8 ``[N, K]``.
        weight_scale: float32 ``[N, 1]``, finite and positive.
        bias: float32 ``[N]``, or None.
        asymmetric: give each token a zero point beside its scale, so that 256 integers span its
            range: for inputs that are not centered, such as what an activation gives.

    Attributes:
        in_features: K.
        out_features: N.
        weight_scale: float32 ``[N, 1]``.
        bias: float32 ``[N]``, or None.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another shape, or a scale is not finite and positive.

    Examples:
        >>> layer = Int8Linear(torch.tensor([[127, 1]], dtype=torch.int8), torch.tensor([[0.5]]))
        >>> layer(torch.tensor([[[127.0, -1.0], [0.0, 0.0]]]))
        tensor([[[8064.],
                 [   0.]]])
    """

    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        asymmetric: bool = False,
    ) -> None:
        super().__init__()
        _check(weight, weight_scale, bias)
        self.asymmetric = asymmetric
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight_scale", weight_scale.detach().to(weight.device))
        self.register_buffer("bias", None if bias is None else bias.detach().to(weight.device))
        self._set_weight(weight.detach())

    @classmethod
    def from_float(
        cls, weight: Tensor, bias: Tensor | None = None, *, asymmetric: bool = False
    ) -> Self:
        """Quantize a float weight by rounding to nearest, one scale per output channel.

        Args:
            weight: float ``[N, K]``.
            bias: float ``[N]``, or None.
            asymmetric: as for the class.

        Raises:
            TypeError: a tensor is not float.
            ValueError: the weight is no matrix or empty, or it or the bias holds NaN or infinity.

        Examples:
            >>> layer = Int8Linear.from_float(torch.tensor([[1.27, -0.63]]))
            >>> layer.weight
            tensor([[127, -63]], dtype=torch.int8)
        """
        for name, values in {"weight": weight, "bias": bias}.items():
            if values is not None and not values.is_floating_point():
                raise TypeError(f"`{name}` must be a float tensor, got {values.dtype}.")
        weight = weight.detach()
        _check_matrix("weight", weight)
        integers, scale = quantize_matrix(weight)
        _check_finite("weight", scale, "of its rows")  # As it is where the row is.
        bias = None if bias is None else bias.float()
        return cls(integers, scale, bias, asymmetric=asymmetric)

    @property
    def weight(self) -> Tensor:
        """The weight, int8 ``[N, K]``, to be read only. Where it is packed, a temporary copy."""
        return self._packed.unpack()

    @property
    def backend(self) -> str:
        """Name of the int8 product that this layer runs, as in :func:`haq.int8.matmul.backends`."""
        return self._packed.backend

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Args:
            x: float ``[..., K]``.

        Returns:
            ``[..., N]``, dtype of ``x``, detached from it.

        Raises:
            TypeError: ``x`` is not float.
            ValueError: the last dimension of ``x`` is not K.
        """
        if not x.is_floating_point():
            raise TypeError(f"The input must be a float tensor, got {x.dtype}.")
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(
                f"The input must have shape [..., {self.in_features}] for in_features="
                f"{self.in_features}, got {list(x.shape)}."
            )
        if torch.compiler.is_compiling():
            # An operator of our own costs eager mode tens of microseconds, so only the compiler,
            # which cannot look into packed weights, is shown one.
            compiled: Tensor = torch.ops.haq.int8_linear(
                x.detach(), self._handle, self.out_features
            )
            return compiled
        if x.requires_grad:
            with torch.no_grad():  # Detached, it would be another tensor to each layer.
                return self._linear(x)
        return self._linear(x)

    def _linear(self, x: Tensor) -> Tensor:
        return matmul.linear(x, self._packed, self.bias, self._row_sums)

    def product(self, tokens: RoundedTokens, out: Tensor | None = None) -> Tensor:
        """The product with tokens that `haq.int8.tokens.round_tokens` rounded; without the bias.

        Args:
            tokens: ``[T, K]``, with a shift only if the layer is asymmetric.
            out: float32 ``[T, N]`` to write to.

        Returns:
            float32 ``[T, N]``.
        """
        return matmul.product(tokens, self._packed, self._row_sums, out)

    def parts(self) -> tuple[Tensor, ...]:
        """Everything the product reads, in plain tensors: what `write` takes.

        The weight int8 ``[N, K]``, a copy where it is packed; its scale float32 ``[N, 1]``; the
        bias float32 ``[N]`` and, if asymmetric, the sums of rows float32 ``[N]``.
        """
        return self.weight, *self.vectors()

    def vectors(self) -> list[Tensor]:
        """The `parts` but for the weight."""
        rest = (self.weight_scale, self.bias, self._row_sums)
        return [tensor for tensor in rest if tensor is not None]

    def write(self, parts: Sequence[Tensor]) -> None:
        """Take the numbers of another layer of the same shape, in the memory that this one has.

        An asymmetric layer can become a symmetric one, and one again.

        Args:
            parts: its `parts`, on any device. Copies from pinned memory to a GPU are only enqueued.

        Raises:
            RuntimeError: the backend of this layer keeps its weight in a layout of its own.
        """
        write = getattr(self._packed, "write", None)
        if write is None:
            raise RuntimeError(
                f"A layer of the backend {self.backend!r} cannot be written to: its weight is "
                "packed. Make it under `use_backend` of a backend that keeps weights plain."
            )
        write(parts[0])
        own = self.vectors()
        self.asymmetric = self._row_sums is not None and len(parts) == 1 + len(own)
        if self._row_sums is not None and not self.asymmetric:
            own.pop()
        for tensor, values in zip(own, parts[1:], strict=True):
            tensor.copy_(values, non_blocking=True)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, backend={self.backend}"
            f"{', asymmetric' if self.asymmetric else ''}"
        )

    def _set_weight(self, weight: Tensor) -> None:
        self._packed = matmul.pack(weight.contiguous(), self.weight_scale)
        self._row_sums = row_sums(weight, self.weight_scale) if self.asymmetric else None
        self._handle = register(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move without casting: bfloat16 would cost scale and bias the precision they are for."""
        own_floats = (self.weight_scale, self.bias)
        device = self.weight_scale.device

        def move(tensor: Tensor) -> Tensor:
            if any(tensor is own for own in own_floats):  # Casts leave integers alone.
                return fn(tensor.view(torch.int32)).view(torch.float32)
            return fn(tensor)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.device != device:  # A cast alone must not unpack a whole model.
            self._set_weight(fn(self.weight))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check all parts first, so that a bad checkpoint leaves the layer as it was."""
        outcome = (strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, *outcome)

        names = ["weight", "weight_scale"] + (["bias"] if self.bias is not None else [])
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if strict:
            expected = {prefix + name for name in names}
            missing_keys += sorted(expected.difference(state_dict))
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in expected]
        if not given:
            return
        parts = {name: given[name] if name in given else getattr(self, name) for name in names}
        try:
            _check(**parts, prefix=prefix, shape=(self.out_features, self.in_features))
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        self._take(parts, copy=not local_metadata.get("assign_to_params_buffers", False))

    def _take(self, parts: Mapping[str, Tensor], copy: bool) -> None:
        """Replace what the layer holds. On the meta device it moves to where the parts are."""
        own = self.weight_scale.device
        device = parts["weight"].device if own.type == "meta" else own
        here = {name: part.detach().to(device, copy=copy) for name, part in parts.items()}
        self.weight_scale = here["weight_scale"]
        self.bias = here.get("bias")
        self._set_weight(here["weight"])

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in _DERIVED}
        weight = self.weight
        if get_spawning_popen() is None or weight.device.type != "cpu":
            return {**state, "_weight": weight}
        # A tensor is passed to a new process by the number of an open file, which the next
        # temporary weight gets, too, if this one is gone by then.
        return {**state, "_weight": weight.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        weight = torch.as_tensor(state.pop("_weight"))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers = dict(self._buffers)  # A shallow copy must not keep half of a loaded state.
        self._set_weight(weight)


@torch.library.custom_op("haq::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, handle: int, out_features: int) -> Tensor:
    layer = registered(handle)
    assert isinstance(layer, Int8Linear)
    # A tensor object of its own: compiled code writes to memory that it reuses without a trace.
    return layer._linear(x.detach())


@_int8_linear.register_fake
def _(x: Tensor, handle: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _check(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    prefix: str = "",
    shape: tuple[int, int] | None = None,
) -> None:
    """Raise a TypeError or ValueError that names, after ``prefix``, the part that is wrong."""
    if weight.dtype != torch.int8:
        raise TypeError(f"`{prefix}weight` must be int8, got {weight.dtype}.")
    if shape is not None and weight.shape != shape:
        raise ValueError(
            f"`{prefix}weight` must have shape {list(shape)}, got {list(weight.shape)}."
        )
    _check_matrix(f"{prefix}weight", weight)
    if weight.shape[1] > matmul.MAX_IN_FEATURES:
        raise ValueError(
            f"`{prefix}weight` must have at most {matmul.MAX_IN_FEATURES} in-features, because "
            f"longer sums could leave int32; got {weight.shape[1]}."
        )
    _check_floats(f"{prefix}weight_scale", weight_scale, (len(weight), 1))
    if not weight_scale.is_meta and bool((weight_scale <= 0).any()):
        raise ValueError(
            f"`{prefix}weight_scale` must be positive, got {weight_scale.min().item()}."
        )
    if bias is not None:
        _check_floats(f"{prefix}bias", bias, (len(weight),))


def _check_matrix(name: str, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"`{name}` must be a matrix [out_features, in_features] that is not empty, got shape "
            f"{list(weight.shape)}."
        )


def _check_floats(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if values.dtype != torch.float32:
        raise TypeError(f"`{name}` must be float32, got {values.dtype}.")
    if values.shape != shape:
        raise ValueError(f"`{name}` must have shape {list(shape)}, got {list(values.shape)}.")
    _check_finite(name, values, "of its elements")


def _check_finite(name: str, values: Tensor, counted: str) -> None:
    bad = 0 if values.is_meta else int((~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"`{name}` must be finite, got NaN or infinity in {bad} {counted} "
            f"({values.numel()} in all)."
        )

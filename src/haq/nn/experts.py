"""The experts of a layer with int8 weights and int8 inputs, in the place of transformers' own."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from haq.int8.cuda import TritonWeight, tokens_of, whole
from haq.int8.llvm.weight import TYPES, LlvmWeight
from haq.int8.once import is_captured
from haq.int8.reference import PackedWeight
from haq.nn.chosen import ChosenExperts, is_gate, kind_of
from haq.nn.grouped import Stacks, routed_sum
from haq.nn.handles import kernels_run, register, registered
from haq.nn.linear import Int8Linear
from haq.nn.rows import Activation, by_expert, expert_rows, one_token, weighted_sum
from haq.nn.stack import Stack


class Int8Experts(nn.Module):
    """All experts of a mixture-of-experts layer, each two `Int8Linear`, behind one forward.

    It takes what transformers' fused experts take and gives what they give. Every token is
    quantized once, whatever number of experts reads it; tokens are gathered by expert, and only
    weights of experts that were chosen are touched. Between the two products everything is float32.
    A token's experts are added in the order in which the router names them, and its result does not
    depend on the tokens around it, but for the last bit of a sigmoid: torch computes the end of a
    tensor, or of a thread's share of it, by other code.

    Like `Int8Linear` it does not train, moves and pickles as any module, and is one opaque operator
    to the compiler.

    Where Triton's kernels run, the matrices of all experts are parts of two tensors, and all
    products of a call are two. Nothing waits for the routing then, and a CUDA graph can be replayed
    with another one, once the module was called outside of it.

    Args:
        up: the first matrix of each expert, ``[2 I, D]`` with gate and up rows in the order that
            ``activation`` expects, or ``[I, D]``; symmetric.
        down: the second matrix of each expert, ``[D, I]``; all of them asymmetric, or none.
        activation: from float32 ``[T, 2 I]`` (or ``[T, I]``) to ``[T, I]``; pickles if the module
            is to.

    Attributes:
        num_experts: E.

    Raises:
        ValueError: there are no experts, or the shapes of their matrices do not fit together.

    Examples:
        >>> up = [Int8Linear.from_float(torch.eye(2)), Int8Linear.from_float(torch.ones(2, 2))]
        >>> down = [Int8Linear.from_float(torch.eye(2)) for _ in range(2)]
        >>> experts = Int8Experts(up, down, torch.relu)
        >>> tokens, chosen = torch.tensor([[127.0, -1.0]]), torch.tensor([[1, 0]])
        >>> experts(tokens, chosen, torch.tensor([[0.5, 0.25]]))
        tensor([[94.7500, 63.0000]])
    """

    def __init__(
        self, up: Sequence[Int8Linear], down: Sequence[Int8Linear], activation: Activation
    ) -> None:
        super().__init__()
        _check(up, down)
        self.up = nn.ModuleList(up)
        self.down = nn.ModuleList(down)
        self.activation = activation
        self._handle = register(self)
        self._held: tuple[list[PackedWeight], Stacks] | None = None
        self._gate: tuple[Activation, bool] | None = None
        self._chosen: ChosenExperts | None = None

    @property
    def num_experts(self) -> int:
        return len(self.up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float ``[T, D]``.
            top_k_index: int64 ``[T, A]``, the experts of each token; ``num_experts`` stands for
                none.
            top_k_weights: float ``[T, A]``.

        Returns:
            ``[T, D]``, dtype of ``hidden_states``, detached.

        Raises:
            ValueError: shapes do not fit, or an index is not in [0, num_experts]; where Triton's
                kernels run such an index stands for none, since a look at it would be waited for.
            RuntimeError: a CUDA graph is captured, and the experts were never called outside of it.
        """
        if torch.compiler.is_compiling():
            compiled: Tensor = torch.ops.haq.int8_experts(
                hidden_states.detach(), top_k_index, top_k_weights.detach(), self._handle
            )
            return compiled
        states, gates = (
            given.detach() if given.requires_grad else given
            for given in (hidden_states, top_k_weights)
        )
        return self._compute(whole(hidden_states), states, top_k_index, gates)

    def _compute(
        self, source: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """As `forward`; ``source`` has the hidden states of ``hidden_states``, in any shape."""
        self._check_shapes(hidden_states, top_k_index, top_k_weights)
        dtype, stacks = hidden_states.dtype, self._stacks()
        if stacks is not None:
            rounded = tokens_of(source, False, self)
            return routed_sum(stacks, self.activation, rounded, top_k_index, top_k_weights, dtype)
        if len(hidden_states) == 1 and isinstance(_layer(self.up, 0)._packed, LlvmWeight):
            (named,) = top_k_index.tolist()
            if all(0 <= expert < self.num_experts for expert in named):
                pairs = [self.expert(expert) for expert in named]
                return self._of_one_token(pairs, hidden_states, top_k_weights)
        order, counts = by_expert(top_k_index, self.num_experts)
        chosen = [(self.expert(e), count) for e, count in enumerate(counts) if count]
        experts, rows = [pair for pair, _ in chosen], [count for _, count in chosen]
        tokens = order // top_k_index.shape[1]
        activation = self.activation_on(hidden_states.device)
        outputs = expert_rows(experts, rows, activation, hidden_states, tokens)
        return weighted_sum(outputs, order, top_k_weights).to(dtype)

    def activation_on(self, device: torch.device) -> Activation:
        """The activation, or a kernel for it: on a CPU, where it is ``silu(a) * b``."""
        if device.type == "cpu" and kernels_run() and self.is_gated_by_silu():
            from haq.int8.llvm.between import gated

            return gated
        return self.activation

    def is_gated_by_silu(self) -> bool:
        """Whether experts compute ``down(silu(a) * b)``, a and b the halves of ``up``'s output."""
        inner = _layer(self.down, 0).in_features
        if self._gate is None or self._gate[0] is not self.activation:
            gated = _layer(self.up, 0).out_features == 2 * inner
            self._gate = self.activation, gated and is_gate(self.activation, inner)
        return self._gate[1]

    def _of_one_token(
        self, pairs: list[tuple[Int8Linear, Int8Linear]], hidden_states: Tensor, weights: Tensor
    ) -> Tensor:
        dtype = hidden_states.dtype
        if dtype in TYPES and self.is_gated_by_silu():
            chosen = self._chosen
            if chosen is None or chosen.kind != kind_of(pairs[0], len(pairs), dtype):
                chosen = self._chosen = ChosenExperts(pairs[0], len(pairs), dtype)
            if (result := chosen.run(pairs, hidden_states, weights)) is not None:
                return result
        return one_token(pairs, self.activation, hidden_states, weights).to(dtype)

    def _stacks(self) -> Stacks | None:
        """The matrices of all experts in two tensors; None where no kernel multiplies such.

        Whoever loads or moves them changes the layers one by one. So it is looked at in every call
        whether they are still what was brought together.
        """
        if not isinstance(_layer(self.up, 0)._packed, TritonWeight):
            if self._held is not None:  # To set an attribute of a module takes long.
                self._held = None
            return None
        layers = [[_layer(part, e) for e in range(len(part))] for part in (self.up, self.down)]
        packed = [layer._packed for part in layers for layer in part]
        if self._held is None or self._held[0] != packed:
            if is_captured(layers[0][0].weight_scale):
                raise RuntimeError(
                    "The experts must be called once before a CUDA graph is captured: their "
                    "matrices are brought together in the first call."
                )
            self._held = None
            stacks = Stack.of(layers[0]), Stack.of(layers[1])
            packed = [layer._packed for part in layers for layer in part]
            self._held = packed, stacks
            if stacks[0].weight.is_cuda:  # No other stack fits into the pieces that are free now.
                torch.cuda.empty_cache()
        return self._held[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stacks()  # At once, so that never more than one layer is there twice.
        return self

    def expert(self, index: int) -> tuple[Int8Linear, Int8Linear]:
        """The two matrices of an expert."""
        parts: Any = self._modules  # As `self.up`, which takes microseconds.
        return _layer(parts["up"], index), _layer(parts["down"], index)

    def _check_shapes(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
        expected = _layer(self.up, 0).in_features
        matrices = hidden_states.dim() == index.dim() == 2 and weights.shape == index.shape
        if not matrices or hidden_states.shape != (len(index), expected):
            raise ValueError(
                f"`hidden_states` must have shape [T, {expected}], `top_k_index` and "
                f"`top_k_weights` [T, A], got {list(hidden_states.shape)}, {list(index.shape)} and "
                f"{list(weights.shape)}."
            )

    def extra_repr(self) -> str:
        up, down = _layer(self.up, 0), _layer(self.down, 0)
        return (
            f"num_experts={self.num_experts}, hidden={up.in_features}, inner={down.in_features}, "
            f"backend={up.backend}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_gate": None, "_chosen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = register(self)  # A copy is not the original to the compiler.


def _layer(layers: nn.ModuleList, index: int) -> Int8Linear:
    layer = layers._modules[str(index)]  # As `layers[index]`, which takes microseconds.
    assert isinstance(layer, Int8Linear)
    return layer


def _check(up: Sequence[Int8Linear], down: Sequence[Int8Linear]) -> None:
    pairs = zip(up, down, strict=False)
    shapes = {(u.out_features, u.in_features, d.out_features, d.in_features) for u, d in pairs}
    if len(up) != len(down) or len(shapes) != 1:
        raise ValueError(
            f"`up` and `down` must be one layer for each expert, all of the same shape, got "
            f"{len(up)} and {len(down)} with shapes {sorted(shapes)}."
        )
    if any(layer.asymmetric for layer in up) or len({layer.asymmetric for layer in down}) > 1:
        raise ValueError(
            "`up` must be symmetric layers, and `down` all asymmetric or none, got "
            f"{[layer.asymmetric for layer in up]} and {[layer.asymmetric for layer in down]}."
        )
    ((up_rows, channels, rows, inner),) = shapes
    if rows != channels or up_rows not in (inner, 2 * inner):
        raise ValueError(
            f"`up` must be [2 I, D] or [I, D] for `down` of shape [D, I], got [{up_rows}, "
            f"{channels}] and [{rows}, {inner}]."
        )


@torch.library.custom_op("haq::int8_experts", mutates_args=())
def _int8_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int
) -> Tensor:
    experts = registered(handle)
    assert isinstance(experts, Int8Experts)
    # A tensor object of its own: compiled code writes to memory that it reuses without a trace.
    source = hidden_states.detach()
    return experts._compute(source, hidden_states, top_k_index, top_k_weights)


@_int8_experts.register_fake
def _(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, handle: int) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)  # Rows, however the input is stored.

"""The weights of experts, int8 or float: in the CPU's memory, in slots, and what they compute."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from haq.int8.cuda import tokens_of, whole
from haq.int8.matmul import use_backend
from haq.model.experts import Activation, fused_matrices, is_fused_experts
from haq.nn import Int8Experts, Int8Linear
from haq.nn.grouped import Stacks, member_rows
from haq.nn.rows import expert_rows
from haq.nn.stack import Stack

# What keeps weights as they are on a CPU, so that a slot there can be written to.
_PLAIN = "int_mm"


class ExpertWeights(Protocol):
    """The experts of one layer. What an expert is on a device is known in here only.

    Attributes:
        num_experts: E.
        hidden: D.
        inner: how many float32 numbers a row takes between the two products.
        expert_bytes: of one expert.
        shape: equal for layers that can share slots.
    """

    num_experts: int
    hidden: int
    inner: int
    expert_bytes: int
    shape: tuple[Any, ...]

    def on_cpu(self, expert: int) -> Any:
        """An expert as the model has it. No copy."""

    def parts(self, expert: int) -> tuple[Tensor, ...]:
        """Its plain tensors on the CPU: views, or copies where they are packed."""

    def slots(self, number: int, device: torch.device) -> list[Any]:
        """Room for experts, the same matrix of all of them in one buffer."""

    def write(self, slot: Any, parts: Sequence[Tensor]) -> None:
        """Fill a slot; from pinned memory to a GPU that is only enqueued."""

    def rows(
        self, experts: Sequence[Any], counts: Sequence[int], hidden_states: Tensor, tokens: Tensor
    ) -> Tensor:
        """What experts make of the tokens that chose them.

        Args:
            experts: in the CPU's memory or in slots, all on the device of ``hidden_states``.
            counts: how many rows each has; together S.
            hidden_states: float ``[T, D]``.
            tokens: int64 ``[S]``, the token of each row, sorted by expert.

        Returns:
            float32 ``[S, D]``.
        """


def expert_weights(module: nn.Module) -> ExpertWeights:
    """The experts of a layer of a model.

    Raises:
        ValueError: the module has none that are known, or has them elsewhere than on the CPU.
    """
    if isinstance(module, Int8Experts):
        found: ExpertWeights = Int8Weights(module)
        device = module.expert(0)[0].weight_scale.device
    elif is_fused_experts(module):
        found = FloatWeights(module)
        device = next(module.parameters()).device
    else:
        raise ValueError(f"Experts must be fused ones or `Int8Experts`, got {type(module)}.")
    if device.type != "cpu":
        raise ValueError(
            f"The experts must be in the CPU's memory, got a {type(module).__name__} on {device}. "
            'Load the model with `device_map=None`, or call `model.to("cpu")`.'
        )
    return found


def spare_slots(weights: Sequence[ExpertWeights], wanted: int) -> int:
    """How many slots can take any expert of any layer: none where the layers' shapes differ."""
    return wanted if len({each.shape for each in weights}) == 1 else 0


class Int8Slot(tuple[Int8Linear, Int8Linear]):
    """Room for an expert: its two layers, which are parts of stacks.

    Attributes:
        stacks: the first and the second matrices of all slots that were made together.
        place: of this one in them.
    """

    stacks: Stacks
    place: int

    @classmethod
    def of(cls, stacks: Stacks, place: int) -> Self:
        slot = cls(stack.layers[place] for stack in stacks)
        slot.stacks, slot.place = stacks, place
        return slot


class Int8Weights:
    """Experts of an `Int8Experts`: an expert is a pair of `Int8Linear`.

    Those in slots are computed together, where Triton's kernels run: by two products for all slots
    that were made together.
    """

    def __init__(self, module: Int8Experts) -> None:
        self._module = module
        up, down = module.expert(0)
        self.num_experts = module.num_experts
        self.hidden = up.in_features
        # The first product and the activation of it, then rounded.
        self.inner = up.out_features + 2 * down.in_features
        self.expert_bytes = sum(_bytes_of(layer) for layer in (up, down))
        biases = [layer.bias is not None for layer in (up, down)]
        self.shape = ("int8", up.out_features, self.hidden, down.in_features, *biases)

    def on_cpu(self, expert: int) -> tuple[Int8Linear, Int8Linear]:
        return self._module.expert(expert)

    def parts(self, expert: int) -> tuple[Tensor, ...]:
        up, down = self.on_cpu(expert)
        return (*up.parts(), *down.parts())

    def slots(self, number: int, device: torch.device) -> list[Int8Slot]:
        up, down = self.on_cpu(0)
        plain = use_backend(_PLAIN) if device.type == "cpu" else nullcontext()
        with plain:
            stacks = Stack.room(up, number, device), Stack.room(down, number, device)
        return [Int8Slot.of(stacks, place) for place in range(number)]

    def write(self, slot: tuple[Int8Linear, Int8Linear], parts: Sequence[Tensor]) -> None:
        up, down = slot
        first = 2 + (up.bias is not None)  # It has no zero points.
        up.write(parts[:first])
        down.write(parts[first:])

    def rows(
        self,
        experts: Sequence[tuple[Int8Linear, Int8Linear]],
        counts: Sequence[int],
        hidden_states: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        activation = self._module.activation_on(hidden_states.device)
        members = [(each.stacks, each.place) for each in experts if isinstance(each, Int8Slot)]
        if members and members[0][0][0].grouped:  # All of them are, on a GPU.
            rounded = tokens_of(whole(hidden_states), False, self)
            return member_rows(members, counts, activation, rounded, tokens)
        return expert_rows(experts, counts, activation, hidden_states, tokens)


def _bytes_of(layer: Int8Linear) -> int:
    """Weight, scale, sums of rows, bias."""
    vectors = 2 + (layer.bias is not None)
    return layer.out_features * (layer.in_features + 4 * vectors)


@dataclass(frozen=True, eq=False)
class FloatExpert:
    """Two matrices ``[N, K]`` and their biases ``[N]``, in the dtype of the model."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        parts = (self.up, self.up_bias, self.down, self.down_bias)
        return tuple(tensor for tensor in parts if tensor is not None)


class FloatWeights:
    """Experts of a fused module of transformers, whatever way it lays them out: views of it."""

    def __init__(self, module: nn.Module) -> None:
        self._up, self._up_bias, self._down, self._down_bias = fused_matrices(module)
        self._activation = Activation(module)
        self.num_experts, up_rows, self.hidden = self._up.shape
        self.inner = up_rows + self._down.shape[2]
        first = self.on_cpu(0).tensors()
        self.expert_bytes = sum(tensor.nbytes for tensor in first)
        self.shape = (self._up.dtype, *(tuple(tensor.shape) for tensor in first))

    def on_cpu(self, expert: int) -> FloatExpert:
        parts = (self._up, self._up_bias, self._down, self._down_bias)
        return FloatExpert(*(None if part is None else part[expert] for part in parts))  # type: ignore[arg-type]

    def parts(self, expert: int) -> tuple[Tensor, ...]:
        return self.on_cpu(expert).tensors()

    def slots(self, number: int, device: torch.device) -> list[FloatExpert]:
        parts = (self._up, self._up_bias, self._down, self._down_bias)
        rooms = [
            None if p is None else torch.empty(number, *p.shape[1:], dtype=p.dtype, device=device)
            for p in parts
        ]
        return [
            FloatExpert(*(None if room is None else room[i] for room in rooms))  # type: ignore[arg-type]
            for i in range(number)
        ]

    def write(self, slot: FloatExpert, parts: Sequence[Tensor]) -> None:
        for tensor, values in zip(slot.tensors(), parts, strict=True):
            tensor.copy_(values, non_blocking=True)

    def rows(
        self,
        experts: Sequence[FloatExpert],
        counts: Sequence[int],
        hidden_states: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        outputs = hidden_states.new_empty(len(tokens), self.hidden, dtype=torch.float32)
        start = 0
        for expert, count in zip(experts, counts, strict=True):
            here = slice(start, start + count)
            up = functional.linear(hidden_states[tokens[here]], expert.up, expert.up_bias)
            middle = self._activation(up)
            outputs[here] = functional.linear(middle, expert.down, expert.down_bias)
            start = here.stop
        return outputs

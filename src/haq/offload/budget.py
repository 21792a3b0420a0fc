"""How much memory of the GPU is for what: a promise, made before anything moves."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from accelerate.utils.modeling import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedModel

from haq.model.blocks import find_blocks
from haq.nn import Int8Linear
from haq.offload.weights import ExpertWeights

# What a GPU's libraries take through torch: workspaces of cuBLAS, tables of rotary embeddings.
_LIBRARIES = 128 * 2**20

# Tensors of the size of the hidden states that are alive at the same time in a decoder block, in
# float32: the residual, the norm's output and its float32 copy, q, k, v, their rotated copies, ...
_HIDDEN_TENSORS = 12


@dataclass(frozen=True)
class Budget:
    """Bytes of GPU memory by what they are for.

    Attributes:
        total: what may be used; None if everything fits and nobody set a limit.
        dense: weights of everything but experts, or what is on the GPU of them at a time.
        cache: keys and values of the stated batch at the stated length.
        working: what is alive while a prompt of that length goes through a block.
        spare: slots that experts come into and go from.
        streamed: decoder blocks do not fit either: their weights come from the CPU, each layer's
            when it is called.
    """

    total: int | None
    dense: int
    cache: int
    working: int
    spare: int
    streamed: bool = False

    @property
    def needed(self) -> int:
        """What it takes with no expert resident."""
        return self.dense + self.cache + self.working + self.spare

    @property
    def experts(self) -> int | None:
        """What is left for residents; None is no limit."""
        return None if self.total is None else self.total - self.needed

    def room_for_experts(self, weights: Sequence[ExpertWeights]) -> int:
        """Bytes for residents: what is left, or what all of them take if that is less."""
        everything = sum(each.expert_bytes * each.num_experts for each in weights)
        return everything if self.experts is None else min(everything, self.experts)

    def __str__(self) -> str:
        parts = ("dense", "cache", "working", "spare")
        cells = [f"{name} {format_bytes(getattr(self, name))}" for name in parts]
        if self.experts is not None:
            cells.append(f"experts {format_bytes(max(self.experts, 0))}")
        return ", ".join(cells)


def parse_memory(memory: str | int, name: str = "gpu_memory", least: int = 1) -> int:
    """Bytes of "16GiB", "16GB", "500MB" or a number.

    Args:
        memory: what the user wrote.
        name: of the argument, for messages.
        least: the smallest number of bytes that makes sense.

    Raises:
        TypeError: it is neither a string nor an integer.
        ValueError: it cannot be read, or is smaller than ``least``.

    Examples:
        >>> parse_memory("1.5GiB"), parse_memory("4096")
        (1610612736, 4096)
    """
    if isinstance(memory, bool) or not isinstance(memory, str | int):
        raise TypeError(
            f'`{name}` must be a string such as "16GiB" or a number of bytes, got {memory!r}.'
        )
    try:
        if isinstance(memory, int) or memory.strip().isdecimal():
            size = int(memory)
        else:
            size = convert_file_size_to_int(memory.upper())  # "16gb" would be bits.
    except (ValueError, OverflowError):  # Of "infGB".
        size = least - 1
    if size < least:
        raise ValueError(
            f'`{name}` must be a size such as "16GiB", "500MB" or a number of bytes, at least '
            f"{least}, got {memory!r}."
        )
    return int(size)


def format_bytes(size: float) -> str:
    """Bytes for people.

    Examples:
        >>> format_bytes(1610612736), format_bytes(3000)
        ('1.50 GiB', '2.9 KiB')
    """
    for unit, digits in (("GiB", 2), ("MiB", 1), ("KiB", 1)):
        scale = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[unit]
        if abs(size) >= scale:
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size:.0f} B"


def dense_bytes(model: nn.Module, experts: Iterable[nn.Module]) -> int:
    """Weights and buffers of a model but for its experts; each tensor once."""
    return sum(size for _, size in _sizes(model, experts))


def streamed_bytes(model: PreTrainedModel, experts: Iterable[nn.Module]) -> int | None:
    """What is left of `dense_bytes` if decoder blocks are on the CPU and come layer by layer.

    Everything around the blocks, and twice the largest layer in them: it is copied before it is
    cast. None if there are int8 layers, which accelerate's hooks do not know.
    """
    inside = {id(module) for module in find_blocks(model)[1].modules()}
    around, largest = 0, 0
    for module, size in _sizes(model, experts):
        if id(module) not in inside:
            around += size
        elif isinstance(module, Int8Linear):
            return None
        else:
            largest = max(largest, size)
    return around + 2 * largest


def _sizes(model: nn.Module, experts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, int]]:
    """Every module outside of the experts with the bytes of what is its own."""
    outside = {id(module) for each in experts for module in each.modules()}
    seen: set[int] = set()
    for module in model.modules():
        if id(module) in outside:
            continue
        size = 0
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                size += tensor.nbytes
        if isinstance(module, Int8Linear):  # Its packed weight is no tensor of the module.
            sums_of_rows = 4 * module.asymmetric
            size += module.out_features * (module.in_features + sums_of_rows)
        yield module, size


def working_bytes(
    weights: Sequence[ExpertWeights], tokens: int, batch: int, top_k: int, vocabulary: int
) -> int:
    """An upper estimate of what is alive while a prompt goes through a block, and of its logits.

    Args:
        weights: of all layers.
        tokens: of all sequences of a batch.
        batch: sequences, each of which has logits for its last token.
        top_k: A.
        vocabulary: how many logits a token has.
    """
    hidden = max(each.hidden for each in weights)
    block = 4 * tokens * hidden * _HIDDEN_TENSORS
    # Outputs of the chosen experts, once as they come and once in the order of the router.
    outputs = 2 * 4 * tokens * top_k * hidden
    inner = 4 * min(tokens * top_k, 1024) * max(each.inner for each in weights)
    logits = 2 * 4 * batch * vocabulary
    return block + outputs + inner + logits + _LIBRARIES

"""Int8 weights, plain, multiplied by kernels that LLVM compiles for this processor."""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from haq.int8.llvm.pages import in_large_pages

if TYPE_CHECKING:  # It needs llvmlite.
    from haq.int8.llvm.chain import Step
    from haq.int8.llvm.pieces import Layout

TYPES = {torch.float32, torch.bfloat16, torch.float16}
"""What kernels read and write."""


def check() -> None:
    """Whether kernels can be compiled and run here.

    Raises:
        ImportError: llvmlite is not installed.
        RuntimeError: this processor, or this build of torch, has not what the kernels need.
    """
    try:
        from haq.int8.llvm import compiler
    except ImportError as error:
        raise ImportError('llvmlite is not installed: pip install "haq[cpu]"') from error
    compiler.check()


class LlvmWeight:
    """A plain int8 weight.

    Args:
        weight: int8 ``[N, K]``, contiguous.
        scale: float32 ``[N, 1]``.

    Raises:
        ImportError: llvmlite is not installed.
        RuntimeError: this processor, or this build of torch, has not what the kernels need.
    """

    backend = "llvm"

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        check()
        self.weight, self.scale = in_large_pages(weight), scale
        self.sums = self._row_sums()

    def product(self, rounded: Tensor) -> Tensor:
        ours = [Rows(self, len(rounded))]
        return products(ours, rounded, torch.float32, scaled=False)

    def linear(self, x: Tensor, bias: Tensor | None, row_sums: Tensor | None) -> Tensor:
        """All of `haq.int8.matmul.linear`, in one call.

        Args:
            x: float ``[..., K]``.
            bias: float32 ``[N]``.
            row_sums: float32 ``[N]``, for tokens with a zero point.

        Returns:
            ``[..., N]``, dtype of ``x``.
        """
        ours = [Rows(self, x.numel() // x.shape[-1], bias, row_sums)]
        return products(ours, x, x.dtype)

    def unpack(self) -> Tensor:
        return self.weight

    def write(self, weight: Tensor) -> None:
        """Take the numbers of another weight of the same shape, from any device."""
        self.weight.copy_(weight)
        self.sums = self._row_sums()

    def _row_sums(self) -> Tensor | None:
        """Of the integers, for processors that need unsigned tokens."""
        from haq.int8.llvm import compiler, sums

        return sums.sums_of_rows(self.weight) if compiler.dots_here().unsigned else None


class Rows(NamedTuple):
    """Tokens that one weight is multiplied with.

    Attributes:
        weight: ``[N, K]``.
        tokens: how many.
        bias: float32 ``[N]``.
        row_sums: float32 ``[N]``, for tokens with a zero point.
    """

    weight: LlvmWeight
    tokens: int
    bias: Tensor | None = None
    row_sums: Tensor | None = None


def products(
    groups: Sequence[Rows],
    tokens: Tensor,
    dtype: torch.dtype,
    *,
    scaled: bool = True,
    gated: bool = False,
) -> Tensor:
    """Tokens, each multiplied with its weight.

    What is done in Python here takes as long as the product of a small weight, so it is little.

    Args:
        groups: how many tokens each weight has, one after the other. The weights have one shape;
            all have biases or none, and all have sums of rows or none.
        tokens: float or int8 ``[..., K]``.
        dtype: of the result.
        scaled: whether tokens are rounded, each with a scale of its own. Else they are integers,
            and the sums are multiplied by the weights' scales only.
        gated: whether tokens are ``[..., 2 K]``, and it is ``silu(a) * b`` of their halves that is
            multiplied. That is written to the first half, if they lie one after the other.

    Returns:
        ``[..., N]``.

    Raises:
        RuntimeError: the tokens are not in the CPU's memory.
    """
    from haq.int8.llvm import compiler

    if not tokens.is_cpu:  # A kernel would read what is at this address there.
        raise RuntimeError(
            f"The input must be on the CPU, where the layer is, got one on {tokens.device}. Move "
            "the input, or the model: `model.to(device)`."
        )
    if tokens.dtype not in TYPES:
        tokens = tokens.float()
    tokens = tokens.contiguous()
    target = dtype if dtype in TYPES else torch.float32
    kind = kind_of(groups, tokens.dtype, target, scaled, gated)
    out = tokens.new_empty((*tokens.shape[:-1], len(groups[0].weight.weight)), dtype=target)
    memory = tokens.new_empty(room(groups), dtype=torch.uint8)
    held = [parts_of(group) for group in groups]  # Copies live until the kernel has read them.
    at = tokens.data_ptr(), memory.data_ptr(), out.data_ptr()
    compiler.run(module_of, kind, places(groups, held, *at))
    return out if target is dtype else out.to(dtype)


def kind_of(
    groups: Sequence[Rows],
    source: torch.dtype,
    target: torch.dtype,
    scaled: bool = True,
    gated: bool = False,
) -> tuple[Any, ...]:
    """The options of `module_of`."""
    _, _, bias, row_sums = groups[0]
    return source, target, scaled, row_sums is not None, bias is not None, gated


def parts_of(group: Rows) -> list[Tensor | None]:
    """What a kernel reads of a weight, in the order of `haq.int8.llvm.calls.GROUP`.

    Asked anew for each call: a tensor that goes to another process moves into shared memory.
    """
    weight, _, bias, row_sums = group
    parts = weight.weight, weight.scale, weight.sums, bias, row_sums
    return [None if part is None else part.contiguous() for part in parts]


def room(groups: Sequence[Rows]) -> int:
    """Bytes of memory that the products need beside tokens and outputs."""
    return _layout(groups).total


def places(
    groups: Sequence[Rows],
    held: Sequence[Sequence[Tensor | None]],
    tokens: int,
    memory: int,
    out: int,
) -> list[int]:
    """What a kernel is told.

    Args:
        groups: as for `products`.
        held: the `parts_of` each.
        tokens: the address of the tokens.
        memory: that of as many bytes as `room` says.
        out: that of the outputs.
    """
    count, (rows, width) = sum(group.tokens for group in groups), groups[0].weight.weight.shape
    layout = _layout(groups)
    blocks, strips = memory + layout.integers, memory + 2 * layout.integers
    scales = memory + layout.total - 8 * count
    told = [tokens, count, width, memory, layout.stride, blocks, strips, layout.strip]
    told += [scales, scales + 4 * count, out, rows]
    told += [layout.chunk, layout.block, layout.few, 0, len(groups)]
    first = 0
    for group, parts in zip(groups, held, strict=True):
        told += [*map(_address, parts), first, first + group.tokens]
        first += group.tokens
    return told


def step(groups: Sequence[Rows], dtypes: tuple[torch.dtype, torch.dtype], *at: int) -> "Step":
    """Products as a part of a chain, whose weights have to live as long as it is run.

    Args:
        groups: as for `products`.
        dtypes: of tokens and outputs, both of `TYPES`.
        at: addresses, as for `places`.
    """
    from haq.int8.llvm import calls, chain, compiler

    kernel = compiler.kernel_of(module_of, kind_of(groups, *dtypes))
    told = places(groups, [parts_of(group) for group in groups], *at)
    return chain.Step(kernel, calls.CALL + calls.GROUP, told)


def tell_weights(step: "Step", held: Sequence[Sequence[Tensor | None]]) -> None:
    """Let a step multiply with other weights, of the same shapes.

    Args:
        step: of as many weights.
        held: the `parts_of` each; they have to live until the step was run.
    """
    from haq.int8.llvm import calls

    for index, parts in enumerate(held):
        at = len(calls.CALL) + index * len(calls.GROUP)
        step.places[at : at + len(parts)] = array("q", map(_address, parts))


def _layout(groups: Sequence[Rows]) -> "Layout":
    from haq.int8.llvm.pieces import layout

    counts = [group.tokens for group in groups]
    shape = groups[0].weight.weight.shape
    return layout(sum(counts), max(counts), *shape, torch.get_num_threads())


def module_of(source: torch.dtype, target: torch.dtype, *options: bool) -> Any:
    """What has the kernel of such products: types of tokens and outputs, and whether there are
    scales, zero points, biases and a gate."""
    from haq.int8.llvm import compiler, kernels

    kind = kernels.Kind(name_of(source), name_of(target), *options)
    return kernels.module_of(kind, compiler.dots_here())


def name_of(dtype: torch.dtype) -> str:
    """As kernels call it.

    Examples:
        >>> name_of(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

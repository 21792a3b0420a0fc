"""Decoder blocks: find them, catch what enters them, run them one at a time.

A causal language model of `transformers` is embeddings, a list of decoder blocks and a head. The
quantizer works on one block at a time, so it needs to call block ``i`` alone with the very
arguments the model would have given it: hidden states, mask, position embeddings and whatever else
this architecture passes. Nothing here knows an architecture by name: the block class is the one the
model itself declares as indivisible (``_no_split_modules``), and the arguments are caught in a dry
run in which every block is replaced by a stub.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq.model.stand_ins import StandIn, replaced


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block, apart from the hidden states: the other arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BlockBatch:
    """Everything one block needs to run on one calibration batch.

    Attributes:
        hidden: float ``[B, T, D]``, the hidden states that enter.
        call: the other arguments.
        mask: bool ``[B, T]``, False at padding.
    """

    hidden: Tensor
    call: BlockCall
    mask: Tensor

    def float(self) -> "BlockBatch":
        """The same batch with every floating-point tensor in float32."""
        call = BlockCall(map_tensors(_float, self.call.args), map_tensors(_float, self.call.kwargs))
        return BlockBatch(self.hidden.float(), call, self.mask)


@dataclass
class BlockInputs:
    """What enters each block, for every calibration batch.

    Attributes:
        hidden: one float tensor ``[B, T, D]`` per batch, the input of the block that is next.
        calls: ``calls[batch][block]``, the block's other arguments.
        masks: one bool tensor ``[B, T]`` per batch, False at padding.
        wrap: makes what a block returns of the hidden states that come out of it.
    """

    hidden: list[Tensor]
    calls: list[list[BlockCall]]
    masks: list[Tensor]
    wrap: Callable[[Tensor], Any] = lambda hidden: hidden

    @property
    def num_tokens(self) -> int:
        """Tokens over all batches, padding excluded."""
        return sum(int(mask.sum()) for mask in self.masks)

    def of_block(self, index: int) -> list[BlockBatch]:
        """What block ``index`` is given, batch by batch, if it is the next to run."""
        return [
            BlockBatch(hidden, calls[index], mask)
            for hidden, calls, mask in zip(self.hidden, self.calls, self.masks, strict=True)
        ]


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name in the model.

    Raises:
        ValueError: if the model declares no block class, or no list holds only such blocks.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...                      num_hidden_layers=3, num_attention_heads=2)
        >>> name, blocks = find_blocks(LlamaForCausalLM(config))
        >>> name, len(blocks)
        ('model.layers', 3)
    """
    declared = set(model._no_split_modules or ())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(type(block).__name__ in declared for block in module)
    ]
    if not lists:
        raise ValueError(
            f"`model` must be a causal language model with a list of decoder blocks, got "
            f"{type(model).__name__}, where no `nn.ModuleList` holds only blocks of the classes it "
            f"declares ({sorted(declared) or 'none'}). Pass the `...ForCausalLM` model itself."
        )
    return max(lists, key=lambda item: len(item[1]))


def capture_block_inputs(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    batches: Sequence[Mapping[str, Tensor]],
    keep: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> BlockInputs:
    """Run everything before the blocks, and record how each block would be called.

    The blocks themselves do not run, but for block 0 once, which shows whether a block returns a
    tensor or a tuple. So this costs one embedding per batch.

    Args:
        model: the model; left as it was.
        blocks: what `find_blocks` returned.
        batches: mappings with ``input_ids`` int64 ``[B, T]`` and ``attention_mask`` ``[B, T]`` or
            None, on the model's device.
        keep: gives each batch's hidden states back as they will be kept: on disk, for example.

    Returns:
        The inputs of block 0 and every block's other arguments.

    Raises:
        ValueError: the model does not run its blocks one directly after the other.
    """
    inputs = BlockInputs([], [], [])
    wrap: Callable[[Tensor], Any] | None = None
    for batch in batches:
        if wrap is None:
            inputs.wrap = wrap = _output_form(model, blocks[0], batch)
        recorder = _Recorder(wrap)
        stubs = [_Stub(b, recorder, is_last=i == len(blocks) - 1) for i, b in enumerate(blocks)]
        with replaced(blocks, stubs), torch.no_grad():
            try:
                model(**batch, use_cache=False)
            except _AllBlocksSeen:
                pass
        if len(recorder.calls) < len(blocks):
            raise ValueError(
                f"`model` must run all its {len(blocks)} blocks, but called only "
                f"{len(recorder.calls)}. Does `model.config` belong to it?"
            )
        previous = inputs.calls[-1] if inputs.calls else None
        inputs.hidden.append(keep(recorder.hidden))
        inputs.calls.append(_share_equal_tensors(recorder.calls, previous))
        inputs.masks.append(_token_mask(batch))
    return inputs


def run_block(block: nn.Module, batch: BlockBatch) -> Tensor:
    """The hidden states ``[B, T, D]`` that ``block`` makes of a batch."""
    with torch.no_grad():
        output = block(batch.hidden, *batch.call.args, **batch.call.kwargs)
    return first_tensor(output)


def evenly_spread(batches: Sequence[BlockBatch], tokens: int) -> list[BlockBatch]:
    """Whole batches from all over the calibration set, with about ``tokens`` tokens."""
    mean = sum(int(batch.mask.sum()) for batch in batches) / len(batches)
    count = min(len(batches), max(1, round(tokens / mean)))
    return [batches[i * len(batches) // count] for i in range(count)]


def first_tensor(output: Any) -> Tensor:
    """What a module returned, or the first of several: the output proper of an attention."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


def token_rows(values: Tensor, mask: Tensor) -> Tensor:
    """The rows of ``values`` that belong to real tokens.

    Args:
        values: ``[B, T, K]`` or ``[B * T, K]``, something computed for every token.
        mask: bool ``[B, T]``, False at padding.

    Returns:
        ``[tokens, K]``.
    """
    rows = values.reshape(-1, values.shape[-1])
    return rows if bool(mask.all()) else rows[mask.reshape(-1)]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and dicts; keep the rest."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, item) for item in tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    return tree


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


class _AllBlocksSeen(Exception):
    """Ends the dry run: the head's work on stub outputs would be wasted."""


class _Recorder:
    """How the blocks of one pass were called."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        self.hidden: Tensor
        self.calls: list[BlockCall] = []
        self.wrap = wrap

    def note(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.calls:
            self.hidden = hidden.detach()
        same_memory = hidden.data_ptr() == self.hidden.data_ptr()
        if not same_memory or hidden.shape != self.hidden.shape:
            raise ValueError(
                f"`model` must hand each block the output of the one before, but it changes the "
                f"hidden states between blocks {len(self.calls) - 1} and {len(self.calls)}: haq "
                "cannot run its blocks one at a time."
            )
        self.calls.append(BlockCall(args, kwargs))


class _Stub(StandIn):
    """Passes hidden states through unchanged and notes how it was called."""

    def __init__(self, block: nn.Module, recorder: _Recorder, *, is_last: bool) -> None:
        super().__init__(block)
        # Held in a tuple so that `nn.Module` does not look inside.
        self._recorder = (recorder,)
        self._is_last = is_last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        (recorder,) = self._recorder
        recorder.note(hidden_states, args, kwargs)
        if self._is_last:
            raise _AllBlocksSeen
        return recorder.wrap(hidden_states)


class _BlockOutputSeen(Exception):
    def __init__(self, output: Any) -> None:
        self.output = output


def _output_form(
    model: PreTrainedModel, block: nn.Module, batch: Mapping[str, Tensor]
) -> Callable[[Tensor], Any]:
    """How this architecture's blocks return hidden states: bare, or first in a tuple."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _BlockOutputSeen(output)

    handle = block.register_forward_hook(stop)
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    except _BlockOutputSeen as seen:
        if isinstance(seen.output, tuple):
            rest = seen.output[1:]
            return lambda hidden: (hidden, *rest)
    finally:
        handle.remove()
    return lambda hidden: hidden


def _share_equal_tensors(
    calls: list[BlockCall], previous: list[BlockCall] | None
) -> list[BlockCall]:
    """Use the previous batch's mask and position tensors where they are equal.

    Every batch of one length has the same ones; keeping 128 copies would cost more than the hidden
    states do.
    """
    if previous is None:
        return calls
    known = {id(t): t for call in previous for t in _tensors((call.args, call.kwargs))}
    replacement: dict[int, Tensor] = {}
    for tensor in {id(t): t for call in calls for t in _tensors((call.args, call.kwargs))}.values():
        for candidate in known.values():
            if candidate.shape == tensor.shape and candidate.dtype == tensor.dtype:
                if torch.equal(candidate, tensor):
                    replacement[id(tensor)] = candidate
                    break

    def shared(tensor: Tensor) -> Tensor:
        return replacement.get(id(tensor), tensor)

    return [
        BlockCall(map_tensors(shared, call.args), map_tensors(shared, call.kwargs))
        for call in calls
    ]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return mask.bool()

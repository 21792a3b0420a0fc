"""A few tokens to ask a block with: what it computes from what, they tell as well as many."""

from torch import Tensor, nn

from haq.model.blocks import BlockBatch, BlockCall, map_tensors, run_block
from haq.model.folding import same_in_block

# Of each sequence.
_TOKENS = 64

# What a block may raise when a size only looked like the length of the sequences.
_DOES_NOT_FIT = (IndexError, RuntimeError, TypeError, ValueError)


def shortened(block: nn.Module, batch: BlockBatch) -> BlockBatch:
    """The beginnings of a batch's sequences.

    What a causal block makes of them does not depend on what follows. It is looked at whether that
    is so, and whether all that goes with the sequences could be cut; if not, the batch stays whole.

    Args:
        block: a decoder block in float32, that the batch is for; it runs, and is left as it was.
        batch: in float32.

    Returns:
        The batch with 64 tokens of each sequence, or ``batch`` itself.
    """
    length = batch.hidden.shape[1]
    if length < 2 * _TOKENS or not bool(batch.mask[:, :_TOKENS].all()):
        return batch

    def cut(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size == length:
                tensor = tensor.narrow(dim, 0, _TOKENS)
        return tensor.contiguous()

    call = BlockCall(map_tensors(cut, batch.call.args), map_tensors(cut, batch.call.kwargs))
    hidden = batch.hidden[:, :_TOKENS].contiguous()
    short = BlockBatch(hidden, call, batch.mask[:, :_TOKENS])
    try:
        output = run_block(block, short)
    except _DOES_NOT_FIT:
        return batch
    whole = run_block(block, batch)[:, :_TOKENS]
    same = output.shape == whole.shape and same_in_block(block, hidden, whole, output)
    return short if same else batch

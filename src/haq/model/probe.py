"""A few tokens to ask a block with: what it computes from what, they tell as well as many."""

from torch import Tensor, nn

from haq.model.blocks import BlockBatch, BlockCall, map_tensors, run_block
from haq.model.folding import same_in_block

# Of each sequence.
_TOKENS = 32

# What a block may raise when a size only looked like the length of the sequences.
_DOES_NOT_FIT = (IndexError, RuntimeError, TypeError, ValueError)


def shortened(block: nn.Module, batch: BlockBatch) -> BlockBatch:
    """The beginnings of a batch's sequences.

    What a causal block makes of them does not depend on what follows. It is looked at whether that
    is so, by beginnings that are twice as long, and whether all that goes with the sequences could
    be cut; if not, the batch stays whole.

    Args:
        block: a decoder block in float32, that the batch is for; it runs, and is left as it was.
        batch: in float32.

    Returns:
        The batch with 32 tokens of each sequence, or ``batch`` itself.
    """
    if batch.hidden.shape[1] < 2 * _TOKENS or not bool(batch.mask[:, :_TOKENS].all()):
        return batch
    short, longer = (_beginning(batch, count) for count in (_TOKENS, 2 * _TOKENS))
    try:
        output, reference = (run_block(block, b)[:, :_TOKENS] for b in (short, longer))
    except _DOES_NOT_FIT:
        return batch
    same = output.shape == reference.shape and same_in_block(block, short.hidden, reference, output)
    return short if same else batch


def _beginning(batch: BlockBatch, count: int) -> BlockBatch:
    """So many tokens of each sequence."""
    length = batch.hidden.shape[1]

    def cut(tensor: Tensor) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if size == length:
                tensor = tensor.narrow(dim, 0, count)
        return tensor.contiguous()

    call = BlockCall(map_tensors(cut, batch.call.args), map_tensors(cut, batch.call.kwargs))
    return BlockBatch(batch.hidden[:, :count].contiguous(), call, batch.mask[:, :count])

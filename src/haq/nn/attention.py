"""Attention on a CPU, for models in 16 bits: of one new token to all before it, and of a prompt.

torch's own attends with one token as with a prompt: it packs keys and values for matrix products
that then have one row. With a text of some length that takes longer than the int8 weights of the
layer. With a prompt it multiplies in bfloat16, and casts to it what it then multiplies.
benchmarks/attention.py has the times of both.
"""

import torch
from torch import Tensor

from haq.int8 import matmul
from haq.int8.llvm.weight import TYPES
from haq.nn.handles import kernels_run

# Keys are cast so many numbers at a time: the cache holds them, and the next cast finds memory that
# is in use already.
_NUMBERS = 2**20


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value`` in float32, for one query of each head.

    Args:
        query: float ``[B, H, 1, D]``.
        key: float ``[B, G, T, D]``; H is a multiple of G, and H / G heads in a row share a key.
        value: float ``[B, G, T, V]``.
        mask: bool, or float to be added, that broadcasts to ``[B, H, 1, T]``; None for none.
        scale: None for ``D ** -0.5``.

    Returns:
        ``[B, H, 1, V]`` in the dtype of ``value``.

    Examples:
        >>> key = torch.tensor([[[[8.0, 0.0], [0.0, 8.0]]]])
        >>> attend(torch.tensor([[[[9.0, 0.0]]]]), key, torch.eye(2)[None, None], None, 1.0)
        tensor([[[[1.0000e+00, 5.3802e-32]]]])
    """
    if torch.compiler.is_compiling() and _is_plain(query, key, value, mask) and kernels_run():
        compiled: Tensor = torch.ops.haq.attend(query, key, value, mask, scale)
        return compiled
    query = query.float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if not torch.compiler.is_compiling() and _in_one_call(query, key, value, mask):
        return _attend_in_one_call(query, key, value, mask)
    batch, heads, _, size = query.shape
    groups, tokens = key.shape[1:3]
    shared = heads // groups
    queries = query.reshape(-1, shared, size)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)  # [B G, T, ...]
    if mask is not None:
        mask = mask.expand(batch, heads, 1, tokens).reshape(-1, shared, tokens)
    at_once = max(1, _NUMBERS // max(1, tokens * size))
    if torch.compiler.is_compiling():  # It cuts loops by itself.
        at_once = len(keys)
    result = value.new_empty(len(keys), shared, value.shape[-1])
    for start in range(0, len(keys), at_once):
        here = slice(start, start + at_once)
        scores = torch.bmm(queries[here], keys[here].float().transpose(1, 2))
        if mask is not None:
            scores = _masked(scores, mask[here])
        result[here] = torch.bmm(torch.softmax(scores, -1), values[here].float())
    return result.view(batch, heads, 1, -1)


def attend_to_prompt(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor | None:
    """``softmax(query @ key.T * scale) @ value`` in float32, for all queries of a prompt.

    Args:
        query: float ``[B, H, Q, D]``.
        key: float ``[B, G, T, D]``; H is a multiple of G, and H / G heads in a row share a key.
        value: float ``[B, G, T, V]``.
        causal: whether the q-th query sees the first q keys only.
        scale: None for ``D ** -0.5``.

    Returns:
        ``[B, H, Q, V]`` in the dtype of ``value``; None if there is no kernel that could do it.

    Examples:
        >>> key = torch.tensor([[[[8.0, 0.0], [0.0, 8.0]]]])
        >>> result = attend_to_prompt(9 * key, key, torch.eye(2)[None, None], True, 1.0)
        >>> result is None or torch.equal(result, torch.eye(2)[None, None])
        True
    """
    if query.dtype != value.dtype or not _is_plain(query, key, value, None):
        return None
    if torch.compiler.is_compiling():
        if not kernels_run():
            return None
        compiled: Tensor = torch.ops.haq.attend_to_prompt(query, key, value, causal, scale)
        return compiled
    if query.stride(-1) != 1 or not _in_one_call(query, key, value, None):
        return None
    return _attend_to_prompt(query, key, value, causal, scale)


def _attend_to_prompt(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor:
    from haq.int8.llvm import prompts

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (batch, heads, queries, size), (groups, tokens, width) = query.shape, value.shape[1:]
    shared = heads // groups
    # What `transformers` wants next has the numbers of a token side by side.
    out = value.new_empty(batch, queries, heads, width).transpose(1, 2)
    at_once = max(1, _NUMBERS // max(1, tokens * size))
    for row in range(batch):
        for start in range(0, groups, at_once):
            group = slice(start, start + at_once)
            head = slice(start * shared, (start + at_once) * shared)
            keys, values = (
                torch.empty(part.shape, dtype=torch.float32).copy_(part)
                for part in (key[row, group], value[row, group])
            )
            prompts.attend(query[row, head], keys, values, out[row, head], causal, scale)
    return out


def _in_one_call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether LLVM's kernel can attend to these as they lie in memory."""
    plain = key.stride(-1) == value.stride(-1) == 1 and _is_plain(query, key, value, mask)
    return plain and matmul.compiles()


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether these are of a kind that LLVM's kernel attends to, and no gradient is asked for."""
    inputs = (query, key, value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return False
    here = all(tensor.is_cpu for tensor in inputs) and (mask is None or mask.is_cpu)
    return here and key.dtype == value.dtype and key.dtype in TYPES


def _attend_in_one_call(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    from haq.int8.llvm import attention

    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        mask = mask.float().expand(*query.shape[:3], key.shape[2])
    return attention.attend(query, key, value, mask)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask


@torch.library.custom_op("haq::attend", mutates_args=())
def _operator(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    key, value = _side_by_side(key, value)
    return attend(query, key, value, mask, scale)


@_operator.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.shape[-1])


@torch.library.custom_op("haq::attend_to_prompt", mutates_args=())
def _operator_for_prompts(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor:
    query, key, value = _side_by_side(query, key, value)
    return _attend_to_prompt(query, key, value, causal, scale)


@_operator_for_prompts.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    batch, heads, queries, _ = query.shape
    return value.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """The numbers of a token: compiled code may have laid them out in another way."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]

"""An attention implementation for `transformers`: its own, and faster ones on a CPU.

It is registered by the name `NAME`, and `model.set_attn_implementation("sdpa")` takes it back.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from haq.nn.attention import attend, attend_to_prompt

NAME = "haq"

# Whether the processor multiplies matrices in bfloat16, as torch's own attention then does (AMX);
# versions of torch that cannot tell are not asked.
_capabilities = getattr(torch.cpu, "get_capabilities", None)
_MATRICES = bool(_capabilities and _capabilities().get("amx_bf16"))

# Whether haq's own is to be used wherever there is one: to be compared with.
_always: ContextVar[bool] = ContextVar("always", default=False)

# Arguments that change nothing about the attention where they are None or False.
_MORE = ("position_bias", "cache", "softcap", "s_aux", "output_attentions")


def use_fast_attention(model: PreTrainedModel) -> None:
    """Let a model that uses torch's attention use haq's where that is the faster one.

    That is on a CPU, in 16 bits, for one new token and for prompts that are not masked; not in
    bfloat16 where the processor multiplies matrices of it (AMX), and torch does. Everywhere
    else, on a GPU too, it computes what it computed before. A model that uses another
    implementation, or cannot change it, is left as it is.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls: its ``sdpa``, but for one new token and for prompts on a CPU.

    Args:
        module: the attention layer.
        query: float ``[B, H, Q, D]``.
        key: float ``[B, G, T, D]``.
        value: float ``[B, G, T, V]``.
        attention_mask: as for ``sdpa``.
        dropout: as for ``sdpa``.
        scaling: of the scores.
        **kwargs: what ``sdpa`` takes.

    Returns:
        ``[B, Q, H, V]`` and None.
    """
    if (
        query.device.type == "cpu"
        and _is_the_faster_one(query.dtype)
        and not dropout
        and len(query) == len(key)
        and not any(_given(kwargs.get(name)) for name in _MORE)
    ):
        attended = None
        if query.shape[2] == 1:
            attended = attend(query, key, value, attention_mask, scaling)
        elif attention_mask is None:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            attended = attend_to_prompt(query, key, value, causal, scaling)
        if attended is not None:
            return attended.transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
    return result


@contextlib.contextmanager
def always_ours() -> Iterator[None]:
    """Attend in haq's way inside a ``with`` block, in this thread, also where torch is faster."""
    token = _always.set(True)
    try:
        yield
    finally:
        _always.reset(token)


def _is_the_faster_one(dtype: torch.dtype) -> bool:
    """In float32 torch's own attention is as fast."""
    if dtype == torch.bfloat16 and _MATRICES:
        # A compiler would have to stop there, and nobody compares what is compiled.
        return not torch.compiler.is_compiling() and _always.get()
    return dtype in (torch.bfloat16, torch.float16)


def _given(value: object) -> bool:
    return value is not None and value is not False


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

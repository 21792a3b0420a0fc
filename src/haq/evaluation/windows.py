"""A text cut into windows, and what a model predicts in one of them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

# No more logits exist at once than for one of the usual windows.
_TOKENS_AT_ONCE = 2048


def cut_windows(token_ids: Tensor, sequence_length: int) -> Tensor:
    """``token_ids`` ``[1, T]`` or ``[T]`` as windows: int64 ``[W, sequence_length]``."""
    if not isinstance(token_ids, Tensor) or token_ids.dtype != torch.int64:
        got = getattr(token_ids, "dtype", type(token_ids).__name__)
        raise TypeError(
            f"`token_ids` must be an int64 tensor, got {got}. `evaluation_tokens` makes one of a "
            f"text."
        )
    if token_ids.dim() not in (1, 2) or (token_ids.dim() == 2 and len(token_ids) != 1):
        raise ValueError(
            f"`token_ids` must be of shape [1, T] or [T], one text, got {list(token_ids.shape)}."
        )
    if sequence_length < 2:
        raise ValueError(
            f"`sequence_length` must be at least 2, to predict one token, got {sequence_length}."
        )
    count = token_ids.numel() // sequence_length
    if count == 0:
        raise ValueError(
            f"`token_ids` must hold at least one window of `sequence_length={sequence_length}`, "
            f"got {token_ids.numel()} tokens. Pass a longer text or a smaller `sequence_length`."
        )
    return token_ids.flatten()[: count * sequence_length].view(count, sequence_length)


def check_fits(model: PreTrainedModel, name: str, windows: Tensor) -> None:
    """Say what is wrong before the model runs into an index error, or worse, on a GPU."""
    if model.device.type == "meta":
        raise RuntimeError(f"`{name}` must have its weights in memory, got a model on 'meta'.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"`sequence_length` must be at most {positions}, the positions of `{name}`, got "
            f"{windows.shape[1]}."
        )
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    lowest, highest = windows.min().item(), windows.max().item()
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"`token_ids` must be from 0 to {vocabulary - 1}, the vocabulary of `{name}`, got "
            f"{lowest if lowest < 0 else highest}. Use the model's own tokenizer."
        )


def numbered_windows(windows: Tensor, title: str, progress: bool) -> Iterator[tuple[int, Tensor]]:
    """Windows ``[L]`` with their numbers, behind the progress bar that `transformers` shows."""
    # None: shown on a terminal or in a notebook, not in a file.
    bar = logging.tqdm(windows, desc=title, unit="window", disable=None if progress else True)
    yield from enumerate(bar)


def predictions(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """Logits ``[L - 1, V]`` for all tokens but the first of each window, for ``[W, L]`` windows.

    Short windows go through the model several at a time, without seeing each other.
    """
    for batch in windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1])):
        output = model(input_ids=batch.to(model.device), use_cache=False)
        if not hasattr(output, "logits"):
            raise TypeError(
                f"`model` must be a causal language model, got {type(model).__name__}, whose "
                f"output has no logits. Load it with `AutoModelForCausalLM`."
            )
        yield from output.logits[:, :-1]

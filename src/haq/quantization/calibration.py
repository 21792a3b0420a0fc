"""Text to batches of token ids for calibration: windows from all over a source, by a seed."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from haq.text import Corpus, Documents, TextSource, read_documents, token_ids

# Calibration reads what the corpora were made to be learned from; their test text stays unseen.
_CORPORA = {
    "wikitext2": Corpus("Salesforce/wikitext", split="train", subset="wikitext-2-raw-v1"),
    "c4": Corpus(
        "allenai/c4", split="train", data_files={"train": "en/c4-train.00000-of-01024.json.gz"}
    ),
}

# Tokens read for each token drawn. Twice as many leaves room for the windows to start anywhere,
# and keeps the reading short: tokenizing the whole of a C4 shard takes minutes.
_TOKENS_READ_PER_TOKEN_DRAWN = 2

# A run of documents should be about as long as a window. Only its rough size matters, and 4
# characters per token are usual for English.
_CHARACTERS_PER_TOKEN = 4
_DOCUMENTS_MEASURED = 256


def calibration_batches(
    tokenizer: Callable[..., Any],
    source: TextSource,
    *,
    num_samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
) -> list[Tensor]:
    """Draw windows of consecutive tokens from a text.

    The documents, joined by blank lines, are cut into runs of about ``sequence_length`` tokens.
    Runs are tokenized in a random order until there are twice as many tokens as needed, or no more
    documents; each begins as a prompt does, with the special tokens that the tokenizer adds by
    itself. The windows are then drawn at random places of what was read, and no two overlap.

    Args:
        tokenizer: the model's tokenizer.
        source: "wikitext2" (its train split) or "c4" (the first file of its train split), both
            from the Hugging Face hub; a path to a .txt file (lines joined as they are), a .json
            file (a list) or a .jsonl file (an entry per line); an iterable; or a `datasets.Dataset`
            with a column "text". Entries are strings or mappings with a string "text".
        num_samples: number of windows.
        sequence_length: tokens of each window. That a model has as many positions is checked where
            there is a model.
        seed: the same seed draws the same windows.

    Returns:
        ``num_samples`` tensors int64 ``[1, sequence_length]``.

    Raises:
        TypeError: if ``tokenizer`` or ``source`` or one of its entries is something else.
        ValueError: if ``source`` holds no text or too little, is an unknown name or a file that
            cannot be read, or if a number is below 1.
        FileNotFoundError: if the file does not exist.
        RuntimeError: if a corpus cannot be loaded from the hub.

    Examples:
        >>> def letters(text, **options):  # stands for a tokenizer
        ...     return {"input_ids": [ord(letter) - ord("a") for letter in text.strip()]}
        >>> calibration_batches(letters, ["abcdefgh"], num_samples=2, sequence_length=3)
        [tensor([[0, 1, 2]]), tensor([[5, 6, 7]])]
    """
    _check_at_least_one("num_samples", num_samples)
    _check_at_least_one("sequence_length", sequence_length)
    _check_whole("seed", seed)
    token_ids(tokenizer, "")  # a wrong tokenizer is said before a corpus is downloaded
    documents = read_documents(source, _CORPORA)
    generator = torch.Generator().manual_seed(seed)
    ids = _tokens(tokenizer, documents, num_samples, sequence_length, generator)
    if len(ids) < num_samples * sequence_length:
        raise ValueError(_too_little(len(ids), num_samples, sequence_length))
    return _windows(torch.tensor(ids), num_samples, sequence_length, generator)


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")


def _check_at_least_one(name: str, value: int) -> None:
    _check_whole(name, value)
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _tokens(
    tokenizer: Callable[..., Any],
    documents: Documents,
    num_samples: int,
    sequence_length: int,
    generator: torch.Generator,
) -> list[int]:
    """Token ids of runs of documents in random order: enough of them, or all there are."""
    run = _documents_per_run(documents, sequence_length, generator)
    starts = range(0, len(documents.texts), run)
    enough = _TOKENS_READ_PER_TOKEN_DRAWN * num_samples * sequence_length
    ids: list[int] = []
    for i in torch.randperm(len(starts), generator=generator).tolist():
        text = documents.join(starts[i], starts[i] + run)
        if text.strip():
            ids += token_ids(tokenizer, text + documents.separator)
        if len(ids) >= enough:
            break
    return ids


def _documents_per_run(
    documents: Documents, sequence_length: int, generator: torch.Generator
) -> int:
    """How many consecutive documents make about one window, judged by some of them."""
    count = len(documents.texts)
    measured = torch.randperm(count, generator=generator)[:_DOCUMENTS_MEASURED].tolist()
    characters = sum(len(documents.texts[i]) + len(documents.separator) for i in measured)
    window = sequence_length * _CHARACTERS_PER_TOKEN
    return max(1, math.ceil(window * len(measured) / max(characters, 1)))


def _windows(
    ids: Tensor, num_samples: int, sequence_length: int, generator: torch.Generator
) -> list[Tensor]:
    """Cut windows of ``ids`` ``[T]`` at random places, without overlap, in the order of the text.

    What is left over after the windows, T - num_samples * sequence_length tokens, is dealt out at
    random between them: window i starts behind i windows and a random share of the rest.
    """
    left_over = len(ids) - num_samples * sequence_length
    gaps, _ = torch.randint(left_over + 1, (num_samples,), generator=generator).sort()
    starts = (gaps + torch.arange(num_samples) * sequence_length).tolist()
    return [ids[None, start : start + sequence_length].clone() for start in starts]


def _too_little(have: int, num_samples: int, sequence_length: int) -> str:
    needed = num_samples * sequence_length
    fits = have // sequence_length
    fewer = f"`num_samples={fits}` or " if fits else ""
    return (
        f"`source` must hold {needed:,} tokens for {num_samples:,} windows of {sequence_length:,}, "
        f"got {have:,}. Ask for {fewer}a smaller `sequence_length`, or add text."
    )

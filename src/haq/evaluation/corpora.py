"""The texts on which papers evaluate, tokenized as they do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from haq.text import Corpus, TextSource, read_documents, token_ids

_CORPORA = {
    "wikitext2": Corpus("Salesforce/wikitext", split="test", subset="wikitext-2-raw-v1"),
    "c4": Corpus(
        "allenai/c4",
        split="validation",
        data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"},
        separator=" ",
    ),
}
_C4_DOCUMENTS = 1100
_C4_TOKENS = 256 * 2048


def evaluation_tokens(tokenizer: Callable[..., Any], source: TextSource) -> Tensor:
    """The token ids on which papers evaluate: a whole text, tokenized as one string.

    Args:
        tokenizer: the model's tokenizer.
        source: "wikitext2", the raw test split with its rows joined by blank lines, or "c4", the
            first 1100 documents of the first validation file joined by spaces, of which the first
            256 * 2048 tokens, both from the Hugging Face hub; a path to a .txt file, as it is; or
            a .json or .jsonl file, an iterable of strings or of mappings with a string "text", or a
            `datasets.Dataset` with a column "text", joined by blank lines.

    Returns:
        int64 ``[1, T]``.

    Raises:
        TypeError: if ``tokenizer`` or ``source`` or one of its entries is something else.
        ValueError: if ``source`` holds no text, is an unknown name or a file that cannot be read.
        FileNotFoundError: if the file does not exist.
        RuntimeError: if a corpus cannot be loaded from the hub.

    Examples:
        >>> def letters(text, **options):  # stands for a tokenizer
        ...     return {"input_ids": [ord(letter) for letter in text]}
        >>> evaluation_tokens(letters, ["ab", "c"])
        tensor([[97, 98, 10, 10, 99]])
    """
    token_ids(tokenizer, "")  # a wrong tokenizer is said before a corpus is downloaded
    documents = read_documents(source, _CORPORA)
    is_c4 = isinstance(source, str) and source == "c4"
    ids = token_ids(tokenizer, documents.join(stop=_C4_DOCUMENTS if is_c4 else None))
    return torch.tensor([ids[:_C4_TOKENS] if is_c4 else ids])

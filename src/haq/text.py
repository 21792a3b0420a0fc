"""Where text comes from: corpora on the hub, files, datasets, anything that yields strings.

Calibration and evaluation read the same kinds of source; what a corpus's name stands for (its train
or its test split) is theirs to say.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from torch import nn

TextSource = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]
"""What text can be read from; a `datasets.Dataset` is the last of these."""

_SUFFIXES = ".txt, .json or .jsonl"


@dataclass(frozen=True)
class Corpus:
    """A text corpus on the Hugging Face hub, as `datasets.load_dataset` is asked for it.

    Attributes:
        repository: the hub's name of the dataset.
        split: the split to read.
        subset: the dataset's configuration, None for its default one.
        data_files: the file to read, by split; None for all of them.
        separator: what the documents are joined by.
    """

    repository: str
    split: str
    subset: str | None = None
    data_files: Mapping[str, str] | None = None
    separator: str = "\n\n"


@dataclass(frozen=True)
class Documents:
    """Pieces of text in their order, and what stands between them.

    Attributes:
        texts: the pieces; those of a plain text file are its lines. May read lazily.
        separator: joins the pieces into the whole text.
    """

    texts: Sequence[str] = field(repr=False)
    separator: str = "\n\n"

    def join(self, start: int = 0, stop: int | None = None) -> str:
        """The text of pieces ``start`` to ``stop``, exclusive.

        Examples:
            >>> Documents(["one", "two", "three"], separator=" ").join(1)
            'two three'
        """
        return self.separator.join(self.texts[start:stop])


def read_documents(source: TextSource, corpora: Mapping[str, Corpus]) -> Documents:
    """Read text from any source.

    Args:
        source: a name in ``corpora``; a path to a .txt file (as it is), a .json file (a list) or a
            .jsonl file (an entry per line); an iterable; or a `datasets.Dataset` with a column
            "text". Entries of lists, lines and iterables are strings or mappings with a string
            "text". An iterable is read to its end.
        corpora: what each name stands for.

    Raises:
        TypeError: if ``source`` or one of its entries is something else.
        ValueError: if ``source`` holds no text, is an unknown name or a file that cannot be read.
        FileNotFoundError: if the file does not exist.
        RuntimeError: if a corpus cannot be loaded from the hub.

    Examples:
        >>> read_documents(["A cat.", {"text": "A mat."}], {}).join()
        'A cat.\\n\\nA mat.'
    """
    if isinstance(source, str) and source in corpora:
        documents = _from_hub(source, corpora[source])
    elif isinstance(source, str | os.PathLike):
        documents = _from_file(source, corpora)
    elif hasattr(source, "column_names"):
        documents = _from_dataset(source)
    elif isinstance(source, Iterable) and not isinstance(source, bytes | bytearray | Mapping):
        documents = Documents(_strings(source, "`source`"))
    else:
        raise TypeError(
            f"`source` must be {_accepted(corpora)}, an iterable of strings or a "
            f"`datasets.Dataset`, got {type(source).__name__}."
        )
    if not any(text.strip() for text in documents.texts):
        raise ValueError(f"`source` is empty: {source!r:.200} holds no text.")
    return documents


def token_ids(tokenizer: Callable[..., Any], text: str) -> list[int]:
    """The ids of ``text``, with the special tokens that the tokenizer adds by itself.

    Raises:
        TypeError: if ``tokenizer`` is not one.
    """
    if not callable(tokenizer) or isinstance(tokenizer, nn.Module):
        raise TypeError(
            f"`tokenizer` must be a tokenizer of `transformers`, got {tokenizer!r:.80}. Load it "
            f"with `AutoTokenizer.from_pretrained(...)`."
        )
    # A whole corpus is longer than any model's window, and is cut afterwards: the tokenizer's
    # warning about that (`verbose`) would only frighten.
    encoding = tokenizer(text, verbose=False)
    try:
        ids = encoding["input_ids"]
    except (TypeError, KeyError, IndexError):
        ids = None
    if not isinstance(ids, list):
        raise TypeError(
            f"`tokenizer` must return a mapping whose 'input_ids' are a list, got "
            f"{type(encoding).__name__} from {type(tokenizer).__name__}."
        )
    return ids


def _accepted(corpora: Mapping[str, Corpus]) -> str:
    names = ", ".join(f"'{name}'" for name in corpora)
    return f"{names or 'text'} or a path to a {_SUFFIXES} file"


def _from_hub(name: str, corpus: Corpus) -> Documents:
    # Imported here because it takes a second, and most processes that import haq read no corpus.
    from datasets import load_dataset

    arguments: dict[str, Any] = {"split": corpus.split}
    if corpus.subset is not None:
        arguments["name"] = corpus.subset
    if corpus.data_files is not None:
        arguments["data_files"] = dict(corpus.data_files)
    try:
        dataset = load_dataset(corpus.repository, **arguments)
    except Exception as error:
        # Which exception depends on what is missing: the network, the cache or the dataset.
        raise RuntimeError(
            f"`source='{name}'` is the dataset {corpus.repository} on the Hugging Face hub, which "
            f"could not be loaded with {arguments}: {error}. Without a network, download it into "
            f"the cache beforehand, or pass a path to a local {_SUFFIXES} file."
        ) from error
    return Documents(_from_dataset(dataset).texts, corpus.separator)


def _from_dataset(dataset: Any) -> Documents:
    columns = dataset.column_names
    if isinstance(columns, dict):
        raise TypeError(
            f"`source` must be one split, got {type(dataset).__name__} with {sorted(columns)}. "
            f"Pass `source['{min(columns, default='train')}']`."
        )
    if columns is not None and "text" not in columns:
        raise ValueError(
            f"`source` must have a column 'text', got a dataset with {columns}. Rename the one "
            f"that holds the text: `source.rename_column(NAME, 'text')`."
        )
    if not hasattr(dataset, "__len__"):  # a stream
        return Documents(_strings(dataset, "`source`"))
    return Documents(_TextColumn(dataset))


class _TextColumn(Sequence[str]):
    """The column "text" of a dataset, read from disk when asked for."""

    def __init__(self, dataset: Any) -> None:
        self._column = dataset["text"]

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, int):
            return _string(self._column[index], f"`source` entry {index}")
        first = index.indices(len(self))[0]
        return _strings(self._column[index], "`source`", first)


def _from_file(source: str | os.PathLike[str], corpora: Mapping[str, Corpus]) -> Documents:
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json", ".jsonl"):
        raise ValueError(
            f"`source` must be {_accepted(corpora)}, got {os.fspath(source)!r:.200}. To pass "
            f"text itself, put it into a list."
        )
    if not path.is_file():
        raise FileNotFoundError(f"`source` must be an existing file, got '{path}', which is not.")
    try:
        # "sig" accepts the byte-order mark that some editors put in front.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`source` must be text in UTF-8, got '{path}': {error}.") from error
    if suffix == ".txt":
        # Splitting at one character and joining by it gives back every byte.
        return Documents(text.split("\n"), separator="\n")
    return Documents(_strings(_json_entries(path, text), f"'{path}'"))


def _json_entries(path: Path, text: str) -> list[Any]:
    if path.suffix.lower() == ".json":
        entries = _parsed(text, f"'{path}'")
        if not isinstance(entries, list):
            raise ValueError(
                f"'{path}' must be a JSON list of strings or of objects with a string 'text', got "
                f"one {type(entries).__name__}. One object per line belongs in a .jsonl file."
            )
        return entries
    lines = enumerate(text.split("\n"), start=1)
    return [_parsed(line, f"'{path}' line {number}") for number, line in lines if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, got something else: {error}.") from error


def _strings(entries: Iterable[Any], where: str, first: int = 0) -> list[str]:
    return [_string(entry, f"{where} entry {i}") for i, entry in enumerate(entries, start=first)]


def _string(entry: Any, where: str) -> str:
    text = entry.get("text") if isinstance(entry, Mapping) else entry
    if isinstance(text, str):
        return text
    got = f"a mapping with {sorted(map(str, entry))}" if isinstance(entry, Mapping) else repr(entry)
    raise TypeError(f"{where} must be a string or a mapping with a string 'text', got {got:.120}.")

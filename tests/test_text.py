"""Reading text: every kind of source gives the same documents, and every bad one says why."""

import json
from pathlib import Path

import datasets
import pytest

from haq.text import Corpus, read_documents, token_ids

TEXTS = ["The first.", "Über die zweite.\nTwo lines.", "third"]
OBJECTS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda _: TEXTS, id="list"),
        pytest.param(lambda _: iter(TEXTS), id="iterator"),
        pytest.param(lambda _: OBJECTS, id="mappings"),
        pytest.param(lambda _: datasets.Dataset.from_list(OBJECTS), id="dataset"),
        pytest.param(
            lambda _: datasets.Dataset.from_list(OBJECTS[::-1]).select([2, 1, 0]), id="selection"
        ),
        pytest.param(
            lambda _: datasets.Dataset.from_list(OBJECTS).to_iterable_dataset(), id="stream"
        ),
        pytest.param(lambda p: write(p / "a.json", json.dumps(TEXTS)), id="json-strings"),
        pytest.param(lambda p: write(p / "a.json", json.dumps(OBJECTS)), id="json-objects"),
        pytest.param(
            lambda p: str(write(p / "a.JSON", "\ufeff" + json.dumps(TEXTS))), id="json-with-bom"
        ),
        pytest.param(
            lambda p: write(p / "a.jsonl", "\n".join(map(json.dumps, OBJECTS)) + "\n"), id="jsonl"
        ),
    ],
)
def test_every_kind_of_source_gives_the_same_documents(source, tmp_path):
    documents = read_documents(source(tmp_path), {})
    assert list(documents.texts) == TEXTS
    assert documents.join() == "\n\n".join(TEXTS)
    assert documents.join(1, 2) == TEXTS[1]


@pytest.mark.parametrize("text", ["one\n\n\n two \nthree", "\n\nx\n", "no newline"])
def test_a_text_file_is_read_as_it_is(text, tmp_path):
    assert read_documents(write(tmp_path / "a.txt", text), {}).join() == text


def test_a_dataset_is_read_lazily(monkeypatch):
    dataset = datasets.Dataset.from_dict({"text": ["a"] * 1000, "other": [0] * 1000})
    read = []
    column = datasets.arrow_dataset.Column.__getitem__
    monkeypatch.setattr(
        datasets.arrow_dataset.Column,
        "__getitem__",
        lambda self, key: read.append(key) or column(self, key),
    )
    documents = read_documents(dataset, {})
    assert documents.texts[10:12] == ["a", "a"]
    assert read == [0, slice(10, 12, None)]


CORPORA = {
    "whole": Corpus("owner/whole", split="test", subset="raw"),
    "part": Corpus("owner/part", split="train", data_files={"train": "x.gz"}, separator=" "),
}


@pytest.mark.parametrize(
    ("name", "arguments", "joined"),
    [
        ("whole", {"split": "test", "name": "raw"}, "a\n\nb"),
        ("part", {"split": "train", "data_files": {"train": "x.gz"}}, "a b"),
    ],
)
def test_a_corpus_is_asked_of_the_hub(name, arguments, joined, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents(name, CORPORA).join() == joined
    assert asked == [(f"owner/{name}", arguments)]


def test_a_corpus_that_cannot_be_loaded_says_what_was_tried_and_what_to_do():
    with pytest.raises(
        RuntimeError,
        match=r"`source='whole'` is the dataset owner/whole .*'split': 'test', 'name': 'raw'"
        r".*pass a path to a local \.txt, \.json or \.jsonl file",
    ) as caught:
        read_documents("whole", CORPORA)
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, TypeError, r"`source` must be 'whole', 'part' or a path .*, got NoneType\."),
        (3, TypeError, r"`source` must be .*, got int\."),
        (b"bytes", TypeError, r"`source` must be .*, got bytes\."),
        ({"text": ["a"]}, TypeError, r"`source` must be .*, got dict\."),
        ([b"a"], TypeError, r"`source` entry 0 must be a string .*, got b'a'\."),
        (["a", None], TypeError, r"`source` entry 1 must be a string .*, got None\."),
        ([{"body": "a"}], TypeError, r"`source` entry 0 must be .*, got a mapping with \['body'\]"),
        ([{"text": 1}], TypeError, r"`source` entry 0 must be .*, got a mapping with \['text'\]"),
        ([], ValueError, r"`source` is empty: \[\] holds no text\."),
        (["", " \n"], ValueError, r"`source` is empty: \['', ' \\n'\] holds no text\."),
        ("wikitext", ValueError, r"must be 'whole', 'part' or a path .*, got 'wikitext'\. To pass"),
        (Path("a.csv"), ValueError, r"must be .*\.txt, \.json or \.jsonl file, got 'a\.csv'\."),
        ("no/such.txt", FileNotFoundError, r"must be an existing file, got 'no/such\.txt', which"),
    ],
)
def test_bad_sources(source, error, message):
    with pytest.raises(error, match=message):
        read_documents(source, CORPORA)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b" \n\n", ValueError, r"`source` is empty: .*a\.txt"),
        ("a.txt", b"caf\xe9", ValueError, r"must be text in UTF-8, got '.*a\.txt': .*0xe9"),
        ("a.json", b"[1, ", ValueError, r"'.*a\.json' must be JSON, got something else: "),
        ("a.json", b'{"text": "a"}', ValueError, r"a\.json' must be a JSON list .*, got one dict"),
        ("a.json", b'"a"', ValueError, r"a\.json' must be a JSON list .*, got one str\."),
        ("a.json", b"[]", ValueError, r"`source` is empty: .*a\.json"),
        ("a.json", b'["a", 2]', TypeError, r"'.*a\.json' entry 1 must be a string .*, got 2\."),
        ("a.jsonl", b'"a"\n\n{', ValueError, r"'.*a\.jsonl' line 3 must be JSON"),
        ("a.jsonl", b'"a"\n["b"]', TypeError, r"'.*a\.jsonl' entry 1 must be .*, got \['b'\]\."),
    ],
)
def test_bad_files(name, content, error, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_documents(path, {})


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must be an existing file, got '.*a\.txt'"):
        read_documents(tmp_path / "a.txt", {})


def test_a_dataset_of_several_splits():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(OBJECTS)})
    with pytest.raises(
        TypeError, match=r"one split, got DatasetDict with \['train'\]\. Pass `sour"
    ):
        read_documents(splits, {})


def test_a_dataset_without_text():
    dataset = datasets.Dataset.from_dict({"body": ["a"]})
    with pytest.raises(ValueError, match=r"column 'text', got a dataset with \['body'\]"):
        read_documents(dataset, {})


def test_a_dataset_with_a_missing_entry():
    documents = read_documents(datasets.Dataset.from_dict({"text": ["a", "b", None]}), {})
    with pytest.raises(TypeError, match=r"`source` entry 2 must be a string .*, got None\."):
        documents.join(1)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, r"`tokenizer` must be a tokenizer of `transformers`, got None\. Load it with"),
        ("facebook/opt-125m", r"`tokenizer` must be .*, got 'facebook/opt-125m'\."),
        (lambda text, **_: text.split(), r"must return a mapping .*, got list from function\."),
        (lambda text, **_: {"ids": [1]}, r"must return a mapping .*, got dict from function\."),
    ],
)
def test_bad_tokenizers(tokenizer, message):
    with pytest.raises(TypeError, match=message):
        token_ids(tokenizer, "text")


def test_a_model_is_no_tokenizer(tiny_llama):
    with pytest.raises(TypeError, match=r"`tokenizer` must be .*, got LlamaForCausalLM"):
        token_ids(tiny_llama(), "text")

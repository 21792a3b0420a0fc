"""The paper's protocol for test text: what is joined by what, and where it is cut."""

import datasets
import pytest
import torch

from haq.evaluation import evaluation_tokens


def letters(text, **options):
    return {"input_ids": [7, *map(ord, text)]}


def written(ids):
    assert ids.dtype == torch.int64
    assert ids.shape[0] == 1
    assert ids[0, 0] == 7
    return "".join(map(chr, ids[0, 1:].tolist()))


def test_strings_are_joined_by_blank_lines_and_tokenized_at_once():
    assert written(evaluation_tokens(letters, ["ab", "", "c"])) == "ab\n\n\n\nc"


def test_a_text_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n = Title = \n \n text\n")
    assert written(evaluation_tokens(letters, path)) == " \n = Title = \n \n text\n"


def test_json_is_joined_by_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n"b"\n')
    assert written(evaluation_tokens(letters, str(path))) == "a\n\nb"


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: note what is asked for, and answer with these rows."""
    asked = []
    rows = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_dict({"text": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


def test_wikitext2_is_the_raw_test_split_joined_by_blank_lines(hub):
    asked, rows = hub
    rows += ["", " = Title = \n", "", " text \n"]
    assert written(evaluation_tokens(letters, "wikitext2")) == "\n\n = Title = \n\n\n\n\n text \n"
    assert asked == [("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"})]


def test_c4_is_1100_validation_documents_joined_by_spaces(hub):
    asked, rows = hub
    rows += [f"d{i}" for i in range(1200)]
    assert written(evaluation_tokens(letters, "c4")) == " ".join(rows[:1100])
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert asked == [("allenai/c4", {"data_files": files, "split": "validation"})]


def test_c4_is_cut_at_256_windows_of_2048(hub):
    _, rows = hub
    rows += ["x" * 999] * 1100
    assert evaluation_tokens(letters, "c4").shape == (1, 256 * 2048)


def test_other_text_is_not_cut():
    assert evaluation_tokens(letters, ["x" * 600_000]).shape == (1, 600_001)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"must be 'wikitext2', 'c4' or a path .*, got 'ptb'\."):
        evaluation_tokens(letters, "ptb")


def test_a_wrong_tokenizer_is_said_before_anything_is_read():
    with pytest.raises(TypeError, match=r"`tokenizer` must be .*, got None\."):
        evaluation_tokens(None, "no/such/file.txt")

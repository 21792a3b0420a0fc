"""Windows for calibration: whole, apart from each other, from everywhere, the same each time."""

import json
from itertools import pairwise

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from haq.quantization.calibration import calibration_batches


def numbers(text, **options):
    """A tokenizer whose text is written in ids."""
    return {"input_ids": [int(word) for word in text.split()]}


def documents_of(lengths):
    """Documents that count on: no number occurs twice."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        " ".join(map(str, range(end - length, end)))
        for end, length in zip(ends, lengths, strict=True)
    ]


def test_windows_have_their_shape():
    batches = calibration_batches(numbers, documents_of([50] * 9), num_samples=5, sequence_length=8)
    assert [(batch.shape, batch.dtype) for batch in batches] == [((1, 8), torch.int64)] * 5


def test_the_windows_of_one_document_are_consecutive_and_apart():
    batches = calibration_batches(numbers, documents_of([1000]), num_samples=20, sequence_length=30)
    starts = [batch[0, 0].item() for batch in batches]
    for batch, start in zip(batches, starts, strict=True):
        assert batch[0].tolist() == list(range(start, start + 30))
    distances = [after - before for before, after in pairwise(starts)]
    assert min(distances) >= 30
    # 400 tokens are left over, and dealt out.
    assert max(distances) > 30


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    num_samples=st.integers(1, 6),
    sequence_length=st.integers(1, 25),
    seed=st.integers(0, 5),
)
def test_there_are_windows_exactly_if_the_text_is_long_enough(
    lengths, num_samples, sequence_length, seed
):
    arguments = {"num_samples": num_samples, "sequence_length": sequence_length, "seed": seed}
    source = [*documents_of(lengths), "0"]  # one token more, since no text at all is another error
    if sum(lengths) + 1 < num_samples * sequence_length:
        with pytest.raises(ValueError, match="must hold"):
            calibration_batches(numbers, source, **arguments)
        return
    ids = torch.cat(calibration_batches(numbers, source, **arguments)).flatten()
    assert len(ids) == num_samples * sequence_length
    twice = len(ids) - len(ids.unique())
    assert twice <= int(0 in ids)  # the 0 that was added


def test_a_seed_draws_the_same_windows_and_touches_no_other_randomness():
    source = documents_of([20] * 100)

    def draw(seed):
        return torch.cat(
            calibration_batches(numbers, source, num_samples=4, sequence_length=16, seed=seed)
        )

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


@pytest.mark.parametrize("sequence_length", [16, 256])
def test_windows_come_from_all_over_a_source_of_which_only_a_part_is_read(sequence_length):
    read = 0

    def counting(text, **options):
        nonlocal read
        ids = numbers(text)
        read += len(ids["input_ids"])
        return ids

    source = documents_of([50] * 20_000)
    batches = calibration_batches(
        counting, source, num_samples=256, sequence_length=sequence_length
    )
    tenths = torch.cat(batches).flatten() * 10 // 1_000_000
    assert set(tenths.tolist()) == set(range(10))
    drawn = 256 * sequence_length
    assert 2 * drawn <= read <= 2 * drawn + 5 * sequence_length


def test_documents_are_joined_by_blank_lines_and_tokenized_as_a_prompt_is():
    texts = []

    def recording(text, **options):
        texts.append(text)
        return {"input_ids": [99, *numbers(text)["input_ids"]]}

    batches = calibration_batches(recording, ["1", "2", "3"], num_samples=1, sequence_length=4)
    assert texts == ["", "1\n\n2\n\n3\n\n"]
    assert batches[0].tolist() == [[99, 1, 2, 3]]


def test_a_text_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1\n2\n\n3\n")
    texts = []

    def recording(text, **options):
        texts.append(text)
        return numbers(text)

    calibration_batches(recording, path, num_samples=1, sequence_length=3)
    assert texts == ["", "1\n2\n\n3\n\n"]


@pytest.mark.parametrize(
    ("name", "repository", "arguments"),
    [
        ("wikitext2", "Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}),
        (
            "c4",
            "allenai/c4",
            {
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "split": "train",
            },
        ),
    ],
)
def test_corpora_are_the_train_splits(name, repository, arguments, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_dict({"text": documents_of([10] * 10)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    batches = calibration_batches(numbers, name, num_samples=2, sequence_length=7)
    assert [batch.shape for batch in batches] == [(1, 7)] * 2
    assert asked == [(repository, arguments)]


def test_a_short_model_max_length_warns_of_nothing(monkeypatch):
    vocabulary = {"[UNK]": 0} | {str(i): i for i in range(1, 100)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=8, unk_token="[UNK]"
    )
    warnings = []
    logger = "transformers.tokenization_utils_base.logger"
    monkeypatch.setattr(f"{logger}.warning", lambda *args, **_: warnings.append(args))
    batches = calibration_batches(tokenizer, documents_of([99]), num_samples=2, sequence_length=20)
    assert [batch.shape for batch in batches] == [(1, 20)] * 2
    assert warnings == []
    tokenizer(documents_of([99])[0])  # what it would have said
    assert "sequence length is longer" in warnings[0][0]


def test_real_text_with_a_real_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-opt")
    path = shared / "data" / "text" / "wikitext103-excerpt.json"
    batches = calibration_batches(tokenizer, path, num_samples=16, sequence_length=128)
    text = "\n\n".join(json.loads(path.read_text(encoding="utf-8")))
    for batch in batches:
        pieces = tokenizer.decode(batch[0]).split("\n\n")
        # A window may begin or end inside a character of several bytes.
        assert all(piece.strip("\ufffd") in text for piece in pieces)
        assert max(map(len, pieces)) > 100


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, r"`num_samples` must be at least 1, got 0\."),
        ({"sequence_length": -1}, ValueError, r"`sequence_length` must be at least 1, got -1\."),
        ({"num_samples": 1.5}, TypeError, r"`num_samples` must be a whole number, got 1\.5\."),
        ({"seed": "x"}, TypeError, r"`seed` must be a whole number, got 'x'\."),
        ({"sequence_length": True}, TypeError, r"`sequence_length` must be a whole number, got Tr"),
        (
            {"num_samples": 30, "sequence_length": 40},
            ValueError,
            r"`source` must hold 1,200 tokens for 30 windows of 40, got 1,000\. Ask for "
            r"`num_samples=25` or a smaller `sequence_length`, or add text\.",
        ),
        (
            {},
            ValueError,
            r"must hold 262,144 tokens .*, got 1,000\. Ask for a smaller `sequence_length`, or",
        ),
    ],
)
def test_bad_numbers(arguments, error, message):
    with pytest.raises(error, match=message):
        calibration_batches(numbers, documents_of([100] * 10), **arguments)


def test_a_wrong_tokenizer_is_said_before_anything_is_read():
    with pytest.raises(TypeError, match=r"`tokenizer` must be .*, got None\."):
        calibration_batches(None, "no/such/file.txt")

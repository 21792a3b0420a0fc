"""`haq generate`: what a model writes is what Python lets it write."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import haq
from haq.cli import terminal
from tests.test_cli import SOURCE, done, refused, run

PROMPT = "def add_7(first, second):"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded to nearest, which takes no time."""
    folder = tmp_path_factory.mktemp("made") / "int8"
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    config = haq.QuantizationConfig(smoothing="none", rounding="nearest")
    haq.quantize_model(model, [tokenizer(PROMPT, return_tensors="pt")["input_ids"]], config)
    haq.save_pretrained(model, folder, tokenizer)
    return folder


def written(folder: Path, **options: Any) -> tuple[str, int]:
    """What Python writes, and how many tokens it read."""
    model = (
        AutoModelForCausalLM.from_pretrained(SOURCE, dtype="auto")
        if folder == SOURCE
        else haq.from_pretrained(folder)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**inputs, **options)
    return tokenizer.decode(tokens[0], skip_special_tokens=True), inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_generate_writes_what_python_writes(kind: str, int8: Path) -> None:
    folder = int8 if kind == "int8" else SOURCE
    expected, _ = written(folder, max_new_tokens=12, do_sample=False)
    assert expected.startswith(PROMPT)
    assert len(expected) > len(PROMPT)
    assert done("generate", folder, PROMPT, "--max-new-tokens", 12) == f"{expected}\n"


def test_generate_prints_json(int8: Path) -> None:
    expected, given = written(int8, max_new_tokens=12, do_sample=False)
    values = json.loads(done("generate", int8, PROMPT, "--max-new-tokens", 12, "--json"))
    assert values.pop("seconds") > 0
    assert values == {
        "text": expected,
        "prompt_tokens": given,
        "new_tokens": 12,
        "finish_reason": "length",
        "offload": None,
    }


def test_generate_says_when_the_model_has_ended(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = haq.from_pretrained(int8), AutoTokenizer.from_pretrained(int8)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    new = tokens[inputs["input_ids"].shape[1] :].tolist()
    end = new.index(new[4])
    # A model for which that token is the end of a text.
    model.generation_config.eos_token_id = new[4]
    haq.save_pretrained(model, tmp_path / "ending", tokenizer)
    for most in (12, end + 1):
        options = ("--max-new-tokens", most, "--json")
        values = json.loads(done("generate", tmp_path / "ending", PROMPT, *options))
        assert (values["new_tokens"], values["finish_reason"]) == (end + 1, "stop")


def test_generate_samples_by_the_seed(int8: Path) -> None:
    def sample(seed: int) -> str:
        return done("generate", int8, PROMPT, "--sample", "--seed", seed, "--max-new-tokens", 20)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_temperature_and_top_p_sample(int8: Path) -> None:
    options = {"temperature": 1.5, "top_p": 0.7}
    expected, _ = written(int8, max_new_tokens=12, do_sample=True, **options)
    asked = ("--temperature", 1.5, "--top-p", 0.7, "--max-new-tokens", 12)
    assert done("generate", int8, PROMPT, *asked) == f"{expected}\n"
    greedy = done("generate", int8, PROMPT, "--max-new-tokens", 12)
    assert expected.strip() != greedy.strip()


def test_the_prompt_from_standard_input(int8: Path) -> None:
    from typer.testing import CliRunner

    from haq.cli.commands import app

    arguments = ["generate", str(int8), "-", "--max-new-tokens", "12"]
    result = CliRunner().invoke(app, arguments, input=f"{PROMPT}\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == done("generate", int8, PROMPT, "--max-new-tokens", 12)


@pytest.fixture
def chatting(int8: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    model, tokenizer = haq.from_pretrained(int8), AutoTokenizer.from_pretrained(int8)
    tokenizer.chat_template = (
        "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}def{% endif %}"
    )
    haq.save_pretrained(model, tmp_path / "chatting", tokenizer)
    return tmp_path / "chatting"


def test_chat_prints_the_answer_alone(chatting: Path) -> None:
    said = "# user: add two numbers\ndef"
    whole = done("generate", chatting, said, "--max-new-tokens", 12)
    answer = done("generate", chatting, "add two numbers", "--chat", "--max-new-tokens", 12)
    assert whole == said + answer


def test_a_person_sees_the_words_as_they_come(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    expected = done("generate", int8, PROMPT, "--max-new-tokens", 12)
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdout", Terminal())
    from haq.cli import generation

    generation.generate(
        str(int8),
        PROMPT,
        max_new_tokens=12,
        chat=False,
        sampling=generation.Sampling(False, None, None),
        seed=0,
        tiers=generation.Tiers.checked(None, None, None),
        as_json=False,
    )
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece.strip()]) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "must hold at least one token"),
        ((PROMPT, "--chat"), "has a chat template, and this one has none"),
        ((PROMPT, "--max-new-tokens", 600), "must be at most 512 tokens, the positions of the"),
        ((PROMPT, "--temperature", 0), "`--temperature` must be above 0, got 0.0."),
        ((PROMPT, "--temperature", "nan"), "`--temperature` must be above 0, got nan."),
        ((PROMPT, "--top-p", 1.5), "`--top-p` must be above 0 and at most 1, got 1.5."),
        ((PROMPT, "--statistics", "nowhere.npz"), "nowhere.npz"),
    ],
)
def test_what_cannot_be_written(arguments: tuple[Any, ...], message: str, int8: Path) -> None:
    assert message in refused("generate", int8, *arguments)


def test_the_longest_answer_that_is_proposed_is_possible(int8: Path) -> None:
    message = refused("generate", int8, PROMPT, "--max-new-tokens", 600)
    proposed = int(message.rpartition(" ")[2].rstrip("."))
    assert run("generate", int8, PROMPT, "--max-new-tokens", proposed).exit_code == 0
    refused("generate", int8, PROMPT, "--max-new-tokens", proposed + 1)

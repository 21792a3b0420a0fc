"""Every code block of README and the documentation runs, a page from top to bottom.

A page's blocks run in one namespace and one temporary directory, `python` blocks as they stand and
`haq` commands of `console` blocks by the code of the command line. What a test machine lacks is
replaced by what is in `SUBSTITUTIONS`; what cannot be run is in `NOT_RUN`, with the reason. All
else fails: a block that is skipped without a word is one that nobody tried.
"""

import contextlib
import io
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import haq
from haq.cli import app
from haq.model.blocks import find_blocks

REPOSITORY = Path(__file__).parents[1]
TINY_MODELS = REPOSITORY / "examples" / "tiny_models"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]

# Text of a page and what takes its place, in Python and in commands, in this order.
SUBSTITUTIONS = (
    # Models of the hub: two blocks of the trained ones of the repository. See `workshop`.
    (r"facebook/opt-125m|Qwen/Qwen3-0\.6B", "models/opt"),
    (r"mistralai/Mixtral-8x7B-v0\.1", "models/mixtral"),
    # Corpora of the hub: a small file.
    (r'"(?:wikitext2|c4)"', '"my-text.jsonl"'),
    # A GPU. The budget leaves some experts of the small Mixtral on the other side.
    (r'f"cuda:\{rank\}"|"cuda"', '"cpu"'),
    (r"--device cuda\b", "--device cpu"),
    (r"\b22GiB\b", "143MiB"),
    # Time, and as little text as there is.
    (r"(calibration_batches\([^()=]*)\)", r"\1, num_samples=1, sequence_length=1)"),
    (r"\bnum_samples=\d+", "num_samples=4"),
    (r"\bsequence_length=\d+", "sequence_length=64"),
    (r"\bmax_new_tokens=\d+", "max_new_tokens=8"),
    (r"\[:, :8192\]", "[:, :512]"),
    (r"\btext\[80:\]", "text[80:90]"),
)

# Options of commands that make them quick, whatever the page says.
QUICK = {
    "quantize": {"--num-samples": "4", "--sequence-length": "64"},
    "profile": {"--num-samples": "4", "--sequence-length": "64"},
    "evaluate": {"--max-tokens": "512", "--sequence-length": "64"},
    "generate": {"--max-new-tokens": "8"},
    "inspect": {},
}

# Options whose default is a corpus of the hub.
READS = {"quantize": "--calibration", "profile": "--text", "evaluate": "--text"}

# What a command of a page begins with, and why it is not run.
NOT_RUN = {
    "make": "it would set up another environment; that its target exists is a test of its own",
    ".venv/bin/python": "an interpreter that waits for somebody to type",
    ".venv/bin/pre-commit": "it would change the hooks of the clone",
    "pip": "everything is installed, and there may be no network",
    "pytest": "tests do not run tests",
    "python": "examples and scripts have tests of their own",
    "torchrun": "tests/test_processes.py starts processes as it does",
    "vllm": "it is no requirement; `make vllm` serves what haq exports",
}

# What a page must have printed, as patterns, beside the first lines of its `text` blocks.
PRINTS = {
    "README.md": [
        r"layers with 3,145,728 weights are int8",
        r"KL\(reference \|\| model\)",
        r"expected hit rate",
        r"% of choices on the GPU",
    ],
    # Some experts are on either side: else the page would run without what it is about.
    "docs/offloading.md": [r"latency: (?!0 |16 )\d+ of 16 experts resident"],
    "docs/guides/mixtral.md": [r"latency: (?!0 |16 )\d+ of 16 experts resident"],
}

# Int8 models that a page takes for granted, because another one made them.
GIVEN = {
    "docs/offloading.md": {"mixtral-int8": "mixtral"},
    "docs/guides/devices.md": {"opt-int8": "opt"},
}

LANGUAGES = {"python", "console", "text", "json", "bibtex"}
_FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins at, and what stands before it."""

    language: str
    text: str
    line: int
    before: str


def blocks_of(text: str) -> list[Block]:
    found, end = [], 0
    for match in _FENCE.finditer(text):
        found.append(
            Block(
                match[2].strip(),
                textwrap.dedent(match[3]),
                text[: match.start()].count("\n") + 1,
                text[end : match.start()],
            )
        )
        end = match.end()
    return found


def commands_of(block: Block) -> list[str]:
    """Commands behind a prompt, with the lines that go on behind a backslash."""
    lines = block.text.replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines if line.strip()), block
    return [line[2:] for line in lines if line.strip()]


def substituted(text: str) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text)
    return text


def quick(words: list[str]) -> list[str]:
    """A command of `haq` with less work, and nothing to read from the hub."""
    command, words = words[0], list(words)
    if command in READS and READS[command] not in words:
        words += [READS[command], "my-text.jsonl"]
    for option, value in QUICK[command].items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def without_numbers(line: str) -> str:
    """What is the same on every machine: words, without numbers, widths and backends."""
    return " ".join(_NUMBER.sub("N", re.sub(r"backend=\w+", "backend", line)).split())


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, int8 models and text that pages are given."""
    folder = tmp_path_factory.mktemp("documentation")
    functions = [
        f"def add_{i}(one, other):\n    '''Add {i} to both.'''\n    return one + other + {i}\n"
        for i in range(80)
    ]
    (folder / "my-text.txt").write_text("\n\n".join(functions))
    lines = [json.dumps({"text": function}) for function in functions]
    (folder / "my-text.jsonl").write_text("\n".join(lines))
    batches = [torch.randint(5, 2000, (1, 64)) for _ in range(2)]
    config = haq.QuantizationConfig(smoothing="none", rounding="nearest")
    for name in ("opt", "mixtral"):
        source = _shortened(TINY_MODELS / f"{name}-python", folder / "models" / name)
        output = folder / "int8" / name
        haq.quantize_checkpoint(source, output, batches, config, progress=False)
    return folder


def _shortened(source: Path, target: Path) -> Path:
    """A checkpoint with the first two blocks of another, and a template for chats."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    del find_blocks(model)[1][2:]
    model.config.num_hidden_layers = 2
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    (target / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return target


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page runs: a directory that looks like a clone with some text in it."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    for name in ("models", "my-text.txt", "my-text.jsonl"):
        (tmp_path / name).symlink_to(workshop / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Page:
    """Runs the blocks of a page, and keeps what they printed.

    Attributes:
        ran: lines at which blocks begin that were run, or whose commands all were or are excused.
        written: everything that Python printed.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(REPOSITORY).as_posix()
        self.blocks = blocks_of(path.read_text())
        self.ran: list[int] = []
        self.written = ""
        self._last = ""
        self._namespace: dict[str, Any] = {"__name__": "page"}

    def run(self) -> None:
        for block in self.blocks:
            assert block.language in LANGUAGES, f"{self.name}:{block.line}: {block.language!r}"
            if block.language == "python":
                self._python(block)
            elif block.language == "console":
                self._console(block)
            elif block.language == "text" and not block.before.strip():
                self._output(block)

    def _python(self, block: Block) -> None:
        code = compile(substituted(block.text), f"{self.name}:{block.line}", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as written:
            exec(code, self._namespace)
        self._last = written.getvalue()
        self.written += self._last
        self.ran.append(block.line)

    def _console(self, block: Block) -> None:
        self._last = ""
        for command in commands_of(block):
            words = shlex.split(substituted(command), comments=True)
            if words[0] == "haq":
                result = CliRunner().invoke(app, quick(words[1:]))
                assert result.exit_code == 0, f"{self.name}: {command}\n{result.output}"
                self._last += result.stdout
            else:
                assert words[0] in NOT_RUN, f"{self.name}: {command}"
        self.ran.append(block.line)

    def _output(self, block: Block) -> None:
        """A text block directly behind code shows what the code prints."""
        first = block.text.strip().splitlines()[0]
        printed = [without_numbers(line) for line in self._last.splitlines()]
        assert without_numbers(first) in printed, f"{self.name}:{block.line}: {first}"


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def lines_with_code(text: str) -> Iterator[int]:
    """Where code begins, by a look at lines alone."""
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*(```|~~~)\s*(python|py|console|sh|bash|shell)\b", line):
            yield number


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_runs_from_top_to_bottom(path: Path, place: Path, workshop: Path) -> None:
    for name, model in GIVEN.get(name_of(path), {}).items():
        (place / name).symlink_to(workshop / "int8" / model)
    page = Page(path)
    page.run()
    assert page.ran == list(lines_with_code(path.read_text()))
    for pattern in PRINTS.get(name_of(path), ()):
        assert re.search(pattern, page.written), pattern


def test_the_readme_has_three_blocks() -> None:
    blocks = blocks_of((REPOSITORY / "README.md").read_text())
    assert [block.language for block in blocks].count("python") == 3


def test_every_excuse_is_needed() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page.read_text())]
    commands = [c for block in blocks if block.language == "console" for c in commands_of(block)]
    words = {shlex.split(command, comments=True)[0] for command in commands}
    assert words == {"haq", *NOT_RUN}
    code = "\n".join(block.text for block in blocks if block.language in ("python", "console"))
    assert [pattern for pattern, _ in SUBSTITUTIONS if not re.search(pattern, code)] == []
    assert {*GIVEN, *PRINTS} <= {name_of(page) for page in PAGES}

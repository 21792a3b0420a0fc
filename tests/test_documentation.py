"""What README and the documentation say of the repository is so: names, targets, files, numbers."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from typer.main import get_command

import haq
from haq.checkpoint.load import _by_default, _int8_experts, _int8_linear
from haq.cli import app
from haq.model.experts import fused_experts
from haq.model.linears import linears
from haq.model.published import skeleton
from haq.offload.collect import experts_modules
from haq.offload.plan import make_budget
from haq.offload.rehearsal import rehearse
from haq.offload.weights import Int8Weights
from tests.test_documentation_code import Page, blocks_of, lines_with_code

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


# --- What is mentioned exists ---------------------------------------------------------------------


def test_every_make_target_that_is_mentioned_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for page in PAGES:
        mentioned = set(re.findall(r"(?:`|\$ )make ([a-z]+)", page.read_text()))
        assert mentioned <= targets, name_of(page)
    assert {"quickstart", "test", "check"} <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_mentioned_exists(page: Path) -> None:
    # Names in the repository, not those of other projects, which stand beside their own.
    text = re.sub(r"^\[\^.*?(?=^\[\^|\Z)", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    pattern = r"\b((?:benchmarks|examples|docs|src|tests)/[\w./-]+\.(?:py|md|json|ipynb|toml))"
    missing = {n for n in re.findall(pattern, text) if not (REPOSITORY / n).is_file()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES[:2], ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Those between pages of the documentation are for mkdocs to check."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        assert (REPOSITORY / path).exists(), target
        if anchor:
            assert anchor in set(anchors_of((REPOSITORY / path).read_text())), target


def anchors_of(text: str) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def test_every_page_can_be_found() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[2:])


def test_every_public_name_is_in_the_api() -> None:
    listed = re.findall(r"^::: haq\.([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert set(haq.__all__) <= set(listed)
    for name in listed:
        module, _, leaf = f"haq.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), leaf), name


def test_every_picture_is_small_and_says_what_it_shows() -> None:
    for picture in (DOCS / "pictures").iterdir():
        text = picture.read_text()
        assert picture.suffix == ".svg"
        assert picture.stat().st_size < 10_000
        assert "<title>" in text
        sizes = re.findall(r'font-size="([\d.]+)"', text)
        assert min(map(float, sizes)) >= 12


def test_the_page_of_the_command_line_lists_every_command() -> None:
    listed = re.findall(r"^\| `haq (\w+)", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(get_command(app).commands)


def texts_of(source: str) -> Iterator[str]:
    """Every text in a program, with dots in the place of what is computed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_on_the_page_about_architectures_are_those_of_the_code() -> None:
    section = (DOCS / "architectures.md").read_text().partition("## What fails")[2]
    table = re.findall(r"^\| (?!---|message)(.*?) \|", section, re.MULTILINE)
    messages = [m for cell in table for m in re.findall(r"`([^`]{20,})`", cell)]
    assert len(messages) == 7
    known = [
        re.sub(r"`", "", text)
        for file in (REPOSITORY / "src").rglob("*.py")
        for text in texts_of(file.read_text())
    ]
    for message in messages:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text) for text in known), message


@pytest.mark.parametrize("page", PAGES[2:], ids=name_of)
def test_no_line_of_code_is_cut(page: Path) -> None:
    """A page of the site shows about 84 characters."""
    code = re.findall(
        r"^ *```(?:python|console)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [line for block in code for line in block.splitlines()]
    assert [line for line in lines if len(line) > 84] == []


# --- Numbers --------------------------------------------------------------------------------------


def mixtral_in_int8() -> Any:
    """Mixtral-8x7B as `from_pretrained` makes it, but for the numbers in its tensors."""
    with _by_default(torch.bfloat16):
        model = skeleton(MixtralForCausalLM, MixtralConfig())
    model.config.dtype = torch.bfloat16
    for name, module in fused_experts(model).items():
        model.set_submodule(name, _int8_experts(module, True))
    for name, linear in linears(model).items():
        if name.startswith("model.layers."):
            shape = linear.out_features, linear.in_features
            model.set_submodule(name, _int8_linear(*shape, False, False))
    return model


def test_as_many_experts_fit_as_the_guide_says() -> None:
    rows = re.findall(
        r"^\| (\d+GiB) \| (.+?) \| (.+?) \| (.+?) \|$",
        (DOCS / "guides/mixtral.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 5
    model = mixtral_in_int8()
    modules = experts_modules(model)
    weights = [Int8Weights(module) for module in modules.values()]
    for length, column in ((1024, 1), (4096, 2), (32768, 3)):
        config = haq.OffloadConfig(max_length=length)
        rehearsal = rehearse(model, 1, length, modules)
        for row in rows:
            arguments = model, modules, weights, torch.device("cpu"), row[0], config, rehearsal
            if row[column] == "does not fit":
                with pytest.raises(ValueError, match="must be at least"):
                    make_budget(*arguments)
                continue
            room = make_budget(*arguments).room_for_experts(weights)
            assert room // weights[0].expert_bytes == int(row[column]), (row[0], length)


def test_the_comparison_counts_its_own_lines() -> None:
    text = (DOCS / "comparison.md").read_text()
    code = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.search(r"^\| haq \| (\d+) \|", text, re.MULTILINE)
    assert code is not None
    assert lines is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) == int(lines[1])


def rows_of_others() -> Iterator[tuple[str, list[str]]]:
    """Cells of the comparison that speak of others than haq, by the first cell of their row."""
    for section in (DOCS / "comparison.md").read_text().split("\n## ")[1:]:
        # Tools are the rows of the tables of jobs, and the columns of those of features.
        first = 1 if section.startswith("Job") else 2
        for row in re.findall(r"^\| (?!---|\| |haq \|)(.*) \|$", section, re.MULTILINE):
            name, *cells = row.split(" | ")
            yield name, cells[first - 1 :]


def test_every_cell_of_the_comparison_has_a_source() -> None:
    """What is said of others: a footnote, or a dash."""
    text = (DOCS / "comparison.md").read_text()
    used = set(re.findall(r"(?<!^)\[\^(\w+)\](?!:)", text, re.MULTILINE))
    assert used == set(re.findall(r"^\[\^(\w+)\]:", text, re.MULTILINE))
    rows = list(rows_of_others())
    assert len(rows) > 30
    for name, cells in rows:
        assert [cell for cell in cells if "[^" not in cell and cell != "-"] == [], name


# --- The tool that runs pages ---------------------------------------------------------------------


def page_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Page:
    monkeypatch.setattr("tests.test_documentation_code.REPOSITORY", tmp_path)
    (tmp_path / "page.md").write_text(text)
    return Page(tmp_path / "page.md")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```\n", "assert"),
        ("```console\n$ rm -r everything\n```\n", "rm -r everything"),
        ("```console\n$ haq generate nowhere text\n```\n", "haq generate nowhere"),
        ("```console\nno prompt\n```\n", "no prompt"),
        ("```python\nprint('one 1')\n```\n\n```text\ntwo 1\n```\n", "two 1"),
        ("```ruby\nputs 1\n```\n", "ruby"),
        ("```\nnothing said\n```\n", "''"),
    ],
)
def test_what_is_wrong_fails(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError) as caught:
        page_of(tmp_path, monkeypatch, text).run()
    assert message in str(caught.value) or message == "assert"


def test_what_is_right_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "1. A list:\n\n    ```python\n    print('one', 17)\n    ```\n\n    ```text\n    one 4\n"
        "    ```\n\nProse.\n\n```text\nnot the output of anything\n```\n\n"
        "```console\n$ make \\\n    test  # twice\n$ pip install x\n```\n"
    )
    page = page_of(tmp_path, monkeypatch, text)
    page.run()
    assert page.written == "one 17\n"
    assert page.ran == list(lines_with_code(text)) == [3, 17]


def test_a_block_that_is_not_seen_is_noticed() -> None:
    """A fence that nobody closed, or of another kind, is in no list of blocks."""
    text = "~~~python\nx\n~~~\n\n```python\nx\n"
    assert blocks_of(text) == []
    assert list(lines_with_code(text)) == [1, 5]

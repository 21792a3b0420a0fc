"""The notebooks run from top to bottom in a kernel of their own, and are stored as they ran."""

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.run_notebook import METADATA

SCRIPT = Path(__file__).with_name("run_notebook.py")
EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = ["quantize.ipynb", "offload.ipynb"]

# Where a user may start a notebook: in the repository, or where it is.
PLACES = [".", "examples"]

# A whole path, not a division or a closing tag.
_ABSOLUTE_PATH = re.compile(r"(?<![\w<.)\]}/])/\w[\w.-]+/\w|[A-Z]:\\\\?\w")


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(output: Any) -> list[str]:
    """What of an output can be read."""
    data = output.get("data", {})
    return [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]


def kinds(cell: Any) -> list[str]:
    """What a cell shows: "stdout", "image/png". Standard error is for what a machine lacks."""
    found = []
    for output in cell.outputs:
        found += [output.name] if output.output_type == "stream" else sorted(output.data)
    return [kind for kind in found if kind != "stderr"]


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder like the repository: with the examples, and nothing else."""
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "tiny_models").symlink_to(EXAMPLES / "tiny_models")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), [*zip(NOTEBOOKS, PLACES, strict=True)])
def test_it_runs_and_the_stored_outputs_are_of_the_same_kinds(
    name: str, place: str, copies: Path
) -> None:
    path = copies / name
    shutil.copyfile(EXAMPLES / name, path)
    # In a process of its own: Jupyter's event loops and sockets are not what is tested. What
    # somebody has set up for himself has no say.
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    result = subprocess.run(
        [sys.executable, SCRIPT, path, "--folder", copies / place],
        env={**os.environ, **dict.fromkeys(own, str(copies / "own")), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for stored, fresh in zip(
        code_cells(read(EXAMPLES / name)), code_cells(read(path)), strict=True
    ):
        assert kinds(stored) == kinds(fresh), f"Run {SCRIPT.name}: {fresh.source}"
    # Nothing was left in the folders where it can be started.
    assert {path.name for path in copies.iterdir()} <= {"examples", "own", name}
    assert [path.name for path in (copies / "examples").iterdir()] == ["tiny_models"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_finds_the_models_wherever_it_is_started(
    name: str, place: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copies / place)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("warnings.filters", [])
    names: dict[str, Any] = {}
    exec(code_cells(read(EXAMPLES / name))[0].source, names)
    assert (names["examples"] / "tiny_models" / "corpus.py").is_file()
    assert sys.path == [str(names["examples"])]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_stored_as_it_ran_and_says_nothing_of_a_machine(name: str) -> None:
    assert (EXAMPLES / name).stat().st_size < 300_000
    notebook = read(EXAMPLES / name)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in shown} <= {"stream", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in shown)
    for output in shown:
        for text in texts(output):
            found = _ABSOLUTE_PATH.search(text)
            assert found is None, text[found.start() : found.start() + 80]
    pictures = [o.data["image/png"] for o in shown if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert any("<table>" in o.data["text/html"] for o in shown if "text/html" in o.get("data", {}))


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("/home/me/haq/examples", True),
        ("loaded '/tmp/haq-x'", True),
        (r"C:\Users\me", True),
        ("<p>1</p><td>2</td>", False),
        ("KL(reference || model)  8 GB/s, 3 tok/s and/or", False),
    ],
)
def test_paths_are_told_from_other_text(text: str, is_path: bool) -> None:
    assert (_ABSOLUTE_PATH.search(text) is not None) == is_path

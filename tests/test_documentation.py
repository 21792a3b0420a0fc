"""What the README tells a reader to type works as it stands."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Where the blocks write to.
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = _PYTHON.findall((REPOSITORY / "README.md").read_text())
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})
    written = capsys.readouterr().out
    assert "layers with 3,145,728 weights are int8" in written
    assert "KL(reference || model)" in written
    assert "expected hit rate" in written
    assert "% of choices on the GPU" in written


def test_every_make_target_that_is_mentioned_exists() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    pages = [
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *REPOSITORY.glob("docs/*.md"),
    ]
    mentioned = {t for page in pages for t in re.findall(r"`?make ([a-z]+)`?", page.read_text())}
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert mentioned & targets >= {"quickstart", "test", "check"}

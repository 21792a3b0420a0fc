"""Compiled kernels on disk: found again, never half of one, and never in the way."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from haq.int8 import grid, matmul
from haq.int8.llvm import cache

needs_llvm = pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAQ_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_what_was_saved_is_loaded(folder: Path) -> None:
    assert cache.load("a") is None
    cache.save("a", b"one")
    cache.save("b", b"")
    assert (cache.load("a"), cache.load("b"), cache.load("c")) == (b"one", b"", None)
    cache.save("a", b"two")
    assert cache.load("a") == b"two"
    # Nothing is left of how they were written, and nobody else reads them.
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b"]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x" + b[41:]],
    ids=["cut", "empty", "another byte"],
)
def test_what_is_not_whole_is_not_loaded(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    cache.save("a", bytes(range(100)))
    (folder / "a").write_bytes(spoil((folder / "a").read_bytes()))
    assert cache.load("a") is None


def test_names_tell_apart_where_one_part_ends() -> None:
    assert len({cache.key_of("a", "bc"), cache.key_of("ab", "c"), cache.key_of("abc")}) == 3


def test_an_empty_variable_is_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAQ_KERNEL_CACHE", "")
    cache.save("a", b"one")
    assert cache.load("a") is None
    assert list(tmp_path.iterdir()) == []


def test_without_the_variable_it_is_where_caches_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HAQ_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    cache.save("a", b"one")
    assert (tmp_path / "caches/haq/kernels/a").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache.save("a", b"two")
    assert (tmp_path / "home/.cache/haq/kernels/a").exists()
    assert cache.load("a") == b"two"


def test_a_user_may_have_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HAQ_KERNEL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    cache.save("a", b"one")
    assert cache.load("a") is None


def test_nothing_is_left_of_what_could_not_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, content: bytes) -> int:
        file.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.save("a", b"one")
    assert list(folder.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_no_error(folder: Path) -> None:
    folder.write_text("a file")
    cache.save("a", b"one")
    assert cache.load("a") is None
    assert folder.read_text() == "a file"


def test_the_oldest_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MOST_FILES", 3)
    for age, name in enumerate("edcba"):
        cache.save(name, b"")
        os.utime(folder / name, (1000 + age, 1000 + age))
    cache.save("f", b"")
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b", "f"]


@needs_llvm
def test_a_kernel_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from haq.int8.llvm import compiler
    from haq.int8.llvm.rows import quantize_rows

    weight = torch.randn(9, 40)
    expected = grid.quantize_rows(weight)
    optimize, compiled = compiler.optimize, []
    monkeypatch.setattr(compiler, "optimize", lambda *a: compiled.append(a) or optimize(*a))

    def quantized() -> tuple[torch.Tensor, torch.Tensor]:
        """As a new process does it."""
        monkeypatch.setattr(compiler, "_kernels", {})
        out = torch.zeros(9, 40, dtype=torch.int8), torch.zeros(9, 1)
        quantize_rows(weight, None, *out)
        return out

    for times in (1, 1, 1):
        assert all(map(torch.equal, quantized(), expected))
        assert len(compiled) == times
    (stored,) = folder.iterdir()
    stored.write_bytes(stored.read_bytes()[:-100])
    assert all(map(torch.equal, quantized(), expected))
    assert len(compiled) == 2
    # For another processor, another kernel.
    here = compiler._what_is_here()
    monkeypatch.setattr(compiler, "_what_is_here", lambda: (*here, "another"))
    assert all(map(torch.equal, quantized(), expected))
    assert len(compiled) == 3
    assert len(list(folder.iterdir())) == 2

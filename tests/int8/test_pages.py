"""Weights in large pages: the same numbers, and nothing but another kind of memory."""

import mmap
from pathlib import Path

import pytest
import torch

from haq.int8.llvm import pages
from haq.int8.llvm.pages import in_large_pages

PAGE = 2**21
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def weight(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-128, 128, (size // 1024, 1024), dtype=torch.int8, generator=generator)


def large_bytes() -> int:
    """What this process has in large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("AnonHugePages:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(pages._ADVICE is None, reason="needs Linux")
@pytest.mark.parametrize("size", [PAGE, 3 * PAGE + 5 * 1024])
def test_the_numbers_are_the_same_in_memory_of_their_own(size: int) -> None:
    given = weight(size)
    copy = in_large_pages(given)
    assert torch.equal(copy, given)
    assert copy.is_contiguous()
    assert copy.data_ptr() % PAGE == 0
    given[0, 0] += 1
    assert copy[0, 0] == given[0, 0] - 1
    copy[1, 1] = 7  # It can be written to.
    assert copy[1, 1] == 7


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="the system has none"
)
def test_they_are_in_large_pages_for_as_long_as_they_live() -> None:
    before = large_bytes()
    copy = in_large_pages(weight(16 * PAGE))
    if large_bytes() == before:
        pytest.skip("the system has none left")
    assert large_bytes() - before >= 8 * PAGE
    del copy
    assert large_bytes() == before


def test_what_fills_no_page_stays() -> None:
    given = weight(PAGE - 1024)
    assert in_large_pages(given) is given


def test_a_system_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weight(PAGE)
    monkeypatch.setattr(pages, "_ADVICE", None)
    assert in_large_pages(given) is given


@pytest.mark.skipif(pages._ADVICE is None, reason="needs Linux")
def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    given = weight(PAGE)
    assert in_large_pages(given) is given

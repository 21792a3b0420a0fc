"""Weights in large pages: the same numbers, and nothing but another kind of memory."""

import contextlib
import mmap
from pathlib import Path

import pytest
import torch

from haq.int8 import matmul
from haq.int8.llvm import pages
from haq.int8.llvm.pages import in_large_pages, new_bytes
from haq.int8.matrix import quantize_matrix
from haq.nn import Int8Linear

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


@pytest.mark.skipif(pages._ADVICE is None, reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_new_memory_is_there_already(dtype: torch.dtype) -> None:
    room = new_bytes((4 * 1024 + 3, 1024), dtype)
    assert (room.shape, room.dtype, room.device.type) == ((4099, 1024), dtype, "cpu")
    assert room.is_contiguous()
    assert room.data_ptr() % PAGE == 0
    room.fill_(5)
    assert in_large_pages(room) is room
    part = room[1024:]
    assert in_large_pages(part) is part
    copy = room.clone()
    assert in_large_pages(copy) is not copy
    assert torch.equal(in_large_pages(copy), room)


@pytest.mark.skipif(pages._ADVICE is None, reason="needs Linux")
def test_memory_that_was_given_back_is_not_taken_for_it() -> None:
    before = set(pages._mapped)
    room = new_bytes((PAGE,))
    (address,) = set(pages._mapped) - before
    del room
    assert address not in pages._mapped


def test_new_memory_that_fills_no_page() -> None:
    before = len(pages._mapped)
    room = new_bytes((3, 1024))
    assert (room.shape, room.dtype) == ((3, 1024), torch.int8)
    assert len(pages._mapped) == before


@pytest.mark.skipif(pages._ADVICE is None, reason="needs Linux")
def test_a_weight_that_is_quantized_stays_where_it_is() -> None:
    """A layer that is made of it does not copy it."""
    integers, scale = quantize_matrix(torch.randn(2048, 1024))
    assert integers.untyped_storage().data_ptr() in pages._mapped
    with matmul.use_backend("llvm") if matmul.compiles() else contextlib.nullcontext():
        layer = Int8Linear(integers, scale)
    assert torch.equal(layer.weight, integers)
    if matmul.compiles():
        assert layer.weight.data_ptr() == integers.data_ptr()


def test_a_system_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weight(PAGE)
    monkeypatch.setattr(pages, "_ADVICE", None)
    assert in_large_pages(given) is given
    assert new_bytes((PAGE,)).shape == (PAGE,)


@pytest.mark.skipif(pages._ADVICE is None, reason="needs Linux")
def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    given = weight(PAGE)
    assert in_large_pages(given) is given
    assert new_bytes((PAGE,)).shape == (PAGE,)

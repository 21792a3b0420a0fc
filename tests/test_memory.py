"""What the C library holds back is given to the system, where there is a way to ask for it."""

import ctypes
from pathlib import Path

import pytest
import torch

from haq import memory


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    memory._malloc_trim.cache_clear()


def resident() -> int:
    """Pages of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim") or not Path("/proc/self/statm").exists(),
    reason="needs glibc, and Linux to tell what is in memory",
)
def test_what_was_freed_between_things_that_stay_is_given_back() -> None:
    """Small tensors keep the heap from shrinking over pieces of 64 KiB, which glibc keeps."""
    pieces, stays = [], []
    for _ in range(1024):
        pieces.append(torch.ones(2**14))
        stays.append(torch.ones(64))
    before = resident()
    del pieces
    memory.give_back()
    assert (before - resident()) * 4096 > 0.8 * 1024 * 2**16
    assert all(bool((tensor == 1).all()) for tensor in stays)


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: None) -> None:
        raise error("no such function")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    memory.give_back()
    assert memory._malloc_trim() is None

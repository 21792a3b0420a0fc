"""Sums of outer products by registers for matrices, against float64 of the same bfloat16."""

from typing import Any

import llvmlite.binding as llvm
import pytest
import torch
from torch import Tensor

from haq.int8.llvm import amx, compiler, outer
from haq.int8.llvm.dots import best_of
from haq.int8.llvm.outer import Blocks, Halves, add_outer

COMPILED: dict[bool, dict[tuple[Any, ...], compiler.Kernel]] = {}

SHAPES = {  # T, M, N
    "one block": (32, 32, 32),
    "one row": (1, 32, 64),
    "rows that fill no block": (75, 96, 32),
    "an odd number of them": (33, 64, 64),
    "in parts": (16 * 32 + 40, 64, 96),
    "several pieces": (40, 544, 1120),
}


@pytest.fixture(params=[True, False], ids=["instruction", "written out"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Halves:
    if not best_of(llvm.get_host_cpu_features()):
        pytest.skip("this processor has no AVX2")
    if request.param and outer.products_here() is None:
        pytest.skip("this processor does not multiply matrices of bfloat16")
    products = Halves(request.param)
    monkeypatch.setattr(outer, "products_here", lambda: products)
    monkeypatch.setattr(compiler, "_kernels", COMPILED.setdefault(request.param, {}))
    return products


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def blocks_of(rows: Tensor, *, left: bool) -> Blocks:
    blocks = Blocks(*rows.shape, left=left)
    blocks._memory.fill_(0x7F)  # What was not written would be seen.
    blocks.put(rows)
    return blocks


def exact(a: Tensor, b: Tensor) -> Tensor:
    return a.bfloat16().double().T @ b.bfloat16().double()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums(
    shape: tuple[int, int, int], threads: int, way: Halves, generator: torch.Generator
) -> None:
    tokens, rows, columns = shape
    a = torch.randn(tokens, rows, generator=generator)
    b = torch.randn(tokens, columns + 7, generator=generator)[:, :columns]
    whole = torch.randn(rows, columns + 5, generator=generator)
    beside, total = whole[:, columns:].clone(), whole[:, :columns]
    expected = total.double() + exact(a, b)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        add_outer(total, [(blocks_of(a, left=True), blocks_of(b, left=False))], tokens)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(whole[:, columns:], beside)


def test_a_part_of_the_columns(way: Halves, generator: torch.Generator) -> None:
    a = torch.randn(70, 128, generator=generator)
    total = torch.zeros(32, 96)
    add_outer(total, [(blocks_of(a, left=True), blocks_of(a, left=False))], 70, first=64)
    expected = exact(a[:, 64:96], a[:, :96])
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_that_come_later(way: Halves, generator: torch.Generator) -> None:
    a, b = (torch.randn(80, 32, generator=generator) for _ in range(2))
    left, right = blocks_of(a, left=True), Blocks(80, 32, left=False)
    right.put(b[:64])
    total = torch.zeros(32, 32)
    add_outer(total, [(blocks_of(a[:64], left=True), right)], 64)
    torch.testing.assert_close(total.double(), exact(a[:64], b[:64]), rtol=1e-5, atol=1e-4)
    right.put(b[64:], first=64)
    total.zero_()
    add_outer(total, [(left, right)], 80)
    torch.testing.assert_close(total.double(), exact(a, b), rtol=1e-5, atol=1e-4)


def test_columns_that_lie_in_one_piece(way: Halves, generator: torch.Generator) -> None:
    a = torch.randn(96, 40, generator=generator).T
    total = torch.zeros(96, 96)
    add_outer(total, [(blocks_of(a, left=True), blocks_of(a, left=False))], 40)
    torch.testing.assert_close(total.double(), exact(a, a), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [64, 40])
def test_columns_that_lie_in_one_piece_on_the_right(
    rows: int, way: Halves, generator: torch.Generator
) -> None:
    a = torch.randn(rows, 96, generator=generator)
    weight = torch.randn(128, rows + 3, generator=generator)[:, :rows]
    total = torch.zeros(96, 128)
    add_outer(total, [(blocks_of(a, left=True), blocks_of(weight.T, left=False))], rows)
    torch.testing.assert_close(total.double(), exact(a, weight.T), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("place", [(0, 0), (31, 40), (74, 95), (3, 17)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_whether_bfloat16_holds_them(
    place: tuple[int, int], turned: bool, way: Halves, generator: torch.Generator
) -> None:
    rows = torch.randn(96 if turned else 75, 96, generator=generator).bfloat16().float()
    given = rows.T.contiguous().T if turned else rows
    assert blocks_of(given, left=False).exact
    given[place] = 1 + 2.0**-9
    blocks = blocks_of(given, left=False)
    assert not blocks.exact
    blocks.put(rows if turned else rows.clone())
    assert not blocks.exact  # Of all that was written.
    rest = Blocks(*rows.shape, left=False, rest=True)
    rest.put(given)
    assert rest.exact  # A rest has none.


def test_what_bfloat16_leaves(way: Halves, generator: torch.Generator) -> None:
    a, ones = torch.randn(5, 32, generator=generator), torch.ones(5, 32)
    rest = Blocks(5, 32, left=True, rest=True)
    rest.put(a)
    total = torch.zeros(32, 32)
    add_outer(total, [(rest, blocks_of(ones, left=False))], 5)
    expected = (a - a.bfloat16().float()).bfloat16().double().sum(0)[:, None].expand(32, 32)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("feature", "permitted", "expected"),
    [(True, True, Halves()), (True, False, None), (False, True, None)],
)
def test_who_multiplies_such_matrices(
    feature: bool, permitted: bool, expected: Halves | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer.llvm, "get_host_cpu_features", lambda: {"amx-bf16": feature})
    monkeypatch.setattr(amx, "permitted", lambda: permitted)
    outer._has_instruction.cache_clear()
    try:
        assert outer.products_here() == expected
    finally:
        outer._has_instruction.cache_clear()


def test_what_is_not_a_number_stays_so(way: Halves) -> None:
    a = torch.ones(3, 32)
    a[1, 5] = torch.nan
    total = torch.zeros(32, 32)
    add_outer(total, [(blocks_of(a, left=True), blocks_of(torch.ones(3, 32), left=False))], 3)
    assert total[5].isnan().all()
    assert torch.equal(total[:5], torch.full((5, 32), 3.0))
    assert torch.equal(total[6:], torch.full((26, 32), 3.0))

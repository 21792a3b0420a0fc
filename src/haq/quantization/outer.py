"""Sums of outer products of rows: in bfloat16 where the processor multiplies matrices of that.

Three steps of the method are such sums, and most of its arithmetic: second moments, what columns of
a weight owe to those before them, and what a linear computes for many tokens. A number in bfloat16
has 8 bits, which would show; so each is two of them, one and what that leaves, but for integers and
weights that have no more. Their products are those of 16 bits, and faster than float32's. On other
processors it is these. Which way depends on the kind of processor alone: a job that goes on later
comes to the same integers.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from haq.int8 import matmul

if TYPE_CHECKING:  # It needs llvmlite.
    from haq.int8.llvm.packing import Blocks

# Of a symmetric sum only the part left of the diagonal is computed, so many rows at a time.
_ROWS_AT_ONCE = 1024

# Tokens that are in bfloat16 at the same time.
_TOKENS = 2048

# A number in bfloat16, and what is left of it.
_PARTS = (False, True)

# With fewer tokens it takes longer to lay out a weight than to multiply it.
_WORTH_BLOCKS = 256

# Columns are a multiple of it, or the sum is of float32.
_STEP = 32

_allowed: ContextVar[bool] = ContextVar("haq_outer_in_bfloat16", default=False)


@contextlib.contextmanager
def in_bfloat16() -> Iterator[None]:
    """Sums may be of bfloat16 inside, in this thread, where the processor is made for it."""
    before = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(before)


def add_left_of_diagonal(total: Tensor, rows: Tensor, scale: Tensor | None = None) -> None:
    """Add ``sum_t x_t x_t^T`` to rows of a matrix, up to the diagonal and a bit beyond.

    Args:
        total: float32 ``[K, K]``. Of each 1024 rows the columns up to the last of these
            rows are what they should be afterwards.
        rows: float32 ``[T, K]``; with a scale integers in [-256, 256], which bfloat16 holds.
        scale: float32 ``[T, 1]``, what they are multiplied by.
    """
    if scale is not None and _serves(rows, total):
        for some, of_them in zip(rows.split(_TOKENS), scale.split(_TOKENS), strict=True):
            _add_integers(total, some, of_them)
        return
    rows = rows if scale is None else rows * scale
    for here, left in _parts_of(total):
        total[here, left].addmm_(rows[:, here].T, rows[:, left])


def _parts_of(total: Tensor) -> Iterator[tuple[slice, slice]]:
    for start in range(0, len(total), _ROWS_AT_ONCE):
        yield slice(start, start + _ROWS_AT_ONCE), slice(start + _ROWS_AT_ONCE)


def _add_integers(total: Tensor, rows: Tensor, scale: Tensor) -> None:
    from haq.int8.llvm.outer import add_outer

    # An integer times a bfloat16 has 16 bits, and is exact in two of them. So the sum is one of
    # squares, of tokens that count 0.2 percent more or less: it has no direction below zero. With
    # products that are rounded it may have, if one token is thousands of times as large as others.
    weights = scale.square().bfloat16().float()
    right = _blocks(rows, left=False)
    terms = [(part, right) for part in _both(rows * weights)]
    for here, left in _parts_of(total):
        add_outer(total[here, left], terms, len(rows), here.start)


def linear(inputs: Tensor, weight: Tensor) -> Tensor | None:
    """``x @ weight.T`` of many tokens, where a weight is bfloat16's; None if float32 is to do it.

    Of a weight that is not, a second part would take as long as float32.

    Args:
        inputs: ``[T, K]``.
        weight: ``[N, K]``.

    Returns:
        Float32 ``[T, N]``.
    """
    if len(inputs) < _WORTH_BLOCKS or not _serves(inputs, weight, weight.T):
        return None
    if not torch.equal(weight[0], weight[0].bfloat16().float()):
        return None
    from haq.int8.llvm.outer import add_outer

    by_column = _blocks(weight.T, left=False)
    if not by_column.exact:
        return None
    tokens = functional.pad(inputs, (0, 0, 0, -len(inputs) % _STEP)).T
    total = inputs.new_zeros(tokens.shape[1], len(weight))
    add_outer(total, [(part, by_column) for part in _both(tokens)], len(tokens))
    return total[: len(inputs)]


class Debts(Protocol):
    """What columns of a weight owe to those before them."""

    def owed(self, shares: Tensor) -> Tensor:
        """``sum_j s_j d_j^T``, over all columns so far.

        Args:
            shares: ``[C, B]``, how much of the difference of each column so far those owe.

        Returns:
            ``[B, N]``.
        """

    def room(self, columns: int) -> Tensor:
        """Where the differences of the next columns are to be written: ``[B, N]``."""

    def take(self) -> None:
        """They are written."""


def debts_of(weight: Tensor) -> Debts:
    """None yet.

    Args:
        weight: float ``[N, K]``.
    """
    return _DebtsInBfloat16(weight) if _serves(weight, weight.T) else _Debts(weight)


class _Debts:
    def __init__(self, weight: Tensor) -> None:
        self._differences = weight.new_empty(weight.shape[1], weight.shape[0])
        self._known = self._next = 0

    def owed(self, shares: Tensor) -> Tensor:
        return shares.T @ self._differences[: self._known]

    def room(self, columns: int) -> Tensor:
        self._next = self._known + columns
        return self._differences[self._known : self._next]

    def take(self) -> None:
        self._known = self._next


class _DebtsInBfloat16:
    def __init__(self, weight: Tensor) -> None:
        from haq.int8.llvm.packing import Blocks

        self._rows, columns = weight.shape
        self._parts = [Blocks(columns, self._rows, left=False, rest=rest) for rest in _PARTS]
        self._room = weight.new_empty(0, self._rows)
        self._known = 0

    def owed(self, shares: Tensor) -> Tensor:
        from haq.int8.llvm.outer import add_outer

        (a, rest_of_a), (b, rest_of_b) = _both(shares), self._parts
        terms = [(a, b), (a, rest_of_b), (rest_of_a, b)]  # Of both rests it is nothing.
        total = shares.new_zeros(shares.shape[1], self._rows)
        add_outer(total, terms, len(shares))
        return total

    def room(self, columns: int) -> Tensor:
        if len(self._room) != columns:
            self._room = self._room.new_empty(columns, self._rows)
        return self._room

    def take(self) -> None:
        for part in self._parts:
            part.put(self._room, self._known)
        self._known += len(self._room)


def _both(rows: Tensor) -> list["Blocks"]:
    """Numbers in bfloat16, and what is left of them, on the left side."""
    return [_blocks(rows, left=True, rest=rest) for rest in _PARTS]


def _blocks(rows: Tensor, *, left: bool, rest: bool = False) -> "Blocks":
    from haq.int8.llvm.packing import Blocks

    blocks = Blocks(*rows.shape, left=left, rest=rest)
    blocks.put(rows)
    return blocks


def _serves(*tensors: Tensor) -> bool:
    """Whether these, and what they are multiplied with, may be of bfloat16."""
    kind = all(t.is_cpu and t.dtype == torch.float32 for t in tensors)
    sizes = all(t.shape[1] % _STEP == 0 for t in tensors)
    return _allowed.get() and kind and sizes and is_served_here()


def is_served_here() -> bool:
    """Whether the processor multiplies matrices of bfloat16, and haq's kernels are what runs."""
    if not matmul.compiles():
        return False
    from haq.int8.llvm import outer

    return outer.products_here() is not None

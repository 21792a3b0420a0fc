"""In which pieces a product is computed, and what memory that takes."""

import functools
from typing import NamedTuple

from haq.int8.llvm import abreast, compiler, fours, kernels, matrices, pairs
from haq.int8.llvm.words import bytes_of

# With few tokens, bytes of a weight that a thread takes at a time, and how often it is to come
# back at least: one that is slower then takes less. Where matrices are multiplied, rows.
_CHUNK_BYTES, _CHUNKS_PER_THREAD = 2**18, 4
_CHUNK_OF_MATRICES = 128

# Integers of a token begin where a line of the cache does.
_LINE = 64


class Pieces(NamedTuple):
    """What a thread does before it asks for more.

    Attributes:
        chunk: rows of a weight.
        block: tokens that they are multiplied with.
        strip: bytes that a thread needs for that.
    """

    chunk: int
    block: int
    strip: int


class Layout(NamedTuple):
    """Of the memory that a kernel is given.

    Attributes:
        chunk, block, strip: as in `Pieces`.
        few: as many tokens of a weight wait for its rows.
        stride: integers from one token to the next.
        integers: bytes of all of them. They are there twice, where tokens are many.
        total: bytes of everything, at whose end are scale and shift of each token, of four bytes.
    """

    chunk: int
    block: int
    strip: int
    few: int
    stride: int
    integers: int
    total: int


@functools.lru_cache(4096)
def layout(count: int, most: int, rows: int, width: int, threads: int) -> Layout:
    """How some tokens are multiplied.

    Args:
        count: of tokens in all.
        most: of them that one weight is multiplied with.
        rows: of each weight.
        width: of each weight.
        threads: that work.
    """
    dots = compiler.dots_here()
    few = kernels.few_of(dots, width)
    # With an odd number of lines, tokens do not push each other out of the cache.
    stride = (-(-width // _LINE) | 1) * _LINE
    rounded_up = count if most <= few else _up(count, dots.sums)
    integers = rounded_up * stride * bytes_of(dots.token)
    pieces = _pieces(most <= few, rows, width, threads)
    total = 2 * integers + threads * pieces.strip + 8 * count
    return Layout(*pieces, few, stride, integers, total)


@functools.cache
def _pieces(few: bool, rows: int, width: int, threads: int) -> Pieces:
    fair = -(-rows // (_CHUNKS_PER_THREAD * threads))
    dots = compiler.dots_here()
    if few:
        chunk = max(1, min(_CHUNK_BYTES // width, fair))
        return Pieces(chunk, kernels.few_of(dots, width), 0)
    if dots.matrices:
        chunk = _up(min(_CHUNK_OF_MATRICES, fair), matrices.STEP)
        return Pieces(chunk, matrices.MOST_TOKENS, matrices.room(chunk, width))
    step = abreast.rows_of(dots)
    if dots.unsigned:
        return Pieces(_up(min(fours.CHUNK, fair), step), fours.BLOCK, 0)
    chunk = _up(min(pairs.CHUNK, fair), step)
    return Pieces(chunk, pairs.BLOCK, pairs.room(dots, chunk))


def _up(number: int, step: int) -> int:
    """To a multiple of ``step``."""
    return -(-number // step) * step

"""Whether two ways of a layer are found to agree."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from haq.model.trials import Way, agree

# What a way may do more than another one.
KNOWN = Counter(mul=6)

X, ROTATION = torch.zeros(1, 1, 32, dtype=torch.bfloat16), torch.zeros(1, 1, 8)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
    """Something of everything that a layer is called with."""
    head = x.view(1, 1, 4, 8)
    keys, _ = cache.update(head * cos.to(x) + head.flip(-1) * sin.to(x), head, 0)
    return x + keys.sum(2).view(1, 1, 8).repeat(1, 1, 4)


def test_the_same_agrees() -> None:
    assert agree(rotated, rotated, X, ROTATION, KNOWN)


def test_other_numbers_do_not() -> None:
    def other(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        return rotated(x, sin, cos, cache)

    def beside(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        return rotated(x, cos, sin, cache) * 1.01

    def without_cache(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        head = x.view(1, 1, 4, 8)
        keys = head * cos.to(x) + head.flip(-1) * sin.to(x)
        return x + keys.sum(2).view(1, 1, 8).repeat(1, 1, 4)

    for way in (other, beside, without_cache):
        assert not agree(rotated, way, X, ROTATION, KNOWN)
        assert not agree(way, rotated, X, ROTATION, KNOWN)


def test_other_shapes_and_other_results_do_not() -> None:
    def flat(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Any:
        return rotated(x, cos, sin, cache)[0]

    def pair(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Any:
        return rotated(x, cos, sin, cache), None

    def nothing(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Any:
        return None

    for way in (flat, pair, nothing):
        assert not agree(rotated, way, X, ROTATION, KNOWN)
        assert not agree(way, rotated, X, ROTATION, KNOWN)


def test_one_operation_more_is_one_too_many() -> None:
    def with_more(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        return torch.clamp(rotated(x, cos, sin, cache), -1e9, 1e9)

    def with_products(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        result = rotated(x, cos, sin, cache)
        for _ in range(7):  # Six are known.
            result = result * 1.0
        return result

    assert not agree(with_more, rotated, X, ROTATION, KNOWN)
    assert agree(rotated, with_more, X, ROTATION, KNOWN)
    assert not agree(with_products, rotated, X, ROTATION, KNOWN)


def test_one_token_may_be_a_little_off() -> None:
    def near(share: float, first: int) -> Way:
        def way(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
            result = rotated(x, cos, sin, cache)
            wrong = cache.get_seq_length() >= 4 * first  # Four heads are four tokens here.
            return x + (1 + share) * (result - x) if wrong else result

        return way

    assert agree(rotated, near(0.01, 4), X, ROTATION, KNOWN)
    assert not agree(rotated, near(0.01, 3), X, ROTATION, KNOWN)
    assert not agree(rotated, near(0.2, 4), X, ROTATION, KNOWN)


def test_what_is_done_once_is_forgiven() -> None:
    done = []

    def learning(x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        if not done:
            done.append(torch.randn(5).exp())
        return rotated(x, cos, sin, cache)

    assert agree(learning, rotated, X, ROTATION, KNOWN)

"""Routing statistics against loops over tokens, and what `transformers` itself says of routing."""

import copy
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq import quantize_model
from haq.nn import Int8Experts
from haq.offload.collect import experts_modules, number_of_experts
from haq.offload.routing import RoutingStatistics, routing_trace
from tests.architectures import EXPERTS, MIXTURES, SLOTS, VOCABULARY, token_ids
from tests.conftest import ModelFactory
from tests.model.toys import ToyModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Layers, experts and experts per token of what is made up here.
L, E, A = 5, 6, 2


def padded() -> dict[str, Tensor]:
    """Two rows, one of them with padding at the left."""
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    ids = token_ids(2, 9, seed=5)
    ids[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batches() -> list[Tensor | dict[str, Tensor]]:
    return [token_ids(2, 7), token_ids(1, 5, seed=1), padded()]


def made_up(tokens: int, *, none: bool = False, seed: int = 0) -> tuple[Ints, Floats]:
    """Experts ``[T, L, A]`` and weights; layers depend on each other, and expert 0 is popular."""
    random = np.random.default_rng(seed)
    index = np.zeros((tokens, L, A), np.int64)
    for token in index:
        for layer in range(L):
            likely = np.full(E, 0.1)
            likely[0] += 0.2
            if layer:
                likely[(token[layer - 1] + layer) % E] += 1
            token[layer] = random.choice(E, A, replace=False, p=likely / likely.sum())
    if none:
        index[random.random(index.shape) < 0.3] = E
    return index, random.random(index.shape)


def added(index: Ints, weights: Floats | None, at_once: int = 10**6) -> RoutingStatistics:
    """Statistics of a trace, so many tokens at a time, in the order in which a model runs."""
    statistics = RoutingStatistics(index.shape[1], E, A)
    for start in range(0, len(index), at_once):
        part = index[start : start + at_once]
        for layer in range(part.shape[1]):
            before = [part[:, layer - back] for back in (1, 2, 3) if back <= layer]
            given = None if weights is None else weights[start : start + at_once, layer]
            statistics.add(layer, part[:, layer], given, before)
    return statistics


def counted(index: Ints, weights: Floats, experts: int) -> dict[str, Any]:
    """What the statistics of a trace are, token by token."""
    layers = index.shape[1]
    counts = np.zeros((layers, experts), np.int64)
    mass = np.zeros((layers, experts))
    transitions = np.zeros((3, layers, experts, experts), np.int64)
    for token, given in zip(index.tolist(), weights.tolist(), strict=True):
        for layer in range(layers):
            for i, weight in zip(token[layer], given[layer], strict=True):
                if i == experts:
                    continue
                counts[layer, i] += 1
                mass[layer, i] += weight
                for ahead in (1, 2, 3):
                    for j in token[layer + ahead] if layer + ahead < layers else []:
                        if j < experts:
                            transitions[ahead - 1, layer, i, j] += 1
    return {
        "tokens": len(index),
        "counts": counts,
        "gate_mass": mass,
        "transitions": transitions,
    }


def assert_are(
    statistics: RoutingStatistics, expected: dict[str, Any], rtol: float = 1e-12
) -> None:
    assert statistics.tokens == expected["tokens"]
    assert statistics.counts.dtype == statistics.transitions.dtype == np.int64
    np.testing.assert_array_equal(statistics.counts, expected["counts"])
    np.testing.assert_array_equal(statistics.transitions, expected["transitions"])
    np.testing.assert_allclose(statistics.gate_mass, expected["gate_mass"], rtol=rtol)


def assert_same(one: RoutingStatistics, other: RoutingStatistics) -> None:
    assert one.layers == other.layers
    assert one.num_experts == other.num_experts
    assert one.experts_per_token == other.experts_per_token
    assert_are(one, {name: getattr(other, name) for name in counted(*made_up(0), E)})


# --- Adding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("none", [False, True], ids=["all", "some slots empty"])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_added_is_counted(at_once: int, none: bool) -> None:
    index, weights = made_up(60, none=none)
    expected = counted(index, weights, E)
    assert (expected["transitions"].sum((1, 2, 3)) > 100).all()
    assert_are(added(index, weights, at_once), expected)


def test_counts_sum_to_tokens_times_slots() -> None:
    statistics = added(*made_up(40))
    assert statistics.counts.sum(1).tolist() == [40 * A] * L
    assert statistics.transitions.sum((2, 3)).tolist() == [
        [40 * A * A if layer + ahead < L else 0 for layer in range(L)] for ahead in (1, 2, 3)
    ]


def test_without_weights_there_is_no_gate_mass() -> None:
    index, weights = made_up(20)
    statistics = added(index, None)
    assert_are(statistics, counted(index, weights * 0, E))


def test_weights_in_float32() -> None:
    index, weights = made_up(20)
    statistics = RoutingStatistics(1, E, A)
    statistics.add(0, index[:, 0], weights[:, 0].astype(np.float32))
    np.testing.assert_allclose(
        statistics.gate_mass, counted(index[:, :1], weights[:, :1], E)["gate_mass"], rtol=1e-6
    )


def test_no_tokens_add_nothing() -> None:
    statistics = added(*made_up(20))
    before = copy.deepcopy(statistics)
    empty = np.zeros((0, A), np.int64)
    statistics.add(3, empty, np.zeros((0, A)), [empty] * 3)
    assert_same(statistics, before)


def test_what_is_added_is_not_written_to() -> None:
    index, weights = made_up(20, none=True)
    kept = index.copy(), weights.copy()
    added(index, weights)
    np.testing.assert_array_equal(index, kept[0])
    np.testing.assert_array_equal(weights, kept[1])


ONE = np.array([[0, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, ONE, None), r"`layer` must be in \[0, 4\], got 5"),
        ((-1, ONE, None), r"`layer` must be in \[0, 4\], got -1"),
        ((0, np.array([0, 1]), None), r"`index` must have shape \[T, 2\].* got \[2\]"),
        ((0, np.array([[0, 1, 2]]), None), r"`index` must have shape \[T, 2\].* got \[1, 3\]"),
        ((0, np.array([[0, 7]]), None), r"must be in \[0, 6\].* got 7"),
        ((0, np.array([[-1, 0]]), None), r"must be in \[0, 6\].* got -1"),
        ((1, ONE, None, [np.array([[0, 7]])]), r"must be in \[0, 6\].* got 7"),
        ((0, ONE, np.ones((1, 3))), r"shape of `index`, \[1, 2\], got \[1, 3\]"),
        ((0, ONE, np.array([[1.0, np.nan]])), "`weights` must be finite, got NaN"),
        ((0, ONE, np.array([[1.0, np.inf]])), "`weights` must be finite, got NaN or infinity"),
        ((1, ONE, None, [np.zeros((2, 2), np.int64)]), r"shape of `index`, \[1, 2\], got \[2, 2\]"),
        ((1, ONE, None, [ONE] * 2), "`before` must have at most 1 entries at layer 1, got 2"),
        ((4, ONE, None, [ONE] * 4), "`before` must have at most 3 entries at layer 4, got 4"),
    ],
)
def test_what_cannot_be_added_changes_nothing(arguments: Any, message: str) -> None:
    statistics = added(*made_up(20))
    before = copy.deepcopy(statistics)
    with pytest.raises(ValueError, match=message):
        statistics.add(*arguments)
    assert_same(statistics, before)


def test_an_index_must_be_int64() -> None:
    statistics = RoutingStatistics(2, E, A)
    with pytest.raises(TypeError, match="must be int64, got float64"):
        statistics.add(0, np.zeros((1, A)), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be int64, got float32"):
        statistics.add(1, ONE.astype(np.int8), None, [np.zeros((1, A), np.float32)])


# --- Made from nothing ----------------------------------------------------------------------------


def test_names_of_layers() -> None:
    assert RoutingStatistics(3, E, A).layers == ("layer 0", "layer 1", "layer 2")
    assert RoutingStatistics(["a", "b"], E, A).layers == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, E, A), ValueError, r"`layers` must be one or more names.* got \[\]"),
        (([], E, A), ValueError, r"`layers` must be one or more names.* got \[\]"),
        ((["a", "a"], E, A), ValueError, r"each another one, got \['a', 'a'\]"),
        (("abc", E, A), TypeError, "`layers` must be a list of names.* got 'abc'"),
        (([1, 2], E, A), TypeError, r"`layers` must be a list of names.* got \[1, 2\]"),
        ((2, 0, A), ValueError, "`num_experts` must be a positive integer, got 0"),
        ((2, 2.0, A), ValueError, "`num_experts` must be a positive integer, got 2.0"),
        ((2, E, 7), ValueError, r"`experts_per_token` must be an integer in \[1, 6\].* got 7"),
        ((2, E, 0), ValueError, r"`experts_per_token` must be an integer in \[1, 6\].* got 0"),
        (
            (2, E, True),
            ValueError,
            r"`experts_per_token` must be an integer in \[1, 6\].* got True",
        ),
    ],
)
def test_what_makes_no_statistics(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RoutingStatistics(*arguments)


def test_from_counts() -> None:
    counts = [[4, 0, 2], [1, 2, 3]]
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=2)
    assert (statistics.layers, statistics.num_experts) == (("layer 0", "layer 1"), 3)
    assert (statistics.experts_per_token, statistics.tokens) == (2, 3)
    np.testing.assert_array_equal(statistics.counts, counts)
    assert statistics.counts.dtype == np.int64
    assert not statistics.transitions.any()
    assert not statistics.gate_mass.any()
    named = RoutingStatistics.from_counts(counts, experts_per_token=1, layers=["a", "b"])
    assert (named.layers, named.tokens) == (("a", "b"), 6)


def test_counts_are_copied() -> None:
    counts = np.array([[4, 0, 2]])
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=1)
    statistics.add(0, np.array([[1]]), None)
    assert counts.tolist() == [[4, 0, 2]]


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([[1, 2], [3]], {}, "`counts` must be a table of whole numbers.* got something else"),
        ([1, 2], {}, r"`counts` must be a table of whole numbers.* got int64 \[2\]"),
        ([[1.5, 2]], {}, r"`counts` must be a table of whole numbers.* got float64 \[1, 2\]"),
        ([["1", "2"]], {}, r"`counts` must be a table of whole numbers.* got <U1 \[1, 2\]"),
        ([[True, False]], {}, r"`counts` must be a table of whole numbers.* got bool \[1, 2\]"),
        ([[]], {}, r"`counts` must be a table of whole numbers.* got float64 \[1, 0\]"),
        ([[1, 2], [3, -4]], {}, "not be negative, got -4 for expert 1 of layer 1"),
        ([[1, 2]], {"layers": ["a", "b"]}, "name the 1 layers of `counts`, got 2 names"),
        ([[1, 2]], {"experts_per_token": 3}, r"in \[1, 2\].* got 3"),
    ],
)
def test_what_are_no_counts(counts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingStatistics.from_counts(counts, **{"experts_per_token": 1} | options)


# --- Popularity and prediction --------------------------------------------------------------------


def test_popularity_is_the_share_of_tokens() -> None:
    index, weights = made_up(50)
    popularity = added(index, weights).popularity
    assert popularity.dtype == np.float64
    for layer in range(L):
        for expert in range(E):
            share = sum(expert in token for token in index[:, layer].tolist()) / 50
            assert popularity[layer, expert] == pytest.approx(share, rel=1e-12)
    np.testing.assert_allclose(popularity.sum(1), A)


def test_popularity_where_nothing_was_seen() -> None:
    statistics = RoutingStatistics(2, 4, 3)
    statistics.add(1, np.array([[0, 1, 3]]), None)
    assert statistics.popularity.tolist() == [[0.75] * 4, [1, 1, 0, 1]]


def scored(index: Ints, layer: int, chosen: list[int], ahead: int) -> list[float]:
    """The formula, one choice after the other: half a choice is added for each expert."""
    later = [j for token in index.tolist() for j in token[layer + ahead] if j < E]
    scores = [0.0] * E
    for i in chosen:
        followed = [
            j
            for token in index.tolist()
            for j in token[layer + ahead]
            if i in token[layer] and j < E
        ]
        for j in range(E):
            share = later.count(j) / len(later)
            scores[j] += (followed.count(j) + 0.5 * E * share) / (len(followed) + 0.5 * E)
    return scores


@pytest.mark.parametrize("none", [False, True], ids=["all", "some slots empty"])
@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("chosen", [[0, 1], [5, 2], [3]])
def test_scores(chosen: list[int], ahead: int, none: bool) -> None:
    index, weights = made_up(60, none=none)
    statistics = added(index, weights)
    for layer in range(L - ahead):
        scores = statistics.scores(layer, chosen, ahead)
        expected = scored(index, layer, chosen, ahead)
        np.testing.assert_allclose(scores, expected, rtol=1e-12)
        order = sorted(range(E), key=lambda j: -expected[j])
        predicted = statistics.predict(layer, chosen, ahead)
        assert predicted.dtype == np.int64
        assert [expected[j] for j in predicted] == pytest.approx([expected[j] for j in order])
        assert sorted(predicted.tolist()) == list(range(E))


def test_a_chain_is_learned() -> None:
    """Of a Markov chain with one expert per token the probabilities are known."""
    random = np.random.default_rng(0)
    steps = random.dirichlet(np.full(E, 0.5), (L - 1, E))
    steps[1, 0] = 0  # from 0 to 3 without doubt, and no equal seconds
    steps[1, 0, 3] = 1
    tokens = 20000
    index = np.zeros((tokens, L, 1), np.int64)
    index[:, 0, 0] = random.integers(0, E, tokens)
    for layer in range(L - 1):
        sums = steps[layer].cumsum(1)[index[:, layer, 0]]
        index[:, layer + 1, 0] = (random.random((tokens, 1)) > sums[:, :-1]).sum(1)
    statistics = RoutingStatistics(L, E, 1)
    for layer in range(L):
        before = [index[:, layer - back] for back in (1, 2, 3) if back <= layer]
        statistics.add(layer, index[:, layer], None, before)
    for ahead in (1, 2, 3):
        for layer in range(L - ahead):
            known = np.linalg.multi_dot([np.eye(E), *steps[layer : layer + ahead], np.eye(E)])
            for expert in range(E):
                if statistics.counts[layer, expert] > 1000:
                    scores = statistics.scores(layer, [expert], ahead)
                    # Four standard deviations of a share of 1000.
                    np.testing.assert_allclose(scores, known[expert], atol=4 * 0.5 / 1000**0.5)
    assert statistics.predict(1, [0])[0] == 3


def test_without_transitions_scores_are_the_popularity() -> None:
    counts = np.random.default_rng(0).integers(1, 100, (4, E))
    statistics = RoutingStatistics.from_counts(counts, experts_per_token=A)
    for ahead in (1, 2, 3):
        scores = statistics.scores(0, [1, 4], ahead)
        np.testing.assert_allclose(scores, A * counts[ahead] / counts[ahead].sum(), rtol=1e-12)
        assert statistics.predict(0, [1, 4], ahead)[0] == counts[ahead].argmax()


@pytest.mark.parametrize("chosen", [[], [E], [[E, E]]])
def test_without_a_choice_scores_are_the_popularity(chosen: list[Any]) -> None:
    statistics = added(*made_up(30))
    np.testing.assert_array_equal(statistics.scores(1, chosen), statistics.popularity[2])


def test_scores_of_several_tokens_are_their_sum() -> None:
    statistics = added(*made_up(30))
    both = statistics.scores(0, np.array([[0, 2], [2, E]]), 2)
    parts = statistics.scores(0, [0, 2], 2) + statistics.scores(0, [2], 2)
    np.testing.assert_allclose(both, parts, rtol=1e-12)
    assert both.sum() == pytest.approx(3)


def test_of_equals_the_lower_number_comes_first() -> None:
    statistics = RoutingStatistics.from_counts([[1] * E, [2, 1, 2, 0, 1, 2]], experts_per_token=A)
    assert statistics.predict(0, [3, 1]).tolist() == [0, 2, 5, 1, 4, 3]
    many = [expert * 7 % 3 for expert in range(100)]
    statistics = RoutingStatistics.from_counts([many, many], experts_per_token=A)
    expected = sorted(range(100), key=lambda expert: (-many[expert], expert))
    assert statistics.predict(0, [3, 1]).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, [0]), r"`layer` must be in \[0, 4\], got 9"),
        ((-1, [0]), r"`layer` must be in \[0, 4\], got -1"),
        ((4, [0]), "lead to one of the 5 layers, got 1 at layer 4"),
        ((2, [0], 3), "lead to one of the 5 layers, got 3 at layer 2"),
        ((0, [0], 4), r"`ahead` must be in \[1, 3\].* got 4"),
        ((0, [0], 0), r"`ahead` must be in \[1, 3\].* got 0"),
        ((0, [7]), r"`chosen` must be integers in \[0, 6\], got \[7\]"),
        ((0, [-1]), r"`chosen` must be integers in \[0, 6\], got \[-1\]"),
        ((0, [0.5]), r"`chosen` must be integers in \[0, 6\], got \[0.5\]"),
    ],
)
def test_what_cannot_be_predicted(arguments: Any, message: str) -> None:
    statistics = added(*made_up(5))
    with pytest.raises(ValueError, match=message):
        statistics.predict(*arguments)


# --- Several statistics ---------------------------------------------------------------------------


def test_merging_is_seeing_both() -> None:
    index, weights = made_up(50, none=True)
    one, two = added(index[:20], weights[:20]), added(index[20:], weights[20:])
    kept = copy.deepcopy(one), copy.deepcopy(two)
    assert_same(one.merge(two), added(index, weights))
    assert_same(two.merge(one), added(index, weights))
    assert_same(one, kept[0])
    assert_same(two, kept[1])


def test_a_name_is_kept_where_one_is_known() -> None:
    counts = [[1, 2]]
    plain = RoutingStatistics.from_counts(counts, experts_per_token=1)
    named = RoutingStatistics.from_counts(counts, experts_per_token=1, layers=["mlp.experts"])
    assert plain.merge(named).layers == named.merge(plain).layers == ("mlp.experts",)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            RoutingStatistics(["a"], 4, 2),
            "a model with 2 layers of 4 experts, got .* 1 layers of 4",
        ),
        (RoutingStatistics(["a", "b"], 5, 2), "2 layers of 4 experts, got .* 2 layers of 5"),
        (RoutingStatistics(["a", "b"], 4, 3), "2 experts per token, got 3"),
        (RoutingStatistics(["a", "c"], 4, 2), "of the same model, but has `c` where this has `b`"),
    ],
)
def test_what_cannot_be_merged(other: RoutingStatistics, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingStatistics(["a", "b"], 4, 2).merge(other)


def test_check() -> None:
    statistics = RoutingStatistics(3, 8, 2)
    statistics.check(3, 8)
    for layers, experts in ((2, 8), (3, 4), (8, 3)):
        message = f"{layers} layers of {experts} experts, got those of one with 3 layers of 8"
        with pytest.raises(ValueError, match=message):
            statistics.check(layers, experts)


# --- On disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["routing.npz", "routing", "routing.json"])
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    statistics = added(*made_up(40, none=True))
    statistics.layers = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(L))
    statistics.save(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    loaded = RoutingStatistics.load(str(tmp_path / name))
    assert_same(loaded, statistics)
    # It goes on like the one that was saved.
    index, _ = made_up(3, seed=1)
    for one in (statistics, loaded):
        one.add(1, index[:, 1], None, [index[:, 0]])
    assert_same(loaded, statistics)


def test_saving_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "routing.npz"
    added(*made_up(5)).save(path)
    statistics = added(*made_up(9))
    statistics.save(path)
    assert_same(RoutingStatistics.load(path), statistics)


def test_failing_to_save_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "routing.npz"
    statistics = added(*made_up(5))
    statistics.save(path)

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        added(*made_up(9)).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["routing.npz"]
    assert_same(RoutingStatistics.load(path), statistics)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        RoutingStatistics.load(tmp_path / "missing.npz")
    with pytest.raises(FileNotFoundError, match="no-folder"):
        RoutingStatistics(1, E, A).save(tmp_path / "no-folder" / "routing.npz")


class Pickled:
    """Leaves a trace where it is unpickled."""

    unpickled = False

    def __setstate__(self, state: object) -> None:
        type(self).unpickled = True

    def __getstate__(self) -> object:
        return {"state": 1}


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"version": np.int64(2)}, "of version 1 or earlier, got 2: a newer haq wrote it"),
    "no version": (
        {"version": None},
        r"from `RoutingStatistics.save`, got an archive of \['counts",
    ),
    "odd version": ({"version": np.array("1")}, "got an archive of"),
    "version 0": ({"version": np.int64(0)}, "got an archive of"),
    "missing": ({"tokens": None}, "is damaged: `tokens` is missing"),
    "no counts": ({"counts": None}, "is damaged: `counts` is missing"),
    "layers": ({"layers": np.array(["a"])}, r"`counts` must be int64 \[1, 6\], got int64 \[5, 6\]"),
    "numbers": ({"layers": np.arange(5)}, r"`layers` must be str \[L\], got int64 \[5\]"),
    "equal": ({"layers": np.array(["a"] * L)}, "is damaged: `layers` must be one or more names"),
    "transposed": ({"gate_mass": np.zeros((E, L))}, r"`gate_mass` must be float64 \[5, 6\]"),
    "two ahead": (
        {"transitions": np.zeros((2, L, E, E), np.int64)},
        r"`transitions` must be int64 \[3, 5, 6, 6\], got int64 \[2, 5, 6, 6\]",
    ),
    "flat": (
        {"counts": np.zeros(E, np.int64)},
        r"`counts` must be int64 \[5, E\], got int64 \[6\]",
    ),
    "floats": ({"counts": np.zeros((L, E))}, r"`counts` must be int64 \[5, E\], got float64"),
    "negative": ({"counts": np.full((L, E), -1)}, "`counts` has negative numbers"),
    "negative tokens": ({"tokens": np.int64(-1)}, "`tokens` has negative numbers"),
    "negative pairs": (
        {"transitions": np.full((3, L, E, E), -1)},
        "`transitions` has negative numbers",
    ),
    "nan": ({"gate_mass": np.full((L, E), np.nan)}, "`gate_mass` has NaN or infinity"),
    "slots": ({"experts_per_token": np.int64(9)}, r"is damaged: `experts_per_token` must .*got 9"),
    "vector": ({"tokens": np.array([1])}, r"`tokens` must be int64 \[\], got int64 \[1\]"),
    "pickled": (
        {"layers": np.array([Pickled()] * L)},
        "is damaged: Object arrays cannot be loaded",
    ),
}


@pytest.mark.parametrize(("changes", "message"), OTHERS.values(), ids=list(OTHERS))
def test_what_is_not_loaded(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    added(*made_up(10)).save(tmp_path / "routing.npz")
    arrays = dict(np.load(tmp_path / "routing.npz")) | changes
    path = tmp_path / "other.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message) as raised:
        RoutingStatistics.load(path)
    assert str(path) in str(raised.value)
    assert not Pickled.unpickled


def test_arrays_in_another_order(tmp_path: Path) -> None:
    """A file may hold its numbers column by column, and counting goes on all the same."""
    statistics = added(*made_up(10))
    statistics.save(tmp_path / "routing.npz")
    arrays = dict(np.load(tmp_path / "routing.npz"))
    arrays["transitions"] = np.asfortranarray(arrays["transitions"])
    np.savez(tmp_path / "columns.npz", **arrays)
    loaded = RoutingStatistics.load(tmp_path / "columns.npz")
    for one in (statistics, loaded):
        one.add(1, ONE, None, [ONE])
    assert_same(loaded, statistics)


@pytest.mark.parametrize("kept", [2, 60, 0.5, -1])
def test_a_file_cut_short(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "routing.npz"
    added(*made_up(10)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(ValueError, match=r"is damaged: .* Collect the statistics again"):
        RoutingStatistics.load(path)


def test_a_file_with_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "routing.npz"
    added(*made_up(10)).save(path)
    data = bytearray(path.read_bytes())
    where = data.index(b"transitions.npy") + 60
    data[where] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        RoutingStatistics.load(path)


@pytest.mark.parametrize("form", ["list", "object"])
def test_counts_in_json(tmp_path: Path, form: str) -> None:
    counts = [[3, 1, 2], [2, 2, 2]]
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(counts if form == "list" else {"expert_popularity": counts, "x": 1}))
    loaded = RoutingStatistics.load(path, experts_per_token=2)
    assert_same(loaded, RoutingStatistics.from_counts(counts, experts_per_token=2))
    message = rf"`experts_per_token` must be given for `{re.escape(str(path))}`.*Pass 2 for Mixtral"
    with pytest.raises(ValueError, match=message):
        RoutingStatistics.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a list of all layers with a list of counts for each.*; it is neither: Expecting"),
        ("no json", "or an object with one as 'expert_popularity'; it is neither: Expecting value"),
        ("\udc80", "it is neither: 'utf-8' codec"),
        ("3", "'expert_popularity', got 3"),
        ('{"layers": [0, 7], "domains": {}}', r"got an object with \['layers', 'domains'\]. Pass"),
        ("[[1, 2], [3]]", "counts.json`: `counts` must be a table of whole numbers"),
        ("[[1, -2]]", "counts.json`: `counts` must not be negative, got -2"),
        ("[[1]]", r"counts.json`: `experts_per_token` must be an integer in \[1, 1\].* got 2"),
    ],
)
def test_what_are_no_counts_in_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "counts.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        RoutingStatistics.load(path, experts_per_token=2)


def test_experts_per_token_must_be_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "routing.npz"
    added(*made_up(10)).save(path)
    assert RoutingStatistics.load(path, experts_per_token=A).experts_per_token == A
    with pytest.raises(ValueError, match=r"`experts_per_token` must be 2, as in .*, got 3"):
        RoutingStatistics.load(path, experts_per_token=3)


def test_published_counts_of_mixtral(shared: Path) -> None:
    files = sorted((shared / "data/routing/mixtral-popularity-mmlu").glob("*/*.json"))
    assert len(files) == 14
    for file in files:
        loaded = RoutingStatistics.load(file, experts_per_token=2)
        loaded.check(32, 8)
        counts = json.loads(file.read_text())["expert_popularity"]
        assert loaded.counts.tolist() == counts
        assert loaded.tokens * 2 == sum(counts[0])
        np.testing.assert_allclose(loaded.popularity.sum(1), 2)
    with pytest.raises(ValueError, match=r"must be .* a list of all layers .* got an object with"):
        RoutingStatistics.load(shared / "data/routing/mixtral8x7b_routing.json")


# --- From a model ---------------------------------------------------------------------------------


def hear(heard: list[Any], mask: Tensor, forward: Any, *given: Tensor) -> Any:
    """In the place of the forward of experts: write down what they are given."""
    heard.append(tuple(one.clone()[mask] for one in given[1:]))
    return forward(*given)


def listened(model: PreTrainedModel, given: list[Any]) -> tuple[Ints, Floats]:
    """What the experts of a whole model are called with: ``[T, L, A]`` both, padding left out."""
    indices, weights = [], []
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    for batch in given:
        batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        heard: list[tuple[Tensor, Tensor]] = []
        for module in modules:
            module.forward = partial(hear, heard, mask, module.forward)
        with torch.no_grad():
            model(**batch, use_cache=False)
        for module in modules:
            del module.forward
        indices.append(torch.stack([one[0] for one in heard], 1))
        weights.append(torch.stack([one[1] for one in heard], 1))
    return torch.cat(indices).numpy(), torch.cat(weights).double().numpy()


@pytest.mark.parametrize("name", MIXTURES)
def test_collected_is_what_the_experts_are_called_with(name: str) -> None:
    model = MIXTURES[name]()
    index, weights = listened(model, batches())
    statistics = RoutingStatistics.collect(model, batches())
    assert index.shape == (14 + 5 + 14, len(statistics.layers), SLOTS)
    assert all(layer.endswith(".experts") for layer in statistics.layers)
    assert statistics.experts_per_token == SLOTS
    assert statistics.counts.sum(1).tolist() == [33 * SLOTS] * len(statistics.layers)
    assert_are(statistics, counted(index, weights, statistics.num_experts), rtol=1e-6)
    trace = routing_trace(model, batches())
    assert trace.dtype == np.int64
    np.testing.assert_array_equal(trace, index)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe", "gpt-oss"])
def test_collected_is_what_the_routers_say(name: str) -> None:
    """The best of the logits that `transformers` gives out, softmax in float64."""
    model = MIXTURES[name]()
    indices, weights = [], []
    for batch in batches():
        batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        with torch.no_grad():
            logits = model(**batch, output_router_logits=True).router_logits
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        scores = torch.stack([one.reshape(len(mask), -1)[mask] for one in logits], 1).double()
        best = scores.softmax(-1).topk(SLOTS)
        of_chosen = name in ("mixtral", "gpt-oss")  # the others keep their share of all experts
        total = best.values.sum(-1, keepdim=True) if of_chosen else 1.0
        indices.append(best.indices)
        weights.append(best.values / total)
    index = torch.cat(indices).numpy()
    statistics = RoutingStatistics.collect(model, batches())
    expected = counted(index, torch.cat(weights).numpy(), EXPERTS)
    assert_are(statistics, expected, rtol=1e-5)
    np.testing.assert_array_equal(routing_trace(model, batches()), index)


def test_transitions_of_four_layers(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral(num_hidden_layers=5)
    given = [batch % 64 for batch in (token_ids(2, 8), token_ids(3, 4, seed=1))]
    index, weights = listened(model, given)
    statistics = RoutingStatistics.collect(model, given)
    assert_are(statistics, counted(index, weights, 4), rtol=1e-6)
    assert statistics.transitions.sum((2, 3)).tolist() == [
        [28 * 4] * 4 + [0],
        [28 * 4] * 3 + [0] * 2,
        [28 * 4] * 2 + [0] * 3,
    ]
    # The same from two halves.
    halves = [RoutingStatistics.collect(model, [one]) for one in given]
    assert_are(halves[0].merge(halves[1]), counted(index, weights, 4), rtol=1e-6)


def test_of_an_int8_model() -> None:
    model = MIXTURES["mixtral"]()
    names = tuple(experts_modules(model))
    quantize_model(model, [token_ids(2, 16, seed=seed) for seed in range(2)], progress=False)
    assert all(isinstance(module, Int8Experts) for module in experts_modules(model).values())
    index, weights = listened(model, batches())
    statistics = RoutingStatistics.collect(model, batches())
    assert statistics.layers == names
    assert_are(statistics, counted(index, weights, EXPERTS), rtol=1e-6)
    np.testing.assert_array_equal(routing_trace(model, batches()), index)


def test_in_bfloat16() -> None:
    model = MIXTURES["mixtral"]()
    model.bfloat16()
    index, weights = listened(model, batches())
    statistics = RoutingStatistics.collect(model, batches())
    assert_are(statistics, counted(index, weights, EXPERTS))


def test_tokens_are_read_once_and_in_order() -> None:
    model = MIXTURES["mixtral"]()
    given = batches()
    one_by_one = [routing_trace(model, [batch]) for batch in given]
    np.testing.assert_array_equal(
        routing_trace(model, (batch for batch in given)), np.concatenate(one_by_one)
    )


class OnTwoSides(nn.Module):
    """What stands in the place of experts when some of them are elsewhere."""

    is_offloaded_experts = True

    def __init__(self, experts: nn.Module, number: int) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts = number

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        result = self.experts(hidden_states, top_k_index, top_k_weights)
        # Who was asked is written over, as an implementation may do.
        top_k_index.fill_(0)
        top_k_weights.fill_(0)
        return result


def test_what_stands_in_the_place_of_experts() -> None:
    model = MIXTURES["mixtral"]()
    expected = RoutingStatistics.collect(model, batches())
    for layer in model.model.layers:
        layer.mlp.experts = OnTwoSides(layer.mlp.experts, EXPERTS)
    assert_same(RoutingStatistics.collect(model, batches()), expected)


class CallsByName(nn.Module):
    """Calls a family's experts with keywords, and not in their order."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp: Any = mlp

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.flatten(0, 1)
        _, scores, index = self.mlp.router(flat)
        output = self.mlp.experts(routing_weights=scores, hidden_states=flat, router_indices=index)
        return output.view_as(hidden_states), scores


def test_arguments_by_name() -> None:
    model = MIXTURES["gpt-oss"]()
    model.set_experts_implementation("eager")  # the others know only their own names
    expected = RoutingStatistics.collect(model, batches())
    for layer in model.model.layers:
        layer.mlp = CallsByName(layer.mlp)
    collected = RoutingStatistics.collect(model, batches())
    assert_are(collected, {name: getattr(expected, name) for name in counted(*made_up(0), E)})


def test_no_logits_are_computed() -> None:
    model = MIXTURES["mixtral"]()

    def refuse(*args: Any) -> None:
        raise AssertionError("the head was called")

    model.lm_head.register_forward_pre_hook(refuse)
    assert RoutingStatistics.collect(model, batches()).tokens == 33


def test_a_model_without_a_prefix() -> None:
    model: Any = MIXTURES["mixtral"]()
    expected = RoutingStatistics.collect(model, batches())
    model.base_model_prefix = ""
    assert model.base_model is model
    assert_same(RoutingStatistics.collect(model, batches()), expected)
    body = RoutingStatistics.collect(model.model, batches())
    assert [f"model.{name}" for name in body.layers] == list(expected.layers)
    np.testing.assert_array_equal(body.transitions, expected.transitions)


# --- The model afterwards -------------------------------------------------------------------------


def hooks(model: nn.Module) -> dict[str, list[int]]:
    """The hooks of every module."""
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    assert len(kinds) >= 4
    return {
        name: [key for kind in kinds for key in getattr(module, kind)]
        for name, module in model.named_modules()
    }


class Unlucky(Exception):
    """What goes wrong in these tests."""


def failing_batches() -> Iterator[Tensor]:
    yield token_ids(1, 4)
    raise Unlucky


@pytest.fixture
def mixed_modes() -> PreTrainedModel:
    """In training, but for a part, and noisy as long as it is."""
    model = MIXTURES["mixtral"]()
    model.train()
    model.model.layers[1].self_attn.eval()
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.9
    return model


@pytest.mark.parametrize("goes_wrong", ["nothing", "the model", "the batches", "a batch"])
@pytest.mark.parametrize("function", [RoutingStatistics.collect, routing_trace])
def test_the_model_is_as_before(
    mixed_modes: PreTrainedModel, function: Any, goes_wrong: str
) -> None:
    model = mixed_modes
    given: Any = batches()
    if goes_wrong == "the model":

        def fail(*args: Any) -> None:
            raise Unlucky

        model.model.norm.register_forward_hook(fail)
    elif goes_wrong == "the batches":
        given = failing_batches()
    elif goes_wrong == "a batch":
        given.append(token_ids(1, 4) + VOCABULARY)
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = hooks(model)
    if goes_wrong == "nothing":
        function(model, given)
    else:
        with pytest.raises((Unlucky, ValueError)):
            function(model, given)
    assert hooks(model) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_can_be_trained_afterwards() -> None:
    """What it computed and kept is no tensor of `torch.inference_mode`."""
    model = MIXTURES["mixtral"]()
    kept: list[Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda *call: kept.append(call[-1]))
    RoutingStatistics.collect(model, batches())
    hook.remove()
    assert [one.is_inference() for one in kept] == [False] * 3
    model.train()
    model(input_ids=token_ids(1, 5), labels=token_ids(1, 5)).loss.backward()
    assert float(model.model.layers[0].mlp.gate.weight.grad.abs().sum()) > 0


def test_a_model_in_training_is_asked_without_noise(mixed_modes: PreTrainedModel) -> None:
    expected = RoutingStatistics.collect(MIXTURES["mixtral"](), batches())
    assert_same(RoutingStatistics.collect(mixed_modes, batches()), expected)


# --- Models and batches that are none -------------------------------------------------------------


def test_a_model_without_experts(tiny_llama: ModelFactory) -> None:
    with pytest.raises(ValueError, match=r"a mixture of experts .* got LlamaForCausalLM without"):
        RoutingStatistics.collect(tiny_llama(), batches())
    with pytest.raises(ValueError, match=r"a mixture of experts .* got ToyModel without"):
        experts_modules(ToyModel())


@pytest.mark.parametrize("model", ["mixtral", nn.Linear(1, 1)], ids=["name", "module"])
def test_no_model_of_transformers(model: Any) -> None:
    for function in (RoutingStatistics.collect, routing_trace):
        with pytest.raises(TypeError, match=r"`model` must be a `transformers` model, got "):
            function(model, batches())


def test_layers_with_different_numbers_of_experts(tiny_mixtral: ModelFactory) -> None:
    model, other = tiny_mixtral(), tiny_mixtral(num_local_experts=6)
    assert number_of_experts(experts_modules(other)) == 6
    model.model.layers[1].mlp = other.model.layers[1].mlp
    message = (
        "as many experts in every layer, got 4 in `model.layers.0.mlp.experts` and 6 in "
        "`model.layers.1.mlp.experts`"
    )
    for function in (RoutingStatistics.collect, routing_trace):
        with pytest.raises(ValueError, match=message):
            function(model, [token_ids(1, 4) % 64])


def test_layers_that_choose_different_numbers_of_experts(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    model.model.layers[1].mlp.gate.top_k = 3
    message = (
        "as many experts per token in every layer, got 2 in `model.layers.0.mlp.experts` and 3 in "
        "`model.layers.1.mlp.experts`"
    )
    for function in (RoutingStatistics.collect, routing_trace):
        with pytest.raises(ValueError, match=message):
            function(model, [token_ids(1, 4) % 64])


def test_a_layer_that_is_not_called(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"called `model.layers.1.mlp.experts` 0 times"):
        RoutingStatistics.collect(model, [token_ids(1, 4) % 64])


def test_experts_that_two_layers_share(tiny_mixtral: ModelFactory) -> None:
    model = tiny_mixtral()
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"called `model.layers.0.mlp.experts` 2 times"):
        RoutingStatistics.collect(model, [token_ids(1, 4) % 64])


class CallsInParts(nn.Module):
    """Gives its experts less than all tokens, or no indices."""

    def __init__(self, mlp: Any, what: str) -> None:
        super().__init__()
        self.mlp: Any = mlp
        self.what = what

    def forward(self, hidden_states: Tensor) -> Any:
        flat = hidden_states.flatten(0, 1)
        logits, weights, index = self.mlp.gate(flat)
        given: dict[str, tuple[Any, ...]] = {
            "parts": (flat[1:], index[1:], weights[1:]),
            "logits": (flat, index, logits),
            "mask": (flat, weights, weights),
            "nothing": (flat,),
        }
        return self.mlp.experts(*given[self.what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("parts", "must be called with all 4 tokens of a batch, got 3"),
        ("logits", r"and their weights \[T, A\], got \[\[4, 32\], \[4, 2\], \[4, 4\]\]"),
        (
            "mask",
            r"the indices of the experts \[T, A\].* got \[\[4, 32\], \[4, 2\], \[4, 2\]\]",
        ),
        ("nothing", r"must be called with hidden states.* got \[\[4, 32\]\]"),
    ],
)
def test_experts_that_are_called_in_another_way(
    tiny_mixtral: ModelFactory, what: str, message: str
) -> None:
    model = tiny_mixtral()
    model.model.layers[0].mlp = CallsInParts(model.model.layers[0].mlp, what)
    before = hooks(model)
    with pytest.raises(ValueError, match=rf"`model.layers.0.mlp.mlp.experts` .*{message}"):
        RoutingStatistics.collect(model, [token_ids(1, 4) % 64])
    assert hooks(model) == before


IDS = token_ids(1, 4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "`batches` is empty: pass at least one batch"),
        (IDS, TypeError, "`batches` must be an iterable of batches, got Tensor. Put a single"),
        ({"input_ids": IDS}, TypeError, "`batches` must be an iterable of batches, got dict"),
        ("text", TypeError, "`batches` must be an iterable of batches, got str"),
        (3, TypeError, "`batches` must be an iterable of batches, got int"),
        ([IDS, "text"], TypeError, r"`batches\[1\]` must be an int64 tensor .* got str"),
        ([{"ids": IDS}], TypeError, r"`batches\[0\]` must be .* got a mapping with \['ids'\]"),
        ([{"input_ids": [1]}], TypeError, r"`batches\[0\]` must be .* with \['input_ids'\]"),
        ([IDS.int()], TypeError, r"`batches\[0\]` must hold int64 token ids, got torch.int32"),
        ([IDS.float()], TypeError, r"`batches\[0\]` must hold int64 token ids, got torch.float32"),
        ([IDS[0]], ValueError, r"shape \[batch, sequence\] and hold tokens, got \[4\]"),
        ([IDS[:, :0]], ValueError, r"shape \[batch, sequence\] and hold tokens, got \[1, 0\]"),
        ([IDS, IDS + VOCABULARY], ValueError, r"`batches\[1\]` must hold ids in \[0, 95\]"),
        ([IDS * 0 - 3], ValueError, r"`batches\[0\]` must hold ids in \[0, 95\].* got -3"),
        (
            [{"input_ids": IDS, "attention_mask": [1]}],
            TypeError,
            r"'attention_mask' of `batches\[0\]` must be a tensor, got list",
        ),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(1, 3)}],
            ValueError,
            r"shape of 'input_ids', \[1, 4\], and keep a token, got shape \[1, 3\] with 3",
        ),
        (
            [{"input_ids": IDS, "attention_mask": IDS * 0}],
            ValueError,
            r"and keep a token, got shape \[1, 4\] with 0 tokens kept",
        ),
    ],
)
def test_what_are_no_batches(given: Any, error: type[Exception], message: str) -> None:
    model = MIXTURES["mixtral"]()
    for function in (RoutingStatistics.collect, routing_trace):
        with pytest.raises(error, match=message):
            function(model, given)

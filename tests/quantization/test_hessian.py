"""Second moments and their root, against numpy in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haq.quantization import hessian as hessian_module
from haq.quantization.hessian import SecondMoment, triangular_root
from tests.quantization.moments import mean_of


def correlated_inputs(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Float32 ``[tokens, channels]`` that share a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, max(channels // 4, 1), generator=generator)
    mix = torch.randn(few.shape[1], channels, generator=generator)
    return few @ mix + 0.3 * torch.randn(tokens, channels, generator=generator)


def second_moment(inputs: Tensor) -> Tensor:
    """Float64 ``[K, K]``."""
    return inputs.double().T @ inputs.double() / len(inputs)


# --- Second moments -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mean_of_outer_products(dtype: torch.dtype) -> None:
    inputs = correlated_inputs(300, 17).to(dtype)
    moment = SecondMoment(17)
    moment.update(inputs)
    x = inputs.float().numpy().astype(np.float64)
    expected = np.mean([np.outer(token, token) for token in x], axis=0)
    # Sums of 300 products in float32.
    np.testing.assert_allclose(mean_of(moment).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert moment.tokens == 300
    assert mean_of(moment).dtype == torch.float32


def test_however_many_channels_there_are() -> None:
    """Half of it is computed, some rows at a time."""
    inputs = correlated_inputs(40, 2100)
    moment = SecondMoment(2100)
    moment.update(inputs[:15])
    moment.update(inputs[15:])
    mean = mean_of(moment).double()
    torch.testing.assert_close(mean, second_moment(inputs), rtol=1e-4, atol=1e-3)


def test_no_tokens_make_a_mean_of_zero() -> None:
    assert torch.equal(mean_of(SecondMoment(3)), torch.zeros(3, 3))


@settings(deadline=None)
@given(splits=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 3))
def test_any_split_into_batches_gives_the_same(splits: list[int], seed: int) -> None:
    inputs = correlated_inputs(40, 9, seed)
    whole, parts = SecondMoment(9), SecondMoment(9)
    whole.update(inputs)
    edges = [0, *sorted(splits), 40]
    for start, stop in itertools.pairwise(edges):
        parts.update(inputs[start:stop])
    assert parts.tokens == whole.tokens
    torch.testing.assert_close(mean_of(parts), mean_of(whole), rtol=1e-5, atol=1e-5)


def test_the_mean_can_be_taken_once_without_a_copy() -> None:
    moment = SecondMoment(17)
    moment.update(correlated_inputs(300, 17))
    expected, memory = mean_of(moment), moment._sum.data_ptr()
    taken = moment.take_mean()
    assert torch.equal(taken.tril(), expected.tril())
    assert taken.data_ptr() == memory
    with pytest.raises(RuntimeError, match=r"^The second moment was taken already\.$"):
        moment.take_mean()


def test_no_tokens_make_a_mean_of_zero_that_can_be_taken_as_well() -> None:
    moment = SecondMoment(3)
    assert torch.equal(moment.take_mean(), torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="was taken already"):
        moment.take_mean()


# --- The root -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [32, 512])
@pytest.mark.parametrize("channels", [1, 2, 31, 128, 200])
def test_the_root_is_that_of_the_damped_hessian(
    channels: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "_ROWS_OF_ROOT", rows_at_once)
    hessian = second_moment(correlated_inputs(400, channels))
    before = hessian.clone()
    root = triangular_root(hessian, damping=0.01)
    assert (root.damping, root.floor) == (0.01, 0.0)
    assert torch.equal(root.upper, root.upper.triu())
    assert (root.upper.diagonal() > 0).all()

    damped = hessian.numpy() + 0.01 * np.trace(hessian.numpy()) / channels * np.eye(channels)
    product = root.upper.numpy() @ root.upper.numpy().T
    np.testing.assert_allclose(product, damped, rtol=1e-12, atol=1e-12)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("rows_at_once", [4, 512])
def test_what_is_right_of_the_diagonal_is_not_read(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "_ROWS_OF_ROOT", rows_at_once)
    hessian = second_moment(correlated_inputs(400, 31))
    half = hessian.tril() + torch.full_like(hessian, torch.nan).triu(1)
    expected = triangular_root(hessian, damping=0.01).upper
    assert torch.equal(triangular_root(half, damping=0.01).upper, expected)


def test_float32_is_close_to_float64() -> None:
    hessian = second_moment(correlated_inputs(400, 64))
    root = triangular_root(hessian.float(), damping=0.01)
    assert root.upper.dtype == torch.float32
    exact = triangular_root(hessian, damping=0.01).upper
    # The damped matrix has a condition number of a few thousand.
    torch.testing.assert_close(root.upper.double(), exact, rtol=1e-3, atol=1e-4)


def test_a_dead_channel_neither_gives_nor_takes() -> None:
    inputs = correlated_inputs(400, 6)
    inputs[:, [0, 4]] = 0.0
    alive = [1, 2, 3, 5]
    hessian = second_moment(inputs)
    upper = triangular_root(hessian, damping=0.01).upper
    # The damping is a fraction of the mean over all channels, dead ones included.
    identity = torch.eye(6, dtype=torch.float64)
    damped = (hessian + 0.01 * hessian.trace() / 6 * identity)[alive][:, alive]
    part = upper[alive][:, alive]
    torch.testing.assert_close(part @ part.T, damped, rtol=1e-12, atol=1e-12)
    for dead in (0, 4):
        assert torch.equal(upper[dead], identity[dead])
        assert torch.equal(upper[:, dead], identity[dead])


def test_all_channels_dead() -> None:
    root = triangular_root(torch.zeros(3, 3), damping=0.01)
    assert torch.equal(root.upper, torch.eye(3))


# --- When it does not work at once ----------------------------------------------------------------


def indefinite(channels: int, negative: float) -> Tensor:
    """A matrix with mean diagonal 1 and the eigenvalue ``-negative``; float64 ``[K, K]``."""
    matrix = torch.eye(channels, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 1 + negative
    return matrix


@pytest.mark.parametrize(
    ("negative", "first", "expected"),
    [
        (-0.5, 0.01, 0.01),
        (0.005, 0.01, 0.01),
        (0.05, 0.01, 0.1),
        (0.5, 0.01, 1.0),
        (0.05, 0.02, 0.2),
        (0.5, 0.02, 1.0),
        (0.5, 1.0, 1.0),
    ],
)
def test_damping_grows_tenfold_until_it_works(
    negative: float, first: float, expected: float
) -> None:
    hessian = indefinite(5, negative)
    root = triangular_root(hessian, first)
    assert (root.damping, root.floor) == (pytest.approx(expected), 0.0)
    damped = hessian + root.damping * torch.eye(5)
    torch.testing.assert_close(root.upper @ root.upper.T, damped.double())


@pytest.mark.parametrize(
    ("negative", "floor"),
    [(1.0005, 1e-6), (1.005, 1e-5), (1.05, 1e-4), (1.5, 1e-3)],
)
def test_small_diagonal_entries_are_raised_when_damping_is_not_enough(
    negative: float, floor: float
) -> None:
    """One channel is a million times larger than two that contradict each other.

    Then the mean diagonal is 1, damping adds 1 at most, and the largest entry is ``channels``.
    """
    channels = 1000
    hessian = torch.eye(channels, dtype=torch.float64) * 1e-6
    hessian[2, 2] = channels - 1e-6 * (channels - 1)
    hessian[0, 1] = hessian[1, 0] = negative
    root = triangular_root(hessian, damping=0.01)
    assert (root.damping, root.floor) == (1.0, floor)


@pytest.mark.parametrize(
    "hessian",
    [
        indefinite(5, 3.0),
        torch.full((3, 3), torch.nan),
        torch.eye(3).index_fill(0, torch.tensor(1), torch.inf),
    ],
    ids=["indefinite", "nan", "infinity"],
)
def test_nothing_is_made_of_a_hopeless_matrix(hessian: Tensor) -> None:
    assert triangular_root(hessian, damping=0.01) is None


DIAGONAL, BESIDE = [(9, 9), (0, 0)], [(9, 0), (9, 8), (5, 1), (1, 0)]
NO_NUMBERS = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *itertools.product(DIAGONAL + BESIDE, NO_NUMBERS),
        *itertools.product(BESIDE, [1e30]),  # On the diagonal a channel may be as large as that.
    ],
    ids=str,
)
def test_one_number_that_cannot_be_is_seen_wherever_it_is(
    place: tuple[int, int], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "_ROWS_OF_ROOT", 3)
    hessian = second_moment(correlated_inputs(400, 10)).float()
    hessian[place] = value
    assert triangular_root(hessian, damping=0.01) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_library_that_does_not_tell_that_it_failed(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some do where numbers are NaN."""

    def silent(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(matrix, value), torch.tensor(0)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    assert triangular_root(second_moment(correlated_inputs(400, 10)), damping=0.01) is None


@pytest.mark.parametrize(
    "hessian",
    [
        second_moment(correlated_inputs(400, 31)).float(),
        torch.diag(torch.tensor([4.0, 0.0, 1.0])),
        torch.zeros(3, 3),
        indefinite(5, 0.5),
        indefinite(5, 3.0),
        torch.full((3, 3), torch.nan),
    ],
    ids=["as usual", "dead channel", "all dead", "more damping", "hopeless", "nan"],
)
def test_the_matrix_is_left_alone_whatever_became_of_it(hessian: Tensor) -> None:
    before = hessian.clone()
    root = triangular_root(hessian, damping=0.01)
    torch.testing.assert_close(hessian, before, rtol=0, atol=0, equal_nan=True)
    if root is not None:
        assert root.upper.data_ptr() != hessian.data_ptr()


def test_a_hessian_that_is_used_up_gives_its_memory_back_and_the_same_factor() -> None:
    rng = np.random.default_rng(5)
    inputs = torch.from_numpy(rng.normal(size=(100, 12)))
    hessian = inputs.T @ inputs
    kept, given = hessian.clone(), hessian.clone()
    expected = triangular_root(kept, 0.01)
    root = triangular_root(given, 0.01, use_up=True)
    assert root is not None
    assert expected is not None
    assert torch.equal(root.upper, expected.upper)
    assert torch.equal(kept, hessian)
    assert given.untyped_storage().nbytes() == 0

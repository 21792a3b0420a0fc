"""Rounding with compensation, against the textbook, brute force and trained weights."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from haq.int8 import grid, matmul
from haq.model.blocks import capture_block_inputs, find_blocks, run_block
from haq.model.linears import linears, weight_view
from haq.model.trace import observe_inputs
from haq.quantization.calibration import calibration_batches
from haq.quantization.hessian import SecondMoment, triangular_root
from haq.quantization.rounding import output_error, round_to_nearest, round_with_compensation
from tests.quantization.moments import mean_of


def correlated_inputs(tokens: int, channels: int, seed: int) -> np.ndarray:
    """Float64 ``[tokens, channels]`` that share a few directions, as activations do."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(tokens, max(channels // 4, 1)))
    noise = 0.3 * rng.normal(size=(tokens, channels))
    return few @ rng.normal(size=(few.shape[1], channels)) + noise


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """H with damping on its diagonal, and 1 there for channels that are always zero."""
    dead = np.diag(hessian) == 0
    diagonal = np.where(dead, 1.0, np.diag(hessian) + damping * np.diag(hessian).mean())
    return hessian - np.diag(np.diag(hessian)) + np.diag(diagonal)


def optimal_brain_surgeon(
    weight: np.ndarray, scale: np.ndarray, damped_hessian: np.ndarray
) -> np.ndarray:
    """One column after the other; the inverse of what is left of H is computed anew each time."""
    weight = weight.astype(np.float64)
    rounded = np.zeros(weight.shape, np.int8)
    for k in range(weight.shape[1]):
        inverse = np.linalg.inv(damped_hessian[k:, k:])
        rounded[:, k] = np.clip(np.rint(weight[:, k] / scale), -127, 127)
        error = weight[:, k] - rounded[:, k] * scale
        weight[:, k:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return rounded


def naive_output_error(weight: np.ndarray, rounded: np.ndarray, inputs: np.ndarray) -> float:
    """Squared difference of the outputs, mean over tokens."""
    return float(np.square(inputs @ (weight - rounded).T).sum() / len(inputs))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(7, 1), (1, 5), (6, 64), (5, 127), (5, 128), (5, 129), (4, 200), (3, 260)],
)
@pytest.mark.parametrize("dead", [False, True], ids=["all alive", "dead channels"])
def test_the_same_integers_as_the_textbook(rows: int, columns: int, dead: bool) -> None:
    inputs = correlated_inputs(500, columns, seed=columns)
    if dead:
        inputs[:, ::3] = 0.0
    hessian = inputs.T @ inputs / len(inputs)
    weight = torch.randn(rows, columns)
    scale = grid.row_scale(weight)
    root = triangular_root(torch.from_numpy(hessian), damping=0.01)

    rounded = round_with_compensation(weight, scale, root.upper)

    expected = optimal_brain_surgeon(
        weight.double().numpy(), scale.double().numpy()[:, 0], damped(hessian, 0.01)
    )
    assert rounded.dtype == torch.int8
    np.testing.assert_array_equal(rounded.numpy(), expected)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (63, 5), (64, 40), (65, 255), (130, 257), (200, 600)]
)
@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_every_integer_is_next_to_its_target(rows: int, columns: int, backend: str) -> None:
    """Block by block and, by the kernel, 64 rows at a time: every integer is next to its target.

    What the target of a column is depends on the integers before it. So it is computed in float64
    from those that were chosen: a tie that falls the other way is no error, and no excuse.
    """
    inputs = torch.from_numpy(correlated_inputs(900, columns, seed=columns))
    root = triangular_root(inputs.T @ inputs / len(inputs), damping=0.01).upper
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    scale = grid.row_scale(weight)
    with matmul.use_backend(backend):
        if backend == "llvm" and not matmul.compiles():
            pytest.skip("the kernels of haq[cpu] do not run here")
        rounded = round_with_compensation(weight, scale, root.float()).double()
    differences = weight.double() - rounded * scale.double()
    owed = differences @ root.triu(1) / root.diagonal()
    targets = ((weight.double() + owed) / scale.double()).clamp(-127, 127)
    assert (rounded - targets).abs().max() < 0.5 + 1e-3
    nearest = (weight / scale).double().round()
    assert columns < 40 or (nearest - targets).abs().max() > 0.5 + 1e-3  # They do owe something.


@pytest.mark.parametrize("backend", ["llvm", "reference"])
def test_a_part_of_a_matrix_is_written_and_nothing_else(backend: str) -> None:
    """The last columns and rows, where neither 256 nor 64 of them are left."""
    weight, scale = torch.randn(70, 300), torch.full((70, 1), 0.02)
    weight[:, -1], weight[-1] = 5.0, -5.0
    with matmul.use_backend(backend):
        rounded = round_with_compensation(weight, scale, torch.eye(300))
    # Without correlations, to nearest; what is beyond the grid's ends, to these.
    expected = (weight.double() / scale.double()).round().clamp(-127, 127)
    assert torch.equal(rounded.double(), expected)


def test_dead_channels_are_rounded_to_nearest() -> None:
    inputs = correlated_inputs(500, 20, seed=0)
    inputs[:, ::3] = 0.0
    hessian = torch.from_numpy(inputs.T @ inputs)
    weight = torch.randn(6, 20)
    integers, scale = round_to_nearest(weight)
    rounded = round_with_compensation(weight, scale, triangular_root(hessian, 0.01).upper)
    assert torch.equal(rounded[:, ::3], integers[:, ::3])
    assert not torch.equal(rounded, integers)


@pytest.mark.parametrize(
    "weight",
    [torch.randn(4, 150), torch.randn(150, 4).T, torch.randn(1, 150)],
    ids=["by row", "by column, as Conv1D has it", "one row"],
)
def test_arguments_stay_as_they_are(weight: Tensor) -> None:
    upper = torch.randn(150, 150).triu() + 20 * torch.eye(150)
    scale = grid.row_scale(weight)
    arguments = [value.clone() for value in (weight, scale, upper)]
    round_with_compensation(weight, scale, upper)
    torch.testing.assert_close([weight, scale, upper], arguments, rtol=0, atol=0)


def test_compensation_never_leaves_the_grid() -> None:
    """Two inputs that are nearly equal pass large errors on; what they cannot repay is lost."""
    inputs = correlated_inputs(100, 40, seed=3)
    inputs[:, 1::2] = inputs[:, ::2] * 1.001
    root = triangular_root(torch.from_numpy(inputs.T @ inputs), 1e-6)
    weight = torch.full((3, 40), 1.0).double()
    rounded = round_with_compensation(weight, torch.full((3, 1), 1 / 100.4), root.upper)
    assert rounded.abs().max() <= 127
    tiny_scale = torch.full((3, 1), 1e-3)
    assert torch.equal(
        round_with_compensation(weight, tiny_scale, root.upper)[:, 0],
        torch.full((3,), 127, dtype=torch.int8),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nearest_rounding_is_the_grids(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 9).to(dtype)
    integers, scale = round_to_nearest(weight)
    w = weight.float().numpy()
    expected_scale = np.abs(w).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-6)
    # In float32, as the grid does it: 16-bit weights are often exactly between two integers.
    np.testing.assert_array_equal(integers.numpy(), np.rint(w / scale.numpy()))


# --- The error ------------------------------------------------------------------------------------


def test_the_output_error_is_that_of_the_outputs() -> None:
    inputs = correlated_inputs(300, 12, seed=0)
    weight, rounded = np.random.default_rng(0).normal(size=(2, 5, 12))
    hessian = torch.from_numpy(inputs.T @ inputs / len(inputs))
    error = output_error(torch.from_numpy(weight), torch.from_numpy(rounded), hessian)
    assert error.item() == pytest.approx(naive_output_error(weight, rounded, inputs), rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_compensation_is_between_brute_force_and_nearest(seed: int) -> None:
    """The method is greedy: on these cases it is better than nearest, that is not a law."""
    inputs = correlated_inputs(200, 5, seed)
    hessian = torch.from_numpy(inputs.T @ inputs / len(inputs))
    weight = 8 * torch.rand(6, 5, generator=torch.Generator().manual_seed(seed)) - 4
    scale = torch.ones(6, 1)

    compensated = round_with_compensation(weight, scale, triangular_root(hessian, 1e-6).upper)
    nearest = grid.quantize(weight, scale)

    # Every way to take one of the two integers on either side of each weight.
    steps = np.array(list(itertools.product((-1, 0, 1, 2), repeat=5)))
    optimum = sum(
        min(naive_output_error(row, choice, inputs) for choice in (np.floor(row) + steps)[:, None])
        for row in weight.double().numpy()[:, None]
    )
    error, nearest_error = (
        naive_output_error(weight.double().numpy(), q.double().numpy(), inputs)
        for q in (compensated, nearest)
    )
    assert optimum <= error * (1 + 1e-12)
    assert error < nearest_error


@pytest.mark.parametrize("columns", [32, 200])
@pytest.mark.parametrize("seed", range(3))
def test_compensation_beats_nearest_on_correlated_inputs(columns: int, seed: int) -> None:
    inputs = correlated_inputs(600, columns, seed)
    hessian = torch.from_numpy(inputs.T @ inputs / len(inputs)).float()
    weight = torch.randn(16, columns)
    nearest, scale = round_to_nearest(weight)
    compensated = round_with_compensation(weight, scale, triangular_root(hessian, 0.01).upper)
    errors = [
        naive_output_error(weight.double().numpy(), (q * scale).double().numpy(), inputs)
        for q in (compensated, nearest)
    ]
    # Three quarters of the directions hardly matter, so much of the error can be moved there.
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-opt-outliers"])
def test_compensation_beats_nearest_on_every_layer_of_a_trained_model(
    name: str, shared: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    text = shared / "data" / "text" / "wikitext103-excerpt.json"
    ids = torch.cat(calibration_batches(tokenizer, text, num_samples=16, sequence_length=128))
    _, blocks = find_blocks(model)
    inputs = capture_block_inputs(model, blocks, [{"input_ids": ids}])

    ratios: dict[str, float] = {}
    for i, block in enumerate(blocks):
        layers = linears(block)
        moments = {n: SecondMoment(weight_view(m).shape[1]) for n, m in layers.items()}
        watchers = {
            n: lambda rows, m=moment: m.update(grid.fake_quantize_rows(rows))
            for n, moment in moments.items()
        }
        observe_inputs(block, watchers, inputs.of_block(i))
        for n, module in layers.items():
            hessian = mean_of(moments[n])
            weight = weight_view(module)
            nearest, scale = round_to_nearest(weight)
            root = triangular_root(hessian, damping=0.01)
            assert (root.damping, root.floor) == (0.01, 0.0)
            compensated = round_with_compensation(weight, scale, root.upper)
            error, nearest_error = (
                output_error(weight.double(), (q * scale).double(), hessian.double())
                for q in (compensated, nearest)
            )
            ratios[f"{i}.{n}"] = float(error / nearest_error)
        inputs.hidden = [run_block(block, batch) for batch in inputs.of_block(i)]

    assert len(ratios) == 24
    assert max(ratios.values()) < 1, ratios


# --- Laws -----------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 6), st.integers(1, 12))
seeds = st.integers(0, 2**16)


def problem(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and its scale, float32, and the root of some inputs, float64."""
    inputs = torch.from_numpy(correlated_inputs(50, shape[1], seed))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight, grid.row_scale(weight), triangular_root(inputs.T @ inputs, 0.01).upper


@settings(deadline=None)
@given(shape=shapes, seed=seeds)
def test_rows_do_not_see_each_other(shape: tuple[int, int], seed: int) -> None:
    weight, scale, upper = problem(shape, seed)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    together = round_with_compensation(weight, scale, upper)
    assert torch.equal(round_with_compensation(weight[order], scale[order], upper), together[order])
    alone = [round_with_compensation(weight[i : i + 1], scale[i : i + 1], upper) for i in order]
    assert torch.equal(torch.cat(alone), together[order])


@settings(deadline=None)
@given(shape=shapes, seed=seeds)
def test_the_mirror_image_of_a_weight_gets_the_mirror_image(
    shape: tuple[int, int], seed: int
) -> None:
    weight, scale, upper = problem(shape, seed)
    rounded = round_with_compensation(weight, scale, upper)
    assert torch.equal(round_with_compensation(-weight, scale, upper), -rounded)


@settings(deadline=None)
@given(shape=shapes, seed=seeds, exponent=st.integers(-8, 8))
def test_the_unit_of_the_weight_does_not_matter(
    shape: tuple[int, int], seed: int, exponent: int
) -> None:
    weight, scale, upper = problem(shape, seed)
    rounded = round_with_compensation(weight, scale, upper)
    unit = 2.0**exponent
    assert torch.equal(round_with_compensation(weight * unit, scale * unit, upper), rounded)


@settings(deadline=None)
@given(shape=shapes, seed=seeds)
def test_a_weight_on_the_grid_stays(shape: tuple[int, int], seed: int) -> None:
    weight, scale, upper = problem(shape, seed)
    integers = grid.quantize(weight, scale)
    on_grid = integers.double() * scale.double()
    assert torch.equal(round_with_compensation(on_grid, scale, upper), integers)


@settings(deadline=None)
@given(shape=shapes, seed=seeds)
def test_inputs_without_correlation_leave_nothing_to_repay(
    shape: tuple[int, int], seed: int
) -> None:
    weight, scale, upper = problem(shape, seed)
    rounded = round_with_compensation(weight, scale, upper.diagonal().diag())
    expected = np.rint(weight.double().numpy() / scale.double().numpy())
    np.testing.assert_array_equal(rounded.numpy(), expected)

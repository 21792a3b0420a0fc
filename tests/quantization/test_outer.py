"""Second moments and debts of two bfloat16, against float64; and that nobody gets them unasked."""

from typing import Any

import pytest
import torch
from torch import Tensor

import haq
from haq.int8 import grid, matmul
from haq.int8.llvm import compiler
from haq.quantization import outer, products
from haq.quantization.hessian import SecondMoment, triangular_root
from haq.quantization.outer import in_bfloat16
from haq.quantization.products import fast_products
from haq.quantization.rounding import output_error, round_to_nearest, round_with_compensation
from tests.architectures import ARCHITECTURES, token_ids
from tests.quantization.moments import mean_of

COMPILED: dict[tuple[Any, ...], compiler.Kernel] = {}


@pytest.fixture
def matrices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a processor that multiplies matrices; gives how many rows each sum had."""
    if not matmul.compiles():
        pytest.skip("the kernels of haq[cpu] do not run here")
    from haq.int8.llvm import outer as kernels

    counts: list[int] = []
    add_outer = kernels.add_outer

    def counted(total: Tensor, terms: Any, count: int, first: int = 0) -> None:
        counts.append(count)
        add_outer(total, terms, count, first)

    monkeypatch.setattr(kernels, "add_outer", counted)
    monkeypatch.setattr(compiler, "_kernels", COMPILED)
    monkeypatch.setattr(kernels, "products_here", lambda: kernels.Halves(instruction=False))
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: False)
    monkeypatch.setattr(products, "_WORTH_IT", 1)
    return counts


def correlated_inputs(tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    few = torch.randn(tokens, max(channels // 4, 1), generator=generator)
    inputs = few @ torch.randn(few.shape[1], channels, generator=generator)
    inputs += 0.3 * torch.randn(tokens, channels, generator=generator)
    inputs[:, 3] *= 40  # As channels of language models are.
    return inputs


def test_a_second_moment(matrices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "_TOKENS", 64)
    integers = torch.randint(-255, 256, (150, 1120), generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.1, 7, 150)[:, None]
    moment = SecondMoment(1120)
    with in_bfloat16():
        moment.update(integers[:100], scale[:100])
        moment.update(integers[100:], scale[100:])
    assert matrices == [64, 64, 36, 36, 50, 50]  # Of two parts of the matrix.
    mean = mean_of(moment)
    # A token counts as a bfloat16 says; sums have no error but that of float32.
    weights = scale.square().bfloat16().double()
    exact = (integers * weights).T @ integers.double() / 150
    sizes = exact.diagonal().sqrt()
    assert ((mean - exact).abs() <= 2.0**-20 * sizes * sizes[:, None]).all()


def test_a_token_that_is_thousands_of_times_as_large_needs_no_damping(matrices: list[int]) -> None:
    """Its channels leave the others at zero, and what is left of one after another at nothing."""
    channels = 4096
    integers = torch.zeros(32, channels)
    generator = torch.Generator().manual_seed(1)
    integers[0, ::512] = torch.randint(20, 128, (8,), generator=generator).float()
    moment = SecondMoment(channels)
    with in_bfloat16():
        moment.update(integers, torch.full((32, 1), 23.4567))
    assert matrices == [32] * 4
    assert triangular_root(moment.take_mean(), damping=1e-4).damping == 1e-4


@pytest.mark.parametrize("shape", [(256,), (300,), (2, 150), (1, 3, 256)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_many_tokens(shape: tuple[int, ...], bias: bool, matrices: list[int]) -> None:
    layer = torch.nn.Linear(96, 64, bias=bias).bfloat16().float().requires_grad_(False)
    x = torch.randn(*shape, 96, generator=torch.Generator().manual_seed(3))
    with fast_products():
        result = layer(x)
    assert matrices == [96]
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert result.shape == exact.shape
    assert result.is_contiguous()
    size = x.double().abs() @ layer.weight.double().abs().T
    assert ((result - exact).abs() <= 2.0**-17 * size + 1e-6).all()
    assert (result - exact).abs().max() > 0


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(255, 32), torch.ones(32, 32)),
        (torch.ones(256, 40), torch.ones(32, 40)),
        (torch.ones(256, 32), torch.ones(40, 32)),
        (torch.ones(256, 32), torch.ones(32, 32) * 1.001),
        (torch.ones(256, 32), torch.ones(32, 32).index_fill(0, torch.tensor(9), 1.001)),
        (torch.ones(256, 32, requires_grad=True), torch.ones(32, 32)),
    ],
    ids=["few", "columns", "rows", "float weights", "one row of them", "a gradient"],
)
def test_all_other_layers_are_of_float32(x: Tensor, weight: Tensor, matrices: list[int]) -> None:
    with fast_products():
        result = torch.nn.functional.linear(x, weight)
    assert not matrices
    assert torch.equal(result, torch.nn.functional.linear(x, weight))


def test_layers_are_of_float32_elsewhere(matrices: list[int]) -> None:
    with in_bfloat16(), matmul.use_backend("reference"):
        assert outer.linear(torch.ones(256, 32), torch.ones(32, 32)) is None
    assert outer.linear(torch.ones(256, 32), torch.ones(32, 32)) is None
    assert not matrices


@pytest.mark.parametrize("columns", [32, 320, 768])
def test_what_columns_owe(columns: int, matrices: list[int]) -> None:
    inputs = correlated_inputs(2 * columns, columns).double()
    hessian = inputs.T @ inputs / len(inputs)
    root = triangular_root(hessian, damping=0.01).upper
    weight = torch.randn(96, columns, generator=torch.Generator().manual_seed(1))
    scale = grid.row_scale(weight)
    exact = round_with_compensation(weight.double(), scale, root)
    with in_bfloat16():
        rounded = round_with_compensation(weight, scale, root.float())
    assert matrices == list(range(0, columns, 256))
    errors = [
        float(output_error(weight.double(), integers.double() * scale.double(), hessian))
        for integers in (rounded, exact, round_to_nearest(weight)[0])
    ]
    # What other integers cost is a hundred-thousandth of what rounding to nearest does.
    assert abs(errors[0] - errors[1]) < 1e-5 * errors[2]
    differences = weight.double() - rounded.double() * scale.double()
    owed = differences @ root.triu(1) / root.diagonal()
    targets = ((weight.double() + owed) / scale.double()).clamp(-127, 127)
    assert float((rounded.double() - targets).abs().max()) < 0.5 + 1e-3


@pytest.mark.parametrize(
    ("kind", "columns", "rows"),
    [(torch.float32, 40, 32), (torch.float32, 32, 40), (torch.float64, 32, 32)],
    ids=["columns that fill no block", "rows that do not", "float64"],
)
def test_all_else_is_float(kind: torch.dtype, columns: int, rows: int, matrices: list[int]) -> None:
    weight = torch.randn(rows, columns, dtype=kind)
    scale = grid.row_scale(weight)
    expected = round_with_compensation(weight, scale, torch.eye(columns, dtype=kind))
    with in_bfloat16():
        rounded = round_with_compensation(weight, scale, torch.eye(columns, dtype=kind))
        moment = SecondMoment(columns)
        moment.update(weight, torch.full((rows, 1), 2.0) if columns % 32 else None)
    exact = weight.double().T @ weight.double() / rows * (4 if columns % 32 else 1)
    torch.testing.assert_close(mean_of(moment).double(), exact, rtol=1e-5, atol=1e-5)
    assert not matrices
    assert torch.equal(rounded, expected)


def test_nobody_gets_it_unasked(matrices: list[int]) -> None:
    integers, scale = torch.randint(-9, 9, (64, 64)), torch.rand(64, 1)
    with fast_products():
        SecondMoment(64).update(integers, scale)
    assert matrices == [64]
    moment = SecondMoment(64)
    moment.update(integers, scale)
    with matmul.use_backend("reference"), in_bfloat16():
        moment.update(integers, scale)
    assert matrices == [64]
    inputs = integers.double() * scale.double()
    exact = inputs.T @ inputs / 64
    torch.testing.assert_close(mean_of(moment).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_model_is_quantized_with_it(matrices: list[int]) -> None:
    model = ARCHITECTURES["llama"]()
    haq.quantize_model(model, [token_ids(4, 16)], progress=False)
    assert matrices

"""Products of float32 by oneDNN against float64, and who gets them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import haq
from haq.quantization import products
from haq.quantization.products import fast_products
from tests.architectures import ARCHITECTURES, token_ids

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs torch with oneDNN"
)

OURS = "mkldnn::_linear_pointwise"


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where oneDNN is the faster one; small products take its way, too."""
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_WORTH_IT", 1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def operations() -> Iterator[list[str]]:
    with fast_products(), Operations() as seen:
        yield seen.names


def assert_near(result: Tensor, exact: Tensor) -> None:
    assert result.dtype == torch.float32
    assert result.shape == exact.shape
    assert float((result.double() - exact).norm() / exact.norm()) < 1e-6


SIZES = [(1, 1, 1), (64, 128, 64), (65, 63, 7), (130, 200, 129)]  # M, K, N

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, b: a @ b,
    "matmul": torch.matmul,
    "a.matmul": lambda a, b: a.matmul(b),
    "linear": lambda a, b: functional.linear(a, b.T),
    "addmm_": lambda a, b: a.new_zeros(len(a), b.shape[1]).addmm_(a, b),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_those_of_float64(
    product: Callable[[Tensor, Tensor], Tensor],
    size: tuple[int, int, int],
    generator: torch.Generator,
) -> None:
    m, k, n = size
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    with operations() as names:
        result = product(a, b)
    assert names.count(OURS) == 1
    assert_near(result, a.double() @ b.double())


@pytest.mark.parametrize("shape", [(2, 3, 70), (5, 70), (1, 1, 1, 70)])
def test_a_layer_with_a_bias(shape: tuple[int, ...], generator: torch.Generator) -> None:
    layer = torch.nn.Linear(70, 33).requires_grad_(False)
    x = torch.randn(shape, generator=generator)
    with operations() as names:
        result = layer(x)
    assert OURS in names
    assert_near(result, x.double() @ layer.weight.double().T + layer.bias.double())


def test_parts_of_wider_matrices(generator: torch.Generator) -> None:
    wide = torch.randn(128, 500, generator=generator)
    total = torch.ones(64, 300)
    with operations() as names:
        total.addmm_(wide[:, 100:164].T, wide[:, :300])
    assert OURS in names
    exact = wide.double()
    assert_near(total, 1 + exact[:, 100:164].T @ exact[:, :300])


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 3).double(), torch.ones(4, 3).double()),
        (torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16()),
        (torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)),
        (torch.ones(2, 3, device="meta"), torch.ones(4, 3, device="meta")),
        (torch.ones(3), torch.ones(4, 3)),
        (torch.ones(2, 3), torch.ones(3)),
    ],
    ids=["float64", "bfloat16", "a gradient", "no CPU", "a vector", "a weight that is one"],
)
def test_all_else_is_left_to_torch(x: Tensor, weight: Tensor) -> None:
    expected = functional.linear(x, weight)
    with operations() as names:
        result = functional.linear(x, weight)
    assert OURS not in names
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WORTH_IT", 2 * 3 * 4 + 1)
    with operations() as names:
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert OURS not in names


def test_few_numbers_of_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    linear = torch.ops.mkldnn._linear_pointwise

    def note(x: Tensor, weight: Tensor, *others: object) -> Tensor:
        shapes.add((*x.shape, *weight.shape))
        result: Tensor = linear(x, weight, *others)
        return result

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", note)
    with fast_products():
        for count in range(1, 129):
            torch.ones(count, 200) @ torch.ones(200, 8)
    assert shapes == {(64, 256, 8, 256), (128, 256, 8, 256)}


@pytest.mark.parametrize(
    ("maker", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_the_choice_is_by_the_kind_of_processor(
    maker: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    told = tmp_path / "cpuinfo"
    if maker:
        told.write_text(f"processor\t: 0\nvendor_id\t: {maker}\nmodel name\t: x\n")
    monkeypatch.setattr(products, "_CPU_INFO", told)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._onednn_is_faster.__wrapped__() is expected


def test_a_model_is_quantized_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for faster in (True, False):
        monkeypatch.setattr(products, "_onednn_is_faster", lambda answer=faster: answer)
        model, tokens = ARCHITECTURES["llama"](), [token_ids(2, 33, seed=1)]
        seen = Operations()
        with seen:
            haq.quantize_model(model, tokens, progress=False)
        assert (OURS in seen.names) is faster
        reports.append(haq.quantization_report(model))
    for ours, theirs in zip(*(report.blocks[0].layers for report in reports), strict=True):
        assert ours.name == theirs.name
        assert ours.error_after == pytest.approx(theirs.error_after, rel=0.05)

"""What is between the products of a layer, and chains of such kernels, against torch."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from haq.int8 import matmul

if not matmul.compiles():
    pytest.skip("LLVM's kernels do not run here", allow_module_level=True)

from haq.int8.llvm import between, weight
from haq.int8.llvm.chain import Chain, Step
from haq.int8.llvm.weight import LlvmWeight, Rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 63, 64, 200, 4099]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """So many of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor to write to, and all of its memory, which goes on behind it."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), 77.0, dtype=dtype)
    return memory[:size].view(shape), memory


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_torch(width: int, dtype: torch.dtype) -> None:
    a, b = (random(width, dtype=dtype, seed=seed) for seed in (0, 1))
    out, memory = guarded(width, dtype=dtype)
    Chain([between.sum_step(dtype, a.data_ptr(), b.data_ptr(), out.data_ptr(), width)]).run()
    assert torch.equal(out, a + b)
    assert bool((memory[width:] == 77).all())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gates_of_rows(rows: int, width: int) -> None:
    both = random(rows, 2 * width, dtype=torch.float32)
    before = both.clone()
    result = between.gated(both)
    exact = F.silu(both[:, :width].double()) * both[:, width:].double()
    assert (result.dtype, result.shape) == (torch.float32, (rows, width))
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-30)
    assert torch.equal(both, before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gates_are_as_near_to_float64_as_those_of_torch(width: int, dtype: torch.dtype) -> None:
    both = random(3, 2 * width, dtype=dtype)
    a, b = both[:, :width], both[:, width:]
    out, memory = guarded(3, width, dtype=dtype)
    places = a.data_ptr(), b.data_ptr(), out.data_ptr(), 3, width, 2 * width
    Chain([between.gate_step(dtype, *places)]).run()
    exact = F.silu(a.double()) * b.double()
    error, of_torch = ((x.double() - exact).norm() for x in (out, F.silu(a) * b))
    assert error <= 1.001 * of_torch + 1e-7 * exact.norm()
    assert bool((memory[out.numel() :] == 77).all())


def test_gates_of_large_numbers_are_finite() -> None:
    a = torch.tensor([-1e4, -88.0, -0.0, 0.0, 88.0, 1e4, float("nan"), float("inf")])
    b, out = torch.ones(8), torch.empty(8)
    Chain(
        [between.gate_step(torch.float32, a.data_ptr(), b.data_ptr(), out.data_ptr(), 1, 8, 8)]
    ).run()
    torch.testing.assert_close(out, F.silu(a), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_weighted_rows_are_added_in_order(width: int, dtype: torch.dtype) -> None:
    rows = random(5, width, dtype=torch.float32)
    factors = random(5, dtype=torch.float32, seed=1)
    out, memory = guarded(width, dtype=dtype)
    places = rows.data_ptr(), factors.data_ptr(), out.data_ptr(), 5, width
    Chain([between.weighted_step(dtype, *places)]).run()
    total = torch.zeros(width)
    for row, factor in zip(rows, factors, strict=True):
        total = total + row * factor
    assert torch.equal(out, total.to(dtype))
    assert bool((memory[width:] == 77).all())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "width", "turned"),
    [(4, 4, 64, 64, 64), (6, 2, 20, 12, 20), (3, 1, 24, 8, 6), (2, 1, 2, 1, 2)],
)
def test_rotations_are_those_of_transformers(
    heads: int,
    groups: int,
    size: int,
    width: int,
    turned: int,
    dtype: torch.dtype,
) -> None:
    query, key, value = (
        random(1, rows, 1, columns, dtype=dtype, seed=rows)
        for rows, columns in ((heads, size), (groups, size), (groups, width))
    )
    angles = random(1, 1, turned, dtype=torch.float32, seed=9)  # Not the same for both halves.
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    scale = size**-0.5
    of_query = torch.full((1, heads, 1, size), 77.0)
    # A place among other tokens, which has to be left as it is.
    keys = torch.full((1, groups, 5, size), 77.0, dtype=dtype)
    values = torch.full((1, groups, 5, width), 77.0, dtype=dtype)
    step = between.rotation_step(
        dtype,
        scale,
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        of_query.data_ptr(),
        (heads, groups, size, width, turned),
    )
    step.tell("cos", cos.data_ptr(), sin.data_ptr())
    places = keys[:, :, 3].data_ptr(), values[:, :, 3].data_ptr()
    step.tell("turned_key", *places, keys.stride(1), values.stride(1))
    Chain([step]).run()
    rotated = apply_rotary_pos_emb(query[..., :turned], key[..., :turned], cos, sin)
    expected = [
        torch.cat([part, rest[..., turned:]], -1)
        for part, rest in zip(rotated, (query, key), strict=True)
    ]
    assert torch.equal(of_query, expected[0].float() * scale)
    assert torch.equal(keys[:, :, 3:4], expected[1])
    assert torch.equal(values[:, :, 3:4], value)
    others = [0, 1, 2, 4]
    assert bool((keys[:, :, others] == 77).all())
    assert bool((values[:, :, others] == 77).all())


def packed(rows: int, columns: int, seed: int = 0) -> LlvmWeight:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    return LlvmWeight(integers, torch.rand(rows, 1, generator=generator) + 0.01)


@pytest.mark.usefixtures("threads")
def test_a_chain_of_products_is_run_again_and_again() -> None:
    """Each begins when the one before is done, and finds its counter at 0."""
    first, second = packed(300, 77), packed(50, 300, seed=1)
    x = random(77, dtype=torch.float32)
    middle, out = torch.empty(300), torch.empty(50)
    rows = [[Rows(each, 1)] for each in (first, second)]
    memory = torch.empty(max(map(weight.room, rows)), dtype=torch.uint8)
    dtypes = torch.float32, torch.float32
    room = memory.data_ptr()
    chain = Chain(
        [
            weight.step(rows[0], dtypes, x.data_ptr(), room, middle.data_ptr()),
            weight.step(rows[1], dtypes, middle.data_ptr(), room, out.data_ptr()),
        ]
    )
    for seed in range(20):
        x.copy_(random(77, dtype=torch.float32, seed=seed))
        chain.run()
        assert torch.equal(out, second.linear(first.linear(x, None, None), None, None))


def test_what_a_step_is_told_can_be_changed() -> None:
    a, b, out = (torch.full((3,), value) for value in (1.0, 2.0, 0.0))
    step = between.sum_step(torch.float32, a.data_ptr(), a.data_ptr(), out.data_ptr(), 3)
    chain = Chain([step])
    step.tell("b", b.data_ptr())
    chain.run()
    assert out.tolist() == [3, 3, 3]
    step.tell("a", b.data_ptr())
    step.tell("width", 2)
    chain.run()
    assert out.tolist() == [4, 4, 3]
    assert step.address_of("counter") == 0
    assert step.address_of("b") == step.address_of("a") + 8


def test_chains_of_several_threads_of_python() -> None:
    """Each has its own memory."""

    def add(results: list[bool]) -> None:
        a, out = torch.ones(4096), torch.zeros(4096)
        step: Step = between.sum_step(
            torch.float32, out.data_ptr(), a.data_ptr(), out.data_ptr(), 4096
        )
        chain = Chain([step] * 10)
        for _ in range(20):
            chain.run()
        results.append(bool((out == 200).all()))

    results: list[bool] = []
    workers = [threading.Thread(target=add, args=(results,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [True] * 3

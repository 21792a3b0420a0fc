"""The products that LLVM compiles, by every processor's instructions, against numpy."""

import ctypes
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from torch import Tensor

from haq.int8 import matmul
from haq.int8.llvm import abreast, amx, compiler, halves, kernels, pieces, threads, tiles
from haq.int8.llvm.between import gated
from haq.int8.llvm.dots import Dots, FoursOfBytes, PairsOfWords, best_of
from haq.int8.llvm.kernels import Kind
from haq.int8.llvm.weight import LlvmWeight, Rows, products
from haq.int8.tokens import round_tokens, row_sums

# What these processors have. Where this one does not, VNNI's instruction is written out.
WAYS: dict[str, Dots] = {
    "AVX2": PairsOfWords(256),
    "AVX-VNNI": FoursOfBytes(256, registers=16, instruction=False),
    "AVX512-VNNI": FoursOfBytes(512, registers=32, instruction=False),
    "AMX": FoursOfBytes(512, registers=32, instruction=False, matrices=True),
}

COMPILED: dict[str, dict[tuple[Any, ...], compiler.Kernel]] = {}

SHAPES = {  # T, K, N: few tokens, tiles with rest, several pieces of tokens and of rows
    "one of everything": (1, 1, 1),
    "one token": (1, 257, 50),
    "four tokens": (4, 130, 33),
    "five tokens": (5, 64, 19),
    "a prompt": (151, 2113, 131),
    "whole matrices and rest": (151, 192, 131),
    "matrices in parts": (70, 4096 + 128, 85),
    "matrices for more tokens than one strip": (530, 64, 33),
    "one register of tokens": (13, 128, 21),
    "four registers of tokens": (61, 64, 40),
    "in parts, and rest": (101, 2048 + 64, 27),
    "few tokens that are long": (3, 2**14 + 64, 17),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dots]:
    """One processor's way of multiplying, for all that is packed and run."""
    if not best_of(llvm.get_host_cpu_features()):
        pytest.skip("this processor has no AVX2")
    dots = WAYS[request.param]
    monkeypatch.setattr(compiler, "dots_here", lambda: dots)
    monkeypatch.setattr(compiler, "_kernels", COMPILED.setdefault(request.param, {}))
    _forget_layouts()
    yield dots
    _forget_layouts()


def _forget_layouts() -> None:
    """They are those of one processor."""
    pieces._pieces.cache_clear()
    pieces.layout.cache_clear()


def random_weight(rows: int, columns: int, seed: int = 0) -> LlvmWeight:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    return LlvmWeight(integers, torch.rand(rows, 1, generator=generator) + 0.01)


def expected(
    x: Tensor, packed: LlvmWeight, bias: Tensor | None, asymmetric: bool, dtype: torch.dtype
) -> Tensor:
    """The formula of `haq.int8.matmul`: sums in int64, each later step in float32."""
    tokens = round_tokens(x.float(), asymmetric)
    integers = tokens.integers.numpy().astype(np.int64)
    weight, scale = packed.unpack(), packed.scale
    sums = integers @ weight.numpy().astype(np.int64).T
    result = sums.astype(np.float32) * scale.numpy().T
    if tokens.shift is not None:
        added = tokens.shift.double().numpy() * row_sums(weight, scale).double().numpy()
        result = (result.astype(np.float64) + added).astype(np.float32)  # One rounding.
    result = result * tokens.scale.numpy()
    if bias is not None:
        result = result + bias.numpy()
    return torch.from_numpy(result).to(dtype)


def assert_same_bits(result: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(result, reference, rtol=0, atol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_processor_gives_the_same_bits(
    shape: tuple[int, int, int], asymmetric: bool, generator: torch.Generator
) -> None:
    count, columns, rows = shape
    packed, bias = random_weight(rows, columns), torch.randn(rows, generator=generator)
    x = torch.randn(count, columns, generator=generator) / 64
    sums = row_sums(packed.unpack(), packed.scale) if asymmetric else None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = (x + 0.01 * asymmetric).to(dtype)
        result = packed.linear(values, bias, sums)
        assert_same_bits(result, expected(values, packed, bias, asymmetric, dtype))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_values_next_to_the_middle_of_two_steps(
    asymmetric: bool, generator: torch.Generator
) -> None:
    """There the last place of a quotient decides, which a product with the inverse has not."""
    largest = torch.rand(300, 1, generator=generator) + 0.5
    scale = (2 * largest) / 255 if asymmetric else largest / 127
    middles = (torch.arange(-126, 126, dtype=torch.float64) + 0.5) * scale.double()
    x = torch.cat([middles.float(), largest, -largest], 1)
    for step in range(-1, 2):
        towards = torch.full_like(x[:, :-2], step * torch.inf)
        values = x.clone()
        if step:
            values[:, :-2] = torch.nextafter(x[:, :-2], towards)
        columns = values.shape[1]
        packed = LlvmWeight(torch.eye(columns, dtype=torch.int8), torch.ones(columns, 1))
        sums = row_sums(packed.unpack(), packed.scale) if asymmetric else None
        result = packed.linear(values, None, sums)
        assert_same_bits(result, expected(values, packed, None, asymmetric, torch.float32))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 40), (5, 33, 40), (130, 128, 64)])
def test_a_gate_is_rounded_as_if_it_had_been_there(
    shape: tuple[int, int, int], dtype: torch.dtype, asymmetric: bool, generator: torch.Generator
) -> None:
    count, columns, rows = shape
    packed, bias = random_weight(rows, columns), torch.randn(rows, generator=generator)
    sums = row_sums(packed.unpack(), packed.scale) if asymmetric else None
    both = (4 * torch.randn(count, 2 * columns, generator=generator)).to(dtype)
    gate = gated(both)  # Compared with torch's in test_between.py.
    groups = [Rows(packed, count, bias, sums)]
    result = products(groups, both, torch.float32, gated=True)
    assert_same_bits(result, expected(gate, packed, bias, asymmetric, torch.float32))
    assert_same_bits(both[:, :columns], gate)


@pytest.mark.usefixtures("way")
def test_the_proof_of_every_backend_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_verdicts", {})
    backend = next(backend for backend in matmul.BACKENDS if backend.name == "llvm")
    assert matmul._verdict(backend, "cpu").exact


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("width", "counts"), [(70, [3, 0, 9, 1]), (128, [5, 2, 0, 40, 17, 61])])
def test_several_weights_in_one_call(
    width: int, counts: list[int], generator: torch.Generator
) -> None:
    groups = [Rows(random_weight(21, width, seed), count) for seed, count in enumerate(counts)]
    x = torch.randn(sum(counts), width, generator=generator)
    result = products(groups, x, torch.bfloat16)
    for group, rows, values in zip(groups, result.split(counts), x.split(counts), strict=True):
        reference = expected(values, group.weight, None, False, torch.bfloat16)
        assert_same_bits(rows, reference)


@pytest.mark.parametrize("columns", [1, 63, 64, 200])
def test_sums_of_rows(way: Dots, columns: int) -> None:
    packed = random_weight(37, columns)
    packed.weight[0] = -128
    packed.write(packed.weight)
    if way.unsigned:
        assert packed.sums is not None
        assert packed.sums.dtype == torch.int32
        assert packed.sums.tolist() == packed.weight.numpy().sum(1, dtype=np.int64).tolist()
    else:
        assert packed.sums is None


@pytest.mark.usefixtures("way")
def test_new_numbers_in_the_same_memory(generator: torch.Generator) -> None:
    packed, other = random_weight(9, 65), random_weight(9, 65, seed=1)
    packed.write(other.unpack())
    x = torch.randn(2, 65, generator=generator)
    assert_same_bits(packed.linear(x, None, None), expected(x, packed, None, False, x.dtype))


@pytest.mark.parametrize("width", [200, 4096 + 64])
@pytest.mark.parametrize("number", [1, 3, 16])
def test_any_number_of_threads(number: int, width: int, generator: torch.Generator) -> None:
    packed, x = random_weight(165, width), torch.randn(70, width, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        result = packed.linear(x, None, None)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(result, expected(x, packed, None, False, x.dtype))


def test_calls_of_several_threads_at_once(generator: torch.Generator) -> None:
    packed, x = random_weight(300, 500), torch.randn(5, 500, generator=generator)
    reference, results = expected(x, packed, None, False, x.dtype), []

    def call() -> None:
        results.extend(packed.linear(x, None, None) for _ in range(50))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 200
    for result in results:
        assert_same_bits(result, reference)


def test_tokens_that_do_not_lie_in_a_row(generator: torch.Generator) -> None:
    packed, x = random_weight(11, 24), torch.randn(24, 2, 3, generator=generator).permute(2, 1, 0)
    reference = expected(x.reshape(6, 24), packed, None, False, x.dtype)
    assert_same_bits(packed.linear(x, None, None), reference.view(3, 2, 11))


def test_scales_and_biases_that_do_not_lie_in_a_row(generator: torch.Generator) -> None:
    scale = (torch.rand(14, 1, generator=generator) + 0.01)[::2]
    packed = LlvmWeight(random_weight(7, 24).unpack(), scale)
    bias = torch.ones(1).expand(7)
    x = torch.randn(2, 24, generator=generator)
    assert_same_bits(packed.linear(x, bias, None), expected(x, packed, bias, False, x.dtype))


def test_tokens_of_another_device() -> None:
    message = r"must be on the CPU, where the layer is, got one on meta. Move the input, or the"
    with pytest.raises(RuntimeError, match=message):
        random_weight(3, 8).linear(torch.ones(1, 8, device="meta"), None, None)


def test_nan_in_a_token_with_a_zero_point(generator: torch.Generator) -> None:
    packed, x = random_weight(11, 40), torch.randn(3, 40, generator=generator)
    sums = row_sums(packed.unpack(), packed.scale)
    reference = packed.linear(x, None, sums)
    x[1, 39] = torch.nan  # Where no register is full.
    result = packed.linear(x, None, sums)
    assert result[1].isnan().all()
    assert_same_bits(result[::2], reference[::2])


def assembly(dots: Dots, processor: str) -> str:
    """What a processor is given to run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=processor, opt=3)
    module = llvm.parse_assembly(str(kernels.module_of(Kind("bfloat16", "bfloat16"), dots)))
    module.verify()
    compiler.optimize(module, machine)
    return str(machine.emit_assembly(module)).replace("\t", " ")


def function(text: str, name: str) -> str:
    """Its part of an assembly."""
    return text.partition(f"\n{name}:")[2].partition(".Lfunc_end")[0]


@pytest.mark.parametrize(
    ("dots", "processor", "instruction"),
    [
        (PairsOfWords(256), "haswell", r"vpmaddwd .*%ymm"),
        (PairsOfWords(512), "skylake-avx512", r"vpmaddwd .*%zmm"),
    ],
)
def test_the_instruction_is_the_processors(dots: Dots, processor: str, instruction: str) -> None:
    tile = tiles.wide(dots)[-1]
    found = re.findall(instruction, function(assembly(dots, processor), tile.name))
    assert len(found) == tile.rows * tile.tokens  # Once for each sum of a tile.


@pytest.mark.parametrize(
    ("dots", "processor", "name", "instruction"),
    [
        (FoursOfBytes(512, registers=32), "znver4", "fours", "vpdpbusd .*%zmm"),
        (FoursOfBytes(512, registers=32), "icelake-server", "fours", "vpdpbusd .*%zmm"),
        (FoursOfBytes(256, registers=16), "alderlake", "fours", "vpdpbusd .*%ymm"),
        (PairsOfWords(256), "znver3", "pairs", "vpmaddwd .*%ymm"),
        (PairsOfWords(256), "haswell", "pairs", "vpmaddwd .*%ymm"),
        (PairsOfWords(512), "skylake-avx512", "pairs", "vpmaddwd .*%zmm"),
    ],
)
@pytest.mark.parametrize("wide", [1, 2, 3])
def test_sums_of_tokens_abreast_stay_in_registers(
    dots: Dots, processor: str, name: str, instruction: str, wide: int
) -> None:
    text = function(assembly(dots, processor), f"{name}_{wide}")
    found = list(re.finditer(instruction, text))
    assert len(found) % (abreast.rows_of(dots) * wide) == 0 < len(found)
    # What is written in between would be a sum that found no register.
    loop = text[found[0].start() : found[-1].start()]
    assert not re.findall(r"vmov\w+ %[yz]mm\d+, .*\(", loop)


def test_products_of_matrices_are_the_processors() -> None:
    dots = FoursOfBytes(512, registers=32, matrices=True)
    text = assembly(dots, "sapphirerapids")
    for tall, wide in ((2, 2), (2, 1), (1, 2), (1, 1)):
        body = function(text, f"piece_{tall}_{wide}")
        assert len(re.findall("tdpbsud", body)) == tall * wide
        assert len(re.findall("tileloadd", body)) == tall + wide + tall * wide  # And of sums.
    body = function(text, "run")
    assert re.findall("ldtilecfg|tilerelease", body) == ["ldtilecfg", "tilerelease"]


@pytest.mark.parametrize(
    ("features", "dots"),
    [
        ("avx2", PairsOfWords(256)),
        ("avx2 avx512bw avx512vl", PairsOfWords(512)),
        ("avx2 avx512bw avx512vl avx512vnni", FoursOfBytes(512, registers=32)),
        (
            "avx2 avx512bw avx512vl avx512vnni amx-tile amx-int8",
            FoursOfBytes(512, registers=32, matrices=True),
        ),
        ("avx2 avxvnni", FoursOfBytes(256, registers=16)),
        ("sse4.2", None),
    ],
)
def test_the_way_of_a_processor(features: str, dots: Dots | None) -> None:
    assert best_of(dict.fromkeys(features.split(), True)) == dots


@pytest.fixture
def unchecked() -> Iterator[None]:
    remembered = compiler.check, compiler.dots_here, threads.library
    for cached in remembered:
        cached.cache_clear()
    yield
    for cached in remembered:
        cached.cache_clear()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("permitted", [True, False])
def test_matrices_only_with_the_permission_of_the_system(
    permitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "avx2 avx512bw avx512vl avx512vnni amx-tile amx-int8"
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(names.split(), True))
    monkeypatch.setattr(amx, "permitted", lambda: permitted)
    assert compiler.dots_here() == FoursOfBytes(512, registers=32, matrices=permitted)


def test_other_systems_are_not_asked_for_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("Windows has no such library"))
    assert not amx.permitted.__wrapped__()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (llvm, "llvm_version_info", (20, 1, 0), "llvmlite has LLVM 20; 22 or newer is needed"),
        (llvm, "get_host_cpu_features", dict, "the processor has no AVX2"),
        (threads, "_loaded", list, "torch has no OpenMP library whose threads could be used"),
    ],
)
def test_what_is_missing_is_said(
    owner: object, name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(RuntimeError, match=message):
        random_weight(1, 1)


def test_without_llvmlite_another_backend_takes_over(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["llvmlite"] = None
import haq, torch
from haq.nn import Int8Linear
layer = Int8Linear.from_float(torch.eye(2))
print(layer.backend, haq.backends()[0].reason)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    name, _, reason = ran.stdout.strip().partition(" ")
    assert name != "llvm"
    assert reason == 'not available here: llvmlite is not installed: pip install "haq[cpu]"'


# --- A layer in 16 bits ---------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "biased"), [(1, 1, True), (33, 50, False), (7, 129, True), (301, 2113, True)]
)
def test_a_layer_in_16_bits(
    rows: int, width: int, biased: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((1, width), (rows, width), (rows,))
    )
    exact = x.double() @ weight.double().T + biased * bias.double()
    result = halves.linear(x, weight, bias if biased else None)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps / 2  # Rounded to nearest; then float32's sums.
    torch.testing.assert_close(result.double(), exact, rtol=unit, atol=1e-6 * width**0.5)


@pytest.mark.usefixtures("way")
def test_nan_and_infinity_in_a_layer_in_16_bits() -> None:
    weight = torch.ones(4, 40).bfloat16()
    weight[1, 39], weight[2, 3] = torch.nan, torch.inf
    result = halves.linear(torch.ones(40).bfloat16(), weight, None)
    assert result[[0, 2, 3]].tolist() == [40, torch.inf, 40]
    assert result.isnan().tolist() == [False, True, False, False]

"""Triton's kernels without a GPU: their arithmetic, and what a GPU would be given to run.

Triton decides when it is imported whether it interprets or compiles. So the tests of the arithmetic
are in files and a process of their own; this process compiles, which needs no GPU either.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

INTERPRETED_TESTS = sorted(Path(__file__).parents[1].rglob("interpreted_*.py"))

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: `make kernels` has it"
)


@needs_triton
def test_the_arithmetic_under_the_interpreter() -> None:
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*arguments, *map(str, INTERPRETED_TESTS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert re.search(r"\d\d passed", done.stdout), done.stdout


def test_the_kernels_are_imported_only_for_a_gpu() -> None:
    """Torch and transformers may import Triton, where it is installed; the library does not."""
    program = "import sys, haq; haq.backends(); sys.exit('haq.int8.kernels' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_without_triton_the_backend_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from haq.int8 import cuda, matmul

    for name in [name for name in sys.modules if name.startswith("haq.int8.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("haq.int8.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    verdict = matmul._prove(matmul.Backend("triton", "cpu", cuda.TritonWeight), torch.device("cpu"))
    assert (verdict.available, verdict.exact) == (False, False)
    assert verdict.reason.startswith("not available here: import of triton")


# --- What a GPU would run -------------------------------------------------------------------------

TYPES = {
    "results": "*bf16",
    "inputs": "*bf16",
    "pieces": "*i32",
    "tiles": "*i32",
    "places": "*i32",
    "order": "*i32",
    "index": "*i64",
    "chosen_experts": "*i64",
    "gates": "*bf16",
    "eps": "fp32",
    "tokens": "*bf16",
    "integers": "*i8",
    "weights": "*i8",
    "scales": "*fp32",
    "weight_scales": "*fp32",
    "token_scales": "*fp32",
    "shifts": "*fp32",
    "row_sums": "*fp32",
    "biases": "*fp32",
}

# Cards by their compute capability, and the bytes that a program may share there.
AMPERE, HOPPER = 80, 90
HOPPERS_SHARED_MEMORY = 232_448

# What every card has that multiplies int8 with tensor cores.
SMALLEST_SHARED_MEMORY = 65_536


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    pytest.importorskip("triton", reason="needs Triton: `make kernels` has it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles, and TRITON_INTERPRET=1 asks for the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from haq.int8 import kernels

    return kernels


def compiled(
    kernel: Any, capability: int, options: dict[str, Any], absent: set[str], **types: str
) -> Any:
    """A kernel for a GPU that need not be here, with aligned tensors and sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch: dict[str, Any] = {"enable_fp_fusion": False}
    launch |= {name: value for name, value in options.items() if name.startswith("num_")}
    constants: dict[str, Any] = dict.fromkeys(absent)
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else (TYPES | types).get(name, "i32")
        for name in kernel.arg_names
    }
    places: dict[str, tuple[int]] = {n: (i,) for i, n in enumerate(kernel.arg_names)}
    other = {*constants, "num_tokens", "num_tiles"}
    aligned = [place for n, place in places.items() if n not in other and signature[n] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=launch)


def assert_arithmetic(ptx: str) -> None:
    """No operation that rounds otherwise than numpy's float32.

    A product of two numbers of bfloat16, rounded to it, may be one operation with a zero added.
    """
    assert not re.search(r"fma\.rn\S*\.f32", ptx)
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert ".ftz" not in ptx


def test_every_plan_compiles(kernels: ModuleType) -> None:
    for plan in {plan for plans in kernels.linear._PLANS.values() for plan in plans}:
        options = kernels.plans.options(plan, columns=4096)
        absent = {"shifts", "row_sums"} | (set() if plan.split > 1 else {"pieces"})
        binary = compiled(kernels.linear._linear_kernel, HOPPER, options, absent)
        ptx = binary.asm["ptx"]
        assert re.search(r"mma\S*\.s32\.s8\.s8", ptx), "no tensor cores"
        assert "cp.async.c" in ptx, "no reads ahead"
        assert binary.metadata.shared <= HOPPERS_SHARED_MEMORY
        assert ("cvt.rn.bf16" in ptx) == (plan.split == 1)
        assert_arithmetic(ptx)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_first_plans_compile_with_everything_and_fit_any_card(
    kernels: ModuleType, capability: int
) -> None:
    products = [
        (kernels.linear._linear_kernel, plans[0], {"pieces"})
        for plans in kernels.linear._PLANS.values()
    ]
    of_experts: list[tuple[Any, Any, set[str]]] = [
        (kernels.grouped._grouped_kernel, plans[0], absent)
        for plans in kernels.grouped._PLANS.values()
        for absent in ({"index"}, {"places", "gates"})
    ]
    for kernel, plan, absent in products + of_experts:
        options = {**kernels.plans.options(plan, columns=4096), "PER_TOKEN": 2}
        binary = compiled(kernel, capability, options, absent)
        ptx = binary.asm["ptx"]
        assert re.search(r"mma\S*\.s32\.s8\.s8", ptx), "no tensor cores"
        assert "cvt.rn.bf16" in ptx
        assert binary.metadata.shared <= SMALLEST_SHARED_MEMORY
        assert_arithmetic(ptx)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
def test_rounding_compiles(kernels: ModuleType, capability: int, asymmetric: bool) -> None:
    absent = set() if asymmetric else {"shifts"}
    options = {"BLOCK": 4096, "num_warps": 8}
    ptx = compiled(kernels.tokens._quantize_kernel, capability, options, absent).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert_arithmetic(ptx)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_every_plan_for_experts_compiles(kernels: ModuleType, capability: int) -> None:
    for plan in {plan for plans in kernels.grouped._PLANS.values() for plan in plans}:
        options = {**kernels.plans.options(plan, columns=4096), "PER_TOKEN": 2}
        absent = {"index", "shifts", "row_sums", "biases", "gates"}
        kernel = kernels.grouped._grouped_kernel
        binary = compiled(kernel, capability, options, absent, results="*fp32")
        assert re.search(r"mma\S*\.s32\.s8\.s8", binary.asm["ptx"]), "no tensor cores"
        assert "cp.async.c" in binary.asm["ptx"], "no reads ahead"
        assert binary.metadata.shared <= HOPPERS_SHARED_MEMORY
        assert_arithmetic(binary.asm["ptx"])


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("rounding", ["none", "symmetric", "zero point"])
@pytest.mark.parametrize(
    "formula", [(False, 0, True), (False, 1, False), (True, 0, False)], ids=["llama", "gemma", "ln"]
)
def test_norms_compile(
    kernels: ModuleType, formula: tuple[bool, int, bool], rounding: str, capability: int
) -> None:
    absent: dict[str, set[str]] = {
        "none": {"integers", "scales", "shifts"},
        "symmetric": {"shifts"},
        "zero point": set(),
    }
    options: dict[str, Any] = {**kernels.tokens.blocks_of(4096)}
    options |= dict(zip(("CENTERED", "OFFSET", "CAST_FIRST"), formula, strict=True))
    without_bias = set() if formula[0] else {"biases"}
    binary = compiled(
        kernels.norms._norm_kernel,
        capability,
        options,
        absent[rounding] | without_bias,
        weights="*bf16",
        biases="*bf16",
    )
    ptx = binary.asm["ptx"]
    assert "sqrt.rn.f32" in ptx
    assert "rsqrt" not in ptx
    assert "div.rn.f32" in ptx
    assert_arithmetic(ptx)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("experts", [8, 128, 256])
def test_sorting_compiles(kernels: ModuleType, experts: int, capability: int) -> None:
    options = {"HEIGHT": 16, "EXPERTS": experts, "BLOCK": max(16, min(1024, 8192 // experts))}
    binary = compiled(kernels.tiles._sort_kernel, capability, options, set())
    assert binary.metadata.shared <= SMALLEST_SHARED_MEMORY


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_sums_of_experts_compile(kernels: ModuleType, slots: int, capability: int) -> None:
    options = {"PER_TOKEN": slots, "BLOCK": kernels.combine._COLUMNS_AT_ONCE}
    kernel = kernels.combine._add_experts_kernel
    ptx = compiled(kernel, capability, options, set(), rows="*fp32").asm["ptx"]
    assert "cvt.rn.bf16" in ptx
    assert_arithmetic(ptx)


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_adding_pieces_compiles(kernels: ModuleType, capability: int) -> None:
    options = {"SPLIT": 4, "BLOCK_N": kernels.linear._OUTS_AT_ONCE}
    ptx = compiled(kernels.linear._add_kernel, capability, options, set()).asm["ptx"]
    assert "cvt.rn.bf16" in ptx
    assert_arithmetic(ptx)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 53, 37), (16, 4096, 512), (300, 1024, 520)], ids=str)
def test_a_gpu_has_the_bits_of_the_cpu(
    kernels: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from haq.int8 import matmul

    count, columns, outs = shape
    weight = torch.randint(-128, 128, (outs, columns), dtype=torch.int8)
    scale, bias, x = torch.rand(outs, 1), torch.randn(outs), torch.randn(count, columns).to(dtype)
    with matmul.use_backend("reference"):
        expected = matmul.linear(x, matmul.pack(weight, scale), bias)
    tokens = kernels.quantize_tokens(x.cuda())
    for plans in kernels.linear._PLANS.values():
        for plan in plans[:1] + plans[-1:]:
            result = kernels.int8_linear(
                tokens, weight.cuda(), scale.cuda(), bias=bias.cuda(), dtype=dtype, plan=plan
            )
            torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0)

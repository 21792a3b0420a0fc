"""Fused norms as modules: what is recognized, and that nothing but the kernel is another one."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from haq import QuantizationConfig, quantize_model
from haq.int8 import matmul
from haq.int8.norm import Norm
from haq.nn import fuse_norms, norms, unfuse_norms
from haq.nn.formulas import recognized
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids
from tests.nn.copies import COPIES


class Own(nn.Module):
    """A norm with a formula of its own: of the rows, their mean and variance, weight and bias."""

    formula: Callable[..., Tensor]

    def __init__(self, size: int = 16, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        mean, variance = rows.mean(-1, keepdim=True), rows.var(-1, keepdim=True, unbiased=False)
        return self.formula(rows, mean, variance, x.dtype)


class OnePlusWeight(Own):
    def formula(self, x: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        return ((x - mean) * (variance + self.eps).rsqrt() * (1 + self.weight.float())).to(dtype)


class Halved(Own):
    def formula(self, x: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        return ((x - mean) * (variance + self.eps).rsqrt() * self.weight / 2).to(dtype)


class EpsOutside(Own):
    def formula(self, x: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        return ((x - mean) / (variance.sqrt() + self.eps) * self.weight).to(dtype)


class RoundedWeight(Own):
    """One plus the weight is rounded to the dtype."""

    def formula(self, x: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        weight = (1 + self.weight.to(dtype)).float()
        return ((x - mean) * (variance + self.eps).rsqrt() * weight).to(dtype)


class InFloat32(Own):
    def formula(self, x: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight.float()


class RoundedInFloat32(Own):
    def formula(self, x: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        normed = (x - mean) * (variance + self.eps).rsqrt() * self.weight.float()
        return normed.to(dtype).float()


class Scale(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Gated(Own):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return functional.rms_norm(x * gate, x.shape[-1:], self.weight, self.eps)


def with_hook() -> nn.Module:
    module = nn.LayerNorm(16)
    module.register_forward_hook(lambda *_: None)
    return module


def with_forward() -> nn.Module:
    module = nn.LayerNorm(16)
    module.forward = partial(nn.LayerNorm.forward, module)  # type: ignore[method-assign]
    return module


KNOWN: dict[str, tuple[nn.Module, Norm]] = {
    "layer": (nn.LayerNorm(16, eps=1e-3), Norm(1e-3, True, 0, False)),
    "layer without bias": (nn.LayerNorm(16, bias=False), Norm(1e-5, True, 0, False)),
    "torch's rms": (nn.RMSNorm(16, eps=1e-6), Norm(1e-6, False, 0, False)),
    "llama": (LlamaRMSNorm(16, eps=1e-6), Norm(1e-6, False, 0, True)),
    "gemma": (GemmaRMSNorm(16, eps=1e-5), Norm(1e-5, False, 1, False)),
    "gpt-oss": (GptOssRMSNorm(16, eps=1e-7), Norm(1e-7, False, 0, False)),
    "one plus weight": (OnePlusWeight(), Norm(1e-5, True, 1, False)),
    "one column": (nn.LayerNorm(1), Norm(1e-5, True, 0, False)),
}

UNKNOWN: dict[str, nn.Module] = {
    "half": Halved(),
    "eps outside": EpsOutside(),
    "rounded weight": RoundedWeight(),
    "float32": InFloat32(),
    "rounded, in float32": RoundedInFloat32(),
    "scale": Scale(),
    "gated": Gated(),
    "linear": nn.Linear(16, 16),
    "batch": nn.BatchNorm1d(16),
    "no weight": nn.LayerNorm(16, elementwise_affine=False),
    "two dimensions": nn.LayerNorm((4, 4)),
    "prelu": nn.PReLU(16),
    "container": nn.Sequential(nn.LayerNorm(16)),
    "hook": with_hook(),
    "forward": with_forward(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_a_norm(name: str, dtype: torch.dtype) -> None:
    module, expected = KNOWN[name]
    module = copy.deepcopy(module).to(dtype)
    assert recognized(module) == expected
    assert recognized(module.to("meta")) == expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_none(name: str) -> None:
    assert recognized(UNKNOWN[name]) is None


def test_numbers_of_a_module_are_left_alone() -> None:
    module = LlamaRMSNorm(16)
    module.weight.data.normal_()
    before, state = module.weight.clone(), torch.random.get_rng_state()
    recognized(module)
    assert torch.equal(module.weight, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ARCHITECTURES | MIXTURES)
def test_norms_of_every_family(name: str) -> None:
    """All of them, and nothing else; the model computes the same bits in float32 on a CPU."""
    model = (ARCHITECTURES | MIXTURES)[name]()
    named = [n for n, m in model.named_modules() if "Norm" in type(m).__name__]
    named = [n for n in named if not n.endswith("mixer.norm")]  # nemotron-h: gated, in groups.
    ids = token_ids(2, 5)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert fuse_norms(model) == len(named) > 0
        assert [n for n, m in model.named_modules() if hasattr(m, "haq_original")] == named
        assert torch.equal(model(ids, use_cache=False).logits, expected)


# --- Nothing else changes -------------------------------------------------------------------------


@pytest.fixture
def fused() -> nn.Sequential:
    model = nn.Sequential(LlamaRMSNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    for parameter in model.parameters():
        parameter.data.normal_()
    assert fuse_norms(model) == 2
    return model


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, norms._FusedNorm)


def test_names_and_classes_are_as_before(fused: nn.Sequential) -> None:
    plain = nn.Sequential(LlamaRMSNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    assert repr(fused) == repr(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [type(m).__qualname__ for m in fused] == [type(m).__qualname__ for m in plain]
    assert isinstance(fused[0], LlamaRMSNorm)
    assert isinstance(fused[2], nn.LayerNorm)
    assert fused[0].weight is next(fused.parameters())


def test_fusing_twice_is_fusing_once(fused: nn.Sequential) -> None:
    before = type(fused[0])
    assert fuse_norms(fused) == 2
    assert type(fused[0]) is before


def test_undone(fused: nn.Sequential) -> None:
    x = torch.randn(3, 16)
    expected = fused(x)
    unfuse_norms(fused)
    assert type(fused[0]) is LlamaRMSNorm
    assert type(fused[2]) is nn.LayerNorm
    assert vars(fused[0]).keys() == vars(LlamaRMSNorm(16)).keys()
    assert torch.equal(fused(x), expected)
    unfuse_norms(fused)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_fused_and_their_own(
    fused: nn.Sequential, duplicate: Callable[[nn.Module], nn.Sequential]
) -> None:
    twin = duplicate(fused)
    assert [is_fused(m) for m in twin] == [True, False, True]
    x = torch.randn(3, 16)
    expected = fused(x)
    assert torch.equal(twin(x), expected)
    twin[0].weight.data.zero_()
    vars(twin[0])["_haq_norm"].asked.add(True)
    assert torch.equal(fused(x), expected)
    assert vars(fused[0])["_haq_norm"].asked == set()


def test_a_shallow_copy_shares_its_parameters(fused: nn.Sequential) -> None:
    twin = copy.copy(fused[0])
    assert is_fused(twin)
    assert twin.weight is fused[0].weight


def test_state_goes_into_a_plain_model_and_back(fused: nn.Sequential) -> None:
    plain = nn.Sequential(LlamaRMSNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    plain.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(3, 16)
    assert torch.equal(plain(x), fused(x))
    fused.load_state_dict({n: 2 * v for n, v in plain.state_dict().items()}, assign=True)
    assert not torch.equal(plain(x), fused(x))


def test_gradients_flow(fused: nn.Sequential) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    fused(x).sum().backward()
    assert x.grad is not None
    assert fused[0].weight.grad is not None


def test_the_compiler_sees_the_module_as_it_was(fused: nn.Sequential) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 16)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), fused(x))


def small_model() -> PreTrainedModel:
    config = QuantizationConfig(smoothing="none", rounding="nearest", search_tokens=64)
    return quantize_model(ARCHITECTURES["llama"](), [token_ids(2, 32)], config, progress=False)


@pytest.mark.parametrize("there", [False, True])
def test_norms_are_fused_where_kernels_run(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "may_run", lambda dtype: there)
    assert sum(map(is_fused, small_model().modules())) == (5 if there else 0)


# --- On a CPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torch's rms", "llama", "gemma", "gpt-oss"])
def test_a_kernel_of_a_cpu_is_as_near_to_float64(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run = norms._run_on_cpu
    monkeypatch.setattr(norms, "_run_on_cpu", lambda *args: calls.append(1) or run(*args))
    module = type(KNOWN[name][0])(83, eps=1e-3)
    module.weight.data.normal_()
    x = 3 * torch.randn(5, 3, 83, dtype=dtype).transpose(0, 1)
    x[0, 0] = 0
    fused = copy.deepcopy(module).to(dtype)
    assert fuse_norms(nn.Sequential(fused)) == 1
    with torch.no_grad():
        exact = module.to(dtype).double()(x.double())
        result = fused(x)
    assert calls == [1]
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), exact.double(), rtol=2 * eps, atol=eps / 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which all are fused")
def test_without_a_gpu_norms_of_float32_are_as_they_were() -> None:
    assert not any(map(is_fused, small_model().modules()))
    assert norms.may_run(torch.bfloat16) == matmul.compiles()


@pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")
def test_a_cpu_computes_what_torch_does_in_one_operation_by_torch(fused: nn.Sequential) -> None:
    plain = nn.LayerNorm(16)
    plain.load_state_dict(fused[2].state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 16, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(fused[2].to(dtype)(x), plain.to(dtype)(x))

"""Fused norms by their kernel, under Triton's interpreter: see `tests/int8/test_kernels.py`."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from haq.int8 import cuda, matmul
from haq.nn import Int8Linear, fuse_norms, norms, unfuse_norms
from tests.interpreter import Launches, triton_on_cpu
from tests.nn.test_norms import is_fused

SIZE = 48
NORMS = [LlamaRMSNorm, GemmaRMSNorm, nn.LayerNorm]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_on_cpu(monkeypatch), torch.no_grad():
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


class Attention(nn.Module):
    """A norm, and three int8 layers that read it."""

    def __init__(self, kind: type[nn.Module] = LlamaRMSNorm, *asymmetric: bool) -> None:
        super().__init__()
        self.norm = kind(SIZE)
        for parameter in self.norm.parameters():
            parameter.data.normal_()
        self.readers = nn.ModuleList(
            Int8Linear.from_float(torch.randn(SIZE, SIZE), asymmetric=shifted)
            for shifted in asymmetric or (False, False, False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.stack([reader(y) for reader in self.readers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_a_fused_norm_gives_what_the_norm_gave(
    kind: type[nn.Module], dtype: torch.dtype, launches: Launches
) -> None:
    module = nn.Sequential(kind(SIZE))
    for parameter in module.parameters():
        parameter.data.normal_()
    module.to(dtype)
    x = torch.randn(3, 7, SIZE).to(dtype)
    expected = module(x)
    fuse_norms(module)
    result = module(x)
    assert launches.names == ["norm"]
    assert result.dtype == dtype
    # One unit of the dtype's last place, where float32 lies near a tie; a few of float32's.
    unit = 2.0**-20 if dtype == torch.float32 else 2.0**-10
    torch.testing.assert_close(result, expected, rtol=unit, atol=unit)
    assert dtype == torch.float32 or (result == expected).float().mean() > 0.98


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("kind", NORMS)
def test_readers_take_what_the_norm_left(
    kind: type[nn.Module], asymmetric: bool, launches: Launches
) -> None:
    model = Attention(kind, *[asymmetric] * 3)
    fuse_norms(model)
    x = torch.randn(2, 3, SIZE)
    first = model(x)
    assert launches.counts() == {"norm": 1, "quantize": 1, "linear": 3}
    for _ in range(3):
        launches.seen.clear()
        assert torch.equal(model(x), first)
        assert launches.counts() == {"norm": 1, "linear": 3}
    # The bits of layers that round for themselves.
    y = model.norm(x)
    alone = torch.stack([reader(y.clone()) for reader in model.readers])
    assert torch.equal(first, alone)


def test_readers_of_both_kinds(launches: Launches) -> None:
    model = Attention(LlamaRMSNorm, False, True, False)
    fuse_norms(model)
    x = torch.randn(3, SIZE)
    first = model(x)
    launches.seen.clear()
    assert torch.equal(model(x), first)
    assert launches.counts() == {"norm": 1, "linear": 3, "quantize": 1}


def test_for_whom_nobody_rounds_nothing_is_rounded_and_nothing_left(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(LlamaRMSNorm(SIZE), nn.Linear(SIZE, SIZE))
    fuse_norms(model)
    left: list[object] = []
    leave = cuda.leave_tokens
    monkeypatch.setattr(
        cuda,
        "leave_tokens",
        lambda x, tokens, asked: (left.append(tokens), leave(x, tokens, asked)),
    )
    for _ in range(5):
        model(torch.randn(3, SIZE))
    assert launches.counts() == {"norm": 5}
    assert left == [None] * norms._TRIALS


def test_a_norm_between_readers_does_not_hide_what_they_share(launches: Launches) -> None:
    """As q_norm stands between q and k: nobody reads its result in int8."""
    model = Attention()
    between = LlamaRMSNorm(SIZE)
    both = nn.ModuleList([model, between])
    fuse_norms(both)
    x = torch.randn(3, SIZE)
    for _ in range(norms._TRIALS + 1):
        launches.seen.clear()
        y = model.norm(x)
        for reader in model.readers:
            between(reader(y))
    assert launches.counts() == {"norm": 4, "linear": 3}


def test_inference_mode_leaves_nothing(launches: Launches) -> None:
    """What is left for a tensor could not be told from what was left for it before."""
    model = Attention()
    fuse_norms(model)
    x = torch.randn(3, SIZE)
    model(x)
    expected = model(x)
    launches.seen.clear()
    with torch.inference_mode():
        result = model(x).clone()
        on_cpu = launches.counts()
    assert torch.equal(result, expected)
    # On a CPU, where a copy can be compared, readers share what the first of them makes.
    assert on_cpu == {"norm": 1, "quantize": 1, "linear": 3}


def test_what_is_written_to_the_result_is_read(launches: Launches) -> None:
    model = Attention()
    fuse_norms(model)
    x = torch.randn(3, SIZE)
    model(x)
    y = model.norm(x)
    y += 1
    result = model.readers[0](y)
    assert torch.equal(result, model.readers[0](y.clone()))


# --- Where it does what it did --------------------------------------------------------------------


@pytest.fixture
def module() -> nn.Module:
    module = nn.Sequential(nn.LayerNorm(SIZE))
    fuse_norms(module)
    return module


def test_gradients(module: nn.Module, launches: Launches) -> None:
    with torch.enable_grad():
        x = torch.randn(3, SIZE)
        assert module(x).requires_grad
        module.requires_grad_(False)
        assert module(x.requires_grad_()).requires_grad
        assert launches.names == []
        assert not module(x.detach()).requires_grad
    assert launches.names == ["norm"]


def test_autocast(module: nn.Module, launches: Launches) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(3, SIZE))
    assert launches.names == []


@pytest.mark.parametrize(("dtype", "weights"), [("float64", "float64"), ("float16", "float32")])
def test_another_dtype(module: nn.Module, launches: Launches, dtype: str, weights: str) -> None:
    module.to(getattr(torch, weights))
    module(torch.randn(3, SIZE).to(getattr(torch, dtype)))
    assert launches.names == []


def test_another_shape(module: nn.Module, launches: Launches) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        module(torch.randn(3, SIZE + 1))
    assert launches.names == []


def test_arguments_that_the_norm_does_not_take(module: nn.Module, launches: Launches) -> None:
    with pytest.raises(TypeError):
        module[0](torch.randn(3, SIZE), torch.randn(3, SIZE))
    assert launches.names == []


def test_keywords(module: nn.Module, launches: Launches) -> None:
    x = torch.randn(3, SIZE)
    result = module[0](input=x)
    assert launches.names == []
    torch.testing.assert_close(result, module(x))


def test_the_compiler(module: nn.Module, launches: Launches) -> None:
    torch._dynamo.reset()
    torch.compile(module, backend="eager", fullgraph=True)(torch.randn(3, SIZE))
    assert launches.names == []


def test_other_backends(module: nn.Module, launches: Launches) -> None:
    norms._kernels.cache_clear()
    with matmul.use_backend("reference"):
        module(torch.randn(3, SIZE))
    assert launches.names == []


def test_another_device(
    module: nn.Module, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_DEVICE_TYPES", ("cuda",))
    module(torch.randn(3, SIZE))
    assert launches.names == []


def test_undone(module: nn.Module, launches: Launches) -> None:
    twin = copy.deepcopy(module)
    unfuse_norms(module)
    module(torch.randn(3, SIZE))
    assert launches.names == []
    assert is_fused(twin[0])
    twin(torch.randn(3, SIZE))
    assert launches.names == ["norm"]

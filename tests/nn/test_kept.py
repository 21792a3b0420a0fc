"""Layers that stay in bfloat16: by a kernel for one token, and as they were for all else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from haq import QuantizationConfig, quantize_model
from haq.int8 import matmul
from haq.nn import kept
from haq.nn.kept import use_fast_linears
from haq.nn.swapped import Swapped
from tests.architectures import ARCHITECTURES, token_ids
from tests.nn.copies import COPIES

OUT, IN = 50, 83

needs_llvm = pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the kernel is given."""
    given: list[Tensor] = []
    run = kept._run
    monkeypatch.setattr(kept, "_run", lambda x, *rest: given.append(x) or run(x, *rest))
    return given


def layer(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)


def fast(bias: bool = True) -> nn.Linear:
    module = layer(bias)
    assert use_fast_linears(module) == 1
    return module


def token(*shape: int) -> Tensor:
    return torch.randn(*shape or (IN,), generator=torch.Generator().manual_seed(1)).bfloat16()


@needs_llvm
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 1, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_token_is_as_near_to_float64(
    bias: bool, shape: tuple[int, ...], calls: list[Tensor]
) -> None:
    x = token(*shape)
    exact = layer(bias).double()(x.double())
    result = fast(bias)(x)
    assert len(calls) == 1
    assert (result.dtype, result.shape) == (torch.bfloat16, (*shape[:-1], OUT))
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=1e-6)
    assert (result == exact.bfloat16()).float().mean() > 0.95


@needs_llvm
def test_the_last_of_many_tokens_is_one(calls: list[Tensor]) -> None:
    """As `generate` asks for it: a part of a tensor, at no address that a row begins at."""
    x = token(1, 7, 2 * IN)[:, -1:, 3 : IN + 3]
    exact = layer().double()(x.double())
    torch.testing.assert_close(fast()(x).double(), exact, rtol=2**-8, atol=1e-6)
    assert len(calls) == 1


def test_the_argument_has_its_name() -> None:
    assert torch.equal(fast()(input=token()), fast()(token()))


@needs_llvm
def test_a_weight_in_another_order(calls: list[Tensor]) -> None:
    module, x = fast(), token()
    expected = module(x)
    module.weight.data = module.weight.data.T.contiguous().T
    assert not module.weight.is_contiguous()
    assert torch.equal(module(x), expected)
    assert len(calls) == 2


@needs_llvm
def test_what_is_written_to_the_weight_is_read() -> None:
    module, x = fast(bias=False), token()
    before = module(x)
    module.weight.mul_(2)
    assert torch.equal(module(x), 2 * before)
    module.weight[3] = torch.nan
    result = module(x)
    assert result.isnan().nonzero().tolist() == [[3]]


# --- As it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    module = layer(dtype=dtype)
    assert use_fast_linears(module) == 0
    assert type(module) is nn.Linear


def test_layers_of_other_classes_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    module = nn.Sequential(Own(IN, OUT, dtype=torch.bfloat16), nn.Bilinear(2, 2, 2))
    assert use_fast_linears(module) == 0
    assert type(module[0]) is Own


@pytest.mark.parametrize("shape", [(2, IN), (1, 3, IN), (0, IN)])
def test_other_numbers_of_tokens(shape: tuple[int, ...], calls: list[Tensor]) -> None:
    x = token(*shape)
    assert torch.equal(fast()(x), layer()(x))
    assert not calls


def test_another_width_is_refused_as_before(calls: list[Tensor]) -> None:
    with pytest.raises(RuntimeError) as before:
        layer()(token(1, IN + 1))
    with pytest.raises(RuntimeError) as after:
        fast()(token(1, IN + 1))
    assert str(after.value) == str(before.value)
    with pytest.raises(RuntimeError):  # As many numbers, but no token.
        fast()(token(IN, 1))
    assert not calls


def test_another_dtype_is_computed_as_before(calls: list[Tensor]) -> None:
    module = fast().float()
    assert torch.equal(module(token().float()), layer().float()(token().float()))
    with pytest.raises(RuntimeError):
        module(token())
    assert not calls


def test_autocast(calls: list[Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast()(token()), layer()(token()))
    assert not calls


def test_gradients_flow(calls: list[Tensor]) -> None:
    module, x = fast().requires_grad_(), token().requires_grad_()
    module(x).float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.weight.sum(0), rtol=2**-7, atol=2**-7)
    assert module.bias.grad is not None
    assert module.bias.grad.eq(1).all()
    assert not calls
    with torch.no_grad():
        module(x)
    assert len(calls) == matmul.compiles()


def test_the_compiler_sees_the_layer_as_it_was(calls: list[Tensor]) -> None:
    """But for one token, for which it is shown an operator: see `tests.nn.test_compiled`."""
    torch._dynamo.reset()
    compiled = torch.compile(fast(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(token(2, IN)), layer()(token(2, IN)))
    assert not calls


def test_where_another_backend_was_asked_for(calls: list[Tensor]) -> None:
    with matmul.use_backend("reference"):
        assert torch.equal(fast()(token()), layer()(token()))
    assert not calls


def test_names_and_classes_are_as_before() -> None:
    module, plain = fast(), layer()
    assert repr(module) == repr(plain)
    assert type(module).__qualname__ == "Linear"
    assert isinstance(module, nn.Linear)
    assert list(module.state_dict()) == ["weight", "bias"]
    again = type(module)
    assert use_fast_linears(module) == 1
    assert type(module) is again


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_fast_and_their_own(duplicate: Callable[[nn.Module], nn.Linear]) -> None:
    module, x = fast(), token()
    expected = module(x)
    twin = duplicate(module)
    assert isinstance(twin, Swapped)
    assert torch.equal(twin(x), expected)
    twin.weight.zero_()
    assert torch.equal(module(x), expected)


def test_the_head_of_a_quantized_model() -> None:
    config = QuantizationConfig(smoothing="none", rounding="nearest", search_tokens=64)
    for dtype in (torch.bfloat16, torch.float32):
        model = ARCHITECTURES["llama"]().to(dtype)
        quantize_model(model, [token_ids(2, 32)], config, progress=False)
        assert isinstance(model.lm_head, Swapped) == (dtype == torch.bfloat16)

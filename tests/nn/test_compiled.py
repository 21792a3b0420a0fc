"""Attention and kept linears in compiled code: one operator each, and the bits of eager mode."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from haq.int8 import matmul
from haq.nn.attention import attend, attend_to_prompt
from haq.nn.kept import use_fast_linears

needs_a_compiler = pytest.mark.skipif(
    not matmul.compiles(), reason="the kernels of haq[cpu] do not run here"
)


def operators_of(function: Callable[..., object], *given: object) -> list[str]:
    """What `function` is in a graph of the compiler: the names of haq's operators in it."""
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        seen.extend(call for call in calls if call.startswith("haq."))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True, dynamic=False)(*given)
    return seen


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    result: Callable[..., Tensor] = torch.compile(function, backend=backend, fullgraph=True)
    return result


def qkv(queries: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Two sequences of 20 tokens, 6 heads, 2 groups of keys."""
    generator = torch.Generator().manual_seed(queries)
    shapes = (2, 6, queries, 16), (2, 2, 20, 16), (2, 2, 20, 8)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# --- Attention ------------------------------------------------------------------------------------


@needs_a_compiler
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_token(backend: str, masked: bool) -> None:
    mask = torch.rand(2, 1, 1, 20, generator=torch.Generator().manual_seed(1)) > 0.3
    given = (*qkv(1), mask if masked else None, 0.3)
    assert torch.equal(compiled(attend, backend)(*given), attend(*given))
    assert operators_of(attend, *given) == ["haq.attend"]


@needs_a_compiler
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_prompt(backend: str, causal: bool) -> None:
    given = (*qkv(20), causal, None)
    result, expected = compiled(attend_to_prompt, backend)(*given), attend_to_prompt(*given)
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()
    assert operators_of(attend_to_prompt, *given) == ["haq.attend_to_prompt"]


@needs_a_compiler
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.mT.contiguous().mT])
def test_the_operators_obey_torch(layout: Callable[[Tensor], Tensor]) -> None:
    one, many = ([layout(part) for part in qkv(count)] for count in (1, 20))
    mask = torch.rand(2, 1, 1, 20) > 0.3
    torch.library.opcheck(torch.ops.haq.attend.default, (*one, mask, None))
    torch.library.opcheck(torch.ops.haq.attend_to_prompt.default, (*many, True, 0.3))


def test_gradients_are_not_lost() -> None:
    query, key, value = (part.float().requires_grad_() for part in qkv(1))
    given = query, key, value, None, None
    assert operators_of(attend, *given) == []
    torch._dynamo.reset()
    torch.compile(attend, backend="aot_eager", fullgraph=True)(*given).sum().backward()
    # A sum over a softmax: of the values' gradient each head gives one to all.
    torch.testing.assert_close(value.grad.sum(), torch.tensor(2.0 * 6 * 8))


def test_without_kernels_the_compiler_sees_what_torch_does() -> None:
    with matmul.use_backend("reference"):
        given = (*qkv(1), None, None)
        assert operators_of(attend, *given) == []
        expected = attend(*given)
        torch.testing.assert_close(compiled(attend, "aot_eager")(*given), expected)
        assert attend_to_prompt(*qkv(20), True, None) is None


# --- Linears that stay in bfloat16 ----------------------------------------------------------------


def kept(bias: bool = True) -> nn.Module:
    layer = nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    assert use_fast_linears(model) == 1
    return model


@needs_a_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_kept_linear_and_one_token(backend: str, bias: bool) -> None:
    model, x = kept(bias), torch.randn(1, 1, 24).bfloat16()
    assert torch.equal(compiled(model, backend)(x), model(x))
    assert operators_of(model, x) == ["haq.kept_linear"]


@pytest.mark.parametrize(
    "x", [torch.randn(1, 2, 24).bfloat16(), torch.randn(2, 24).bfloat16()], ids=["two", "batch"]
)
def test_more_tokens_are_torchs(x: Tensor) -> None:
    assert operators_of(kept(), x) == []


def test_what_is_trained_is_torchs() -> None:
    model, x = kept().requires_grad_(), torch.randn(1, 24).bfloat16()
    assert operators_of(model, x) == []
    with torch.no_grad():
        expected = ["haq.kept_linear"] if matmul.compiles() else []
        assert operators_of(model, x) == expected


@needs_a_compiler
@pytest.mark.parametrize("bias", [None, torch.randn(40).bfloat16()], ids=["plain", "bias"])
def test_the_operator_of_a_kept_linear_obeys_torch(bias: Tensor | None) -> None:
    given = torch.randn(1, 1, 24).bfloat16(), torch.randn(40, 24).bfloat16(), bias
    torch.library.opcheck(torch.ops.haq.kept_linear.default, given)

"""What several layers make of one tensor is made once, and never for a tensor that changed."""

import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from haq.int8 import matmul
from haq.int8.once import keep, once, state_of
from haq.nn import Int8Linear


@pytest.fixture(autouse=True)
def rounds_by_itself() -> Iterator[None]:
    """Layers of a backend to which tokens come rounded: LLVM's kernels round them anew."""
    with matmul.use_backend("reference"):
        yield


class Doubling:
    """Makes what is asked for, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


@pytest.fixture
def double() -> Doubling:
    return Doubling()


@pytest.fixture(params=[False, True], ids=["no grad", "inference mode"])
def x(request: pytest.FixtureRequest) -> Tensor:
    with torch.inference_mode(request.param):
        return torch.arange(6.0).view(2, 3)


def test_several_readers_share_it(x: Tensor, double: Doubling) -> None:
    results = [once(x, "double", reader, double) for reader in "qkv"]
    assert double.calls == 1
    assert all(result is results[0] for result in results)


def test_a_reader_that_comes_again_gets_a_new_one(x: Tensor, double: Doubling) -> None:
    for _ in range(2):
        for reader in "ab":
            x.numpy()[0, 0] += 1  # No trace of this in the tensor.
            once(x, "double", reader, double)
        assert torch.equal(once(x, "double", reader, double), 2 * x)
    assert double.calls > 2


def test_another_tensor_is_another_one(x: Tensor, double: Doubling) -> None:
    twin, view = x.clone(), x.view_as(x)
    for tensor, reader in ((x, "q"), (twin, "k"), (x, "v"), (view, "o")):
        once(tensor, "double", reader, double)
    assert double.calls == 4


def test_another_kind_is_another_one(x: Tensor, double: Doubling) -> None:
    once(x, "double", "q", double)
    assert torch.equal(once(x, "negative", "k", torch.neg), -x)


@pytest.mark.parametrize(
    "write", [lambda x: x.add_(1), lambda x: x[0].zero_(), lambda x: x.view(-1)[5:].fill_(3)]
)
def test_what_was_written_to_is_made_again(
    x: Tensor, double: Doubling, write: Callable[[Tensor], Tensor]
) -> None:
    with torch.inference_mode(x.is_inference()):
        once(x, "double", "q", double)
        write(x)
        assert torch.equal(once(x, "double", "k", double), 2 * x)


def test_it_lives_no_longer_than_the_tensor(double: Doubling) -> None:
    x = torch.ones(3)
    made = weakref.ref(once(x, "double", "q", double))
    assert made() is not None
    del x
    assert made() is None


def test_a_failure_leaves_nothing_behind(x: Tensor, double: Doubling) -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        once(x, "double", "q", fail)
    assert torch.equal(once(x, "double", "k", double), 2 * x)


def test_what_is_left_for_a_tensor_is_found(double: Doubling) -> None:
    x = torch.ones(3)
    keep(x, "double", "left", x._version)
    assert once(x, "double", "q", double) == "left"
    x.add_(1)
    assert torch.equal(once(x, "double", "k", double), 2 * x)


def test_threads_do_not_meet(double: Doubling) -> None:
    x = torch.ones(3)
    once(x, "double", "q", double)
    thread = threading.Thread(target=once, args=(x, "double", "k", double))
    thread.start()
    thread.join()
    assert double.calls == 2


class OnGpu:
    """What `state_of` asks a tensor of a GPU."""

    is_cuda, device, _version = True, torch.device("cuda", 1), 3


def test_on_a_gpu_it_is_for_one_stream_and_not_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that reads what was made outside of it would read the same in every replay."""
    stream, capturing, x = SimpleNamespace(cuda_stream=7), [False], OnGpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {x.device: stream}[device])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    states = [state_of(x)]  # type: ignore[arg-type]
    capturing[0] = True
    states.append(state_of(x))  # type: ignore[arg-type]
    stream.cuda_stream = 8
    states.append(state_of(x))  # type: ignore[arg-type]
    x._version = 4
    states.append(state_of(x))  # type: ignore[arg-type]
    assert len(set(states)) == len(states) == 4
    assert state_of(x) == states[-1]  # type: ignore[arg-type]


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were rounded."""
    seen: list[Tensor] = []
    original = matmul.rounded_rows

    def note(tokens: Tensor, asymmetric: bool = False) -> matmul.RoundedTokens:
        seen.append(tokens)
        return original(tokens, asymmetric)

    monkeypatch.setattr(matmul, "rounded_rows", note)
    return seen


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference mode"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_layers_that_read_one_tensor_round_it_once(
    rounded: list[Tensor], tokens: int, inference: bool
) -> None:
    layers = [Int8Linear.from_float(torch.randn(5, 16)) for _ in range(3)]
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        x = torch.randn(tokens, 16)
        results = [layer(x) for layer in layers]
        assert len(rounded) == 1
        for layer, result in zip(layers, results, strict=True):
            torch.testing.assert_close(layer(x.clone()), result, rtol=0, atol=0)


def test_sharing_goes_on_where_gradients_are_enabled(rounded: list[Tensor]) -> None:
    layers = [Int8Linear.from_float(torch.randn(5, 16)) for _ in range(2)]
    x = torch.randn(3, 16, requires_grad=True)
    results = [layer(x) for layer in layers]
    assert len(rounded) == 1
    assert not any(result.requires_grad for result in results)


def test_with_and_without_a_zero_point_are_two_kinds(rounded: list[Tensor]) -> None:
    weight, x = torch.randn(5, 16), torch.rand(3, 16)
    plain, shifted = (Int8Linear.from_float(weight, asymmetric=kind) for kind in (False, True))
    results = plain(x), shifted(x)
    assert len(rounded) == 2
    for layer, result in zip((plain, shifted), results, strict=True):
        torch.testing.assert_close(layer(x.clone()), result, rtol=0, atol=0)


def test_compiled_code_shares_nothing(rounded: list[Tensor]) -> None:
    """It writes to the memory of tensors that it reuses, which leaves no trace."""
    layers = [Int8Linear.from_float(torch.randn(5, 16)) for _ in range(2)]
    x = torch.randn(3, 16)
    for layer in layers:
        result = torch.ops.haq.int8_linear(x, layer._handle, 5)
        torch.testing.assert_close(result, layer(x.clone()), rtol=0, atol=0)
        x.numpy()[:] *= 2

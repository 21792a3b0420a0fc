"""Int8Experts against `transformers` with int8 inputs, and as a module: bits, state, compiler."""

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from haq.int8 import matmul
from haq.nn import Int8Experts, Int8Linear
from haq.nn import rows as ways
from tests.model.test_experts import EXPERTS, FAMILIES, fused, routed

HIDDEN, INNER = 33, 21
TOKENS, SLOTS = 11, 3
BACKENDS = [status.name for status in matmul.backends() if status.device == "cpu" and status.exact]


def silu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def int8_layers(rows: int, channels: int, number: int = EXPERTS) -> list[Int8Linear]:
    """Weights over the whole int8 range, with biases."""
    return [
        Int8Linear(
            torch.randint(-127, 128, (rows, channels), dtype=torch.int8),
            (torch.rand(rows, 1) + 0.5) / 500,
            torch.randn(rows),
        )
        for _ in range(number)
    ]


def build() -> Int8Experts:
    return Int8Experts(int8_layers(2 * INNER, HIDDEN), int8_layers(HIDDEN, INNER), silu_gate)


@pytest.fixture(params=BACKENDS)
def experts(request: pytest.FixtureRequest) -> Int8Experts:
    with matmul.use_backend(request.param):
        return build()


Given = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def given() -> Given:
    """Hidden states, the experts of every token (none in some slots), and their weights."""
    index = torch.rand(TOKENS, EXPERTS + 1).argsort(-1)[:, :SLOTS]
    assert 0 < (index == EXPERTS).sum() < TOKENS
    return torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, SLOTS)


def assert_same(experts: nn.Module, other: nn.Module, given: Given) -> None:
    """The same parts, and the same bits computed from them."""
    torch.testing.assert_close(dict(other.state_dict()), dict(experts.state_dict()), rtol=0, atol=0)
    assert_same_bits(other(*given), experts(*given))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- Numbers --------------------------------------------------------------------------------------


class Int8Inputs(TorchFunctionMode):
    """Rounds what enters each product to int8 with a scale per row: `transformers` does the rest.

    Args:
        asymmetric: every second product is given a zero point: 256 integers from the smallest value
            to the largest, zero included.

    Attributes:
        products: how many there were.
        margin: how far the nearest of the rounded values is from a tie. Where it is close to zero,
            float32 and float64 may round to different integers, and both are right.
    """

    def __init__(self, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.products = 0
        self.margin = 0.5

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (functional.linear, torch.Tensor.__matmul__, torch.Tensor.matmul):
            args = (self._rounded(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float64
        self.products += 1
        low, high = -x.abs().amax(-1, keepdim=True), x.abs().amax(-1, keepdim=True)
        steps = 254
        if self.asymmetric and self.products % 2 == 0:
            low, high, steps = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0), 255
        scale = (high - low) / steps
        integers = (x / scale).round()
        self.margin = min(self.margin, 0.5 - float((x / scale - integers).abs().max()))
        return integers.clamp(max=(low / scale).round() + steps) * scale


def quantized(family: str, asymmetric: bool = False) -> tuple[Int8Experts, nn.Module]:
    """The experts of a family in int8, and `transformers`' own with the same weights in float64.

    Args:
        family: one of `FAMILIES`.
        asymmetric: whether the second matrix reads tokens with a zero point.
    """
    reference = fused(family)
    layers: dict[str, list[Int8Linear]] = {}
    for name, weight in reference.named_parameters():
        if name.endswith("_bias"):
            continue
        bias = getattr(reference, f"{name}_bias", torch.zeros(EXPERTS, 0))
        bias.copy_(bias.float())
        layers[name] = []
        for matrix, vector in zip(weight, bias, strict=True):
            view = matrix.T if reference.is_transposed else matrix
            layer = Int8Linear.from_float(
                view,
                vector if len(vector) else None,
                asymmetric=asymmetric and name == "down_proj",
            )
            view.copy_(layer.weight.double() * layer.weight_scale.double())
            layers[name].append(layer)
    down = layers.pop("down_proj")
    (up,) = layers.values()
    activation = reference._apply_gate if reference.has_gate else reference.act_fn
    return Int8Experts(up, down, activation), reference


def exact(reference: nn.Module, given: Given, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """What `transformers`' experts give for int8 inputs, token by token, and which of it is sure.

    Returns:
        float64 ``[T, D]`` and bool ``[T]``: False where an integer is as good as a tie.
    """
    rows, margins = [], []
    for hidden, index, weights in zip(*given, strict=True):
        with Int8Inputs(asymmetric) as mode:
            rows.append(reference(hidden[None].double(), index[None], weights[None].double()))
        assert mode.products == 2 * len(index)
        margins.append(mode.margin)
    # float32 moves a value of up to 127 by about ten roundings of 2^-24: 1e-4 of an integer.
    return torch.cat(rows), torch.tensor(margins) > 1e-4


def assert_close_to_exact(
    actual: Tensor, reference: nn.Module, given: Given, rtol: float, asymmetric: bool = False
) -> None:
    expected, sure = exact(reference, given, asymmetric)
    assert sure.float().mean() > 0.7
    size = float(expected.abs().max())
    torch.testing.assert_close(
        actual.double()[sure], expected[sure], rtol=rtol, atol=rtol * size, check_dtype=False
    )


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_transformers_does_with_int8_inputs(family: str, asymmetric: bool) -> None:
    experts, reference = quantized(family, asymmetric)
    hidden, index, weights = routed(reference, tokens=25)
    given = hidden.float(), index, weights.float()
    assert experts.num_experts == EXPERTS == len(index.unique())
    # About ten roundings to float32; an integer that is off by one changes the result by 1e-3.
    assert_close_to_exact(experts(*given), reference, given, 3e-6, asymmetric)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)],
    ids=str,
)
def test_the_result_has_the_dtype_of_the_hidden_states(dtype: torch.dtype, rounding: float) -> None:
    experts, reference = quantized("mixtral")
    hidden, index, weights = routed(reference, tokens=25)
    # The reference is given the rounded numbers, so only the result is rounded once more.
    given = hidden.to(dtype), index, weights.to(dtype)
    result = experts(*given)
    assert (result.dtype, result.shape) == (dtype, hidden.shape)
    assert_close_to_exact(result, reference, given, rtol=rounding + 3e-6)


def test_weights_may_be_more_precise_than_hidden_states(experts: Int8Experts, given: Given) -> None:
    """As in most models of 16 bits: the router's softmax is float32."""
    hidden, index, weights = given
    hidden = hidden.bfloat16()
    assert_same_bits(
        experts(hidden, index, weights), experts(hidden.float(), index, weights).bfloat16()
    )


def test_is_close_to_the_float_experts() -> None:
    experts, reference = quantized("mixtral")
    hidden, index, weights = routed(reference, tokens=64)
    signal = reference(hidden, index, weights)
    error = experts(hidden, index, weights) - signal
    ratio = 10 * torch.log10(signal.square().sum() / error.square().sum())
    assert ratio > 30  # dB; two roundings of what enters the matrices leave about 37


def test_no_slot_has_an_expert(experts: Int8Experts, given: Given) -> None:
    hidden, index, weights = given
    none = torch.full_like(index, EXPERTS)
    assert_same_bits(experts(hidden, none, weights), torch.zeros(TOKENS, HIDDEN))


def test_a_slot_without_expert_adds_nothing(experts: Int8Experts, given: Given) -> None:
    hidden, index, weights = given
    index[:, 0] = torch.arange(TOKENS) % EXPERTS
    index[:, 1] = EXPERTS
    index[4] = EXPERTS
    weights[:, 1] = torch.nan  # Whatever stands there.
    kept = [0, 2]
    result = experts(hidden, index, weights)
    assert_same_bits(result, experts(hidden, index[:, kept], weights[:, kept]))
    assert not result[4].any()
    assert result[:4].any(-1).all()


def test_the_sum_is_that_of_the_slots_in_their_order(experts: Int8Experts) -> None:
    hidden, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS + 1)
    index = weights.argsort(-1)
    expected = torch.zeros(TOKENS, HIDDEN)
    for slot in range(EXPERTS + 1):
        expected = expected + experts(hidden, index[:, [slot]], weights[:, [slot]])
    assert_same_bits(experts(hidden, index, weights), expected)


def test_one_expert_in_two_slots_counts_twice(experts: Int8Experts, given: Given) -> None:
    hidden, index, _ = given
    index[:] = 2
    weights = torch.tensor([0.5, 0.25, 0.25]).expand(TOKENS, 3)  # Powers of two: nothing rounds.
    once = experts(hidden, index[:, :1], torch.ones(TOKENS, 1))
    # The sum of the slots is exact but for the last bit of each addition.
    torch.testing.assert_close(experts(hidden, index, weights), once, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(experts: Int8Experts, given: Given, tokens: int) -> None:
    result = experts(*(part[:tokens] for part in given))
    assert result.shape == (tokens, HIDDEN)
    assert_same_bits(result, experts(*given)[:tokens])


def test_a_token_gives_the_same_bits_whatever_is_around_it(
    experts: Int8Experts, given: Given
) -> None:
    expected = experts(*given)
    alone = [experts(*(part[[t]] for part in given)) for t in range(TOKENS)]
    assert_same_bits(torch.cat(alone), expected)
    order = torch.randperm(TOKENS)
    assert_same_bits(experts(*(part[order] for part in given)), expected[order])
    twice = torch.arange(TOKENS).repeat_interleave(2)[3:]
    assert_same_bits(experts(*(part[twice] for part in given)), expected[twice])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt-oss"])
def test_a_token_alone_gives_the_same_bits_in_every_family(family: str) -> None:
    """gpt-oss is left out: torch's sigmoid of its interleaved gate rounds the last elements of a
    tensor, those that do not fill a vector register, differently."""
    experts, reference = quantized(family)
    given = routed(reference, tokens=13)
    alone = [experts(*(part[[t]] for part in given)) for t in range(13)]
    assert_same_bits(torch.cat(alone), experts(*given))


def test_a_token_with_nan_spoils_only_itself(experts: Int8Experts, given: Given) -> None:
    hidden, index, weights = given
    index[:, 0] = 3  # One expert that all tokens share.
    expected = experts(hidden, index, weights)
    hidden[5, 7] = torch.nan
    result = experts(hidden, index, weights)
    assert result[5].isnan().all()
    others = torch.arange(TOKENS) != 5
    assert_same_bits(result[others], expected[others])


def test_only_experts_that_were_chosen_are_touched(
    experts: Int8Experts, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, index, weights = given
    index[:] = torch.tensor([1, 4, EXPERTS])
    expected = experts(hidden, index, weights)
    for number in set(range(EXPERTS)) - {1, 4}:
        for layer in experts.expert(number):
            monkeypatch.setattr(layer, "_packed", None)
    assert_same_bits(experts(hidden, index, weights), expected)


def test_every_expert_multiplies_all_its_tokens_at_once(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    with matmul.use_backend("reference"):
        experts = build()
    touched: list[Int8Linear] = []
    product = Int8Linear.product

    def spy(layer: Int8Linear, *args: Any) -> Tensor:
        touched.append(layer)
        return product(layer, *args)

    monkeypatch.setattr(Int8Linear, "product", spy)
    hidden, index, weights = given
    index[:] = torch.tensor([1, 4, EXPERTS])
    experts(hidden, index, weights)
    expected = [experts.up[1], experts.up[4], experts.down[1], experts.down[4]]
    assert len(touched) == 4
    assert all(layer is other for layer, other in zip(touched, expected, strict=True))


def test_arguments_are_not_written_to(experts: Int8Experts, given: Given) -> None:
    before = [part.clone() for part in given]
    experts(*given)
    torch.testing.assert_close(list(given), before, rtol=0, atol=0)


def test_arguments_need_not_be_contiguous(experts: Int8Experts, given: Given) -> None:
    strided = [part.t().contiguous().t() for part in given]
    assert not any(part.is_contiguous() for part in strided)
    assert_same_bits(experts(*strided), experts(*given))


def test_attributes(experts: Int8Experts) -> None:
    assert experts.num_experts == EXPERTS
    assert list(experts.parameters()) == []


def test_repr_names_sizes_and_backend() -> None:
    with matmul.use_backend("reference"):
        first = repr(build()).splitlines()[1]
    assert first.strip() == "num_experts=5, hidden=33, inner=21, backend=reference"


@pytest.mark.skipif(not matmul.compiles(), reason="LLVM's kernels do not run here")
def test_the_gate_is_a_kernel_where_it_is_one(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of: dict[bool, int] = {False: 0, True: 0}
    products = ways.products

    def noted(groups: Any, tokens: Tensor, *options: Any, gated: bool = False) -> Tensor:
        rows_of[gated] += len(tokens)
        return products(groups, tokens, *options, gated=gated)

    monkeypatch.setattr(ways, "products", noted)
    experts = build()
    result = experts(*given)
    chosen = int((given[1] < EXPERTS).sum())
    assert rows_of == {False: chosen, True: chosen}
    experts.activation = lambda x: silu_gate(x)[:, : INNER - 1].repeat(1, 2)[:, :INNER]
    other = experts(*given)  # Looked at anew, and another one.
    assert not torch.allclose(other, result)
    assert experts.activation_on(torch.device("cpu")) is experts.activation
    experts.activation = silu_gate
    assert experts.activation_on(torch.device("cuda")) is silu_gate
    assert rows_of == {False: 3 * chosen, True: chosen}


# --- Gradients ------------------------------------------------------------------------------------


def test_result_is_detached_where_gradients_are_enabled(experts: Int8Experts, given: Given) -> None:
    hidden, index, weights = given
    expected = experts(*given)
    result = experts(hidden.clone().requires_grad_(), index, weights.clone().requires_grad_())
    assert not result.requires_grad
    assert_same_bits(result, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(
    experts: Int8Experts, given: Given, mode: Callable[[], torch.no_grad]
) -> None:
    expected = experts(*given)
    with mode():
        assert_same_bits(experts(*given), expected)


# --- State, casts, copies -------------------------------------------------------------------------


def test_state_has_these_names(experts: Int8Experts) -> None:
    assert set(experts.state_dict()) == {
        f"{matrix}.{expert}.{part}"
        for matrix in ("up", "down")
        for expert in range(EXPERTS)
        for part in ("weight", "weight_scale", "bias")
    }


def test_state_goes_into_another_module(experts: Int8Experts, given: Given) -> None:
    other = build()
    assert not torch.equal(other(*given), experts(*given))
    other.load_state_dict(experts.state_dict(), strict=True)
    assert_same(experts, other, given)


@pytest.mark.parametrize("cast", [nn.Module.half, lambda module: module.to(torch.bfloat16)])
def test_casts_change_nothing(
    experts: Int8Experts, given: Given, cast: Callable[[nn.Module], nn.Module]
) -> None:
    before = copy.deepcopy(experts)
    cast(nn.Sequential(experts))
    assert_same(before, experts, given)


def through_torch_save(experts: Int8Experts) -> Int8Experts:
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    loaded: Int8Experts = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_are_their_own(
    experts: Int8Experts, given: Given, duplicate: Callable[[Int8Experts], Int8Experts]
) -> None:
    twin = duplicate(experts)
    assert_same(experts, twin, given)
    expected = experts(*given)
    twin.load_state_dict(build().state_dict())
    assert not torch.equal(twin(*given), expected)
    assert_same_bits(experts(*given), expected)


def test_moves_and_comes_back(experts: Int8Experts, given: Given) -> None:
    moved = copy.deepcopy(experts).to("meta")
    assert {part.device.type for part in moved.state_dict().values()} == {"meta"}
    moved.to_empty(device="cpu").load_state_dict(experts.state_dict())
    assert_same(experts, moved, given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_does(experts: Int8Experts, given: Given) -> None:
    # Exponentials differ between devices, a ReLU does not.
    experts.activation = relu_gate
    expected = experts(*given)
    moved = copy.deepcopy(experts).to("cuda")
    assert_same_bits(moved(*(part.to("cuda") for part in given)).cpu(), expected)


def relu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate.relu() * up


# --- The compiler ---------------------------------------------------------------------------------


def compiled(module: nn.Module, backend: str = "eager") -> Callable[..., Tensor]:
    torch._dynamo.reset()
    function: Callable[..., Tensor] = torch.compile(module, backend=backend, fullgraph=True)
    return function


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiler_changes_no_bit(experts: Int8Experts, given: Given, backend: str) -> None:
    assert_same_bits(compiled(experts, backend)(*given), experts(*given))


def test_the_compiler_sees_one_operator(given: Given) -> None:
    seen = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(build(), backend=record, fullgraph=True)(*given)
    assert seen == ["haq.int8_experts"]


def test_a_compiled_copy_uses_its_own_weights(experts: Int8Experts, given: Given) -> None:
    function = compiled(experts)
    assert_same_bits(function(*given), experts(*given))
    twin = copy.deepcopy(experts)
    twin.load_state_dict(build().state_dict())
    assert not torch.equal(twin(*given), experts(*given))
    assert_same_bits(torch.compile(twin, backend="eager", fullgraph=True)(*given), twin(*given))
    assert_same_bits(function(*given), experts(*given))


def test_compiled_experts_follow_what_is_loaded(experts: Int8Experts, given: Given) -> None:
    function = compiled(experts)
    before = function(*given)
    experts.load_state_dict(build().state_dict())
    after = function(*given)
    assert not torch.equal(after, before)
    assert_same_bits(after, experts(*given))


def test_two_layers_in_one_graph_keep_apart(given: Given) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = build(), build()

        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return self.second(self.first(hidden, index, weights), index.flip(0), weights)

    model = Two()
    assert_same_bits(compiled(model)(*given), model(*given))


def test_compiled_and_detached(experts: Int8Experts, given: Given) -> None:
    hidden, index, weights = given
    result = compiled(experts, "aot_eager")(hidden.requires_grad_(), index, weights)
    assert not result.requires_grad


@pytest.mark.parametrize("slots", [1, SLOTS])
@pytest.mark.parametrize(
    "layout", [lambda x: x, lambda x: x.t().contiguous().t()], ids=["rows", "columns"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_obeys_torch(
    given: Given, slots: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    experts = build()
    hidden, index, weights = given
    arguments = (layout(hidden.to(dtype)), index[:, :slots], weights[:, :slots], experts._handle)
    torch.library.opcheck(torch.ops.haq.int8_experts.default, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_compiles_it(given: Given) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = build()

        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            # What enters is stored by columns: the experts give rows.
            return self.experts((2 * hidden).t().contiguous().t(), index, weights).relu()

    model = Layer()
    assert_same_bits(compiled(model, "inductor")(*given), model(*given))


# --- Threads and memory ---------------------------------------------------------------------------


def test_threads_get_what_one_gets(experts: Int8Experts, given: Given) -> None:
    inputs = [tuple(part[:tokens] for part in given) for tokens in (1, 3, TOKENS, 2)]
    expected = [experts(*parts) for parts in inputs]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(2)

    def run(thread: int) -> None:
        start.wait()
        results[thread] = [experts(*parts) for _ in range(20) for parts in inputs]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results, dict.fromkeys(range(2), expected * 20), rtol=0, atol=0)


MEMORY_PROGRAM = """
import gc, os, torch
from haq.nn import Int8Experts, Int8Linear

def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def build(rows, number):
    up = [Int8Linear.from_float(torch.randn(rows, 2048)) for _ in range(number)]
    down = [Int8Linear.from_float(torch.randn(2048, rows)) for _ in range(number)]
    return Int8Experts(up, down, torch.relu)

torch.set_num_threads(1)
x, chosen = torch.randn(1, 2048), torch.arange(4)[None]

def used():
    experts = build(2048, 4)  # 32 MiB of int8
    experts(x, chosen, torch.ones(1, 4))
    return experts

first = used()  # And whatever is allocated once.
before = resident_bytes()
second = used()
print(resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_weights_exist_once() -> None:
    command = [sys.executable, "-c", MEMORY_PROGRAM]
    # What is freed goes back to the system at once, and is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    weight_bytes = 8 * 2048 * 2048
    assert 0.9 * weight_bytes < int(done.stdout) < 1.5 * weight_bytes


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "index", "weights"),
    [
        ([11, 32], [11, 3], [11, 3]),
        ([11, 33], [11], [11]),
        ([11, 33], [10, 3], [10, 3]),
        ([11, 33], [11, 1, 3], [11, 1, 3]),
        ([11, 2, 33], [11, 3], [11, 3]),
        ([33], [33, 3], [33, 3]),
        ([11, 33], [11, 3], [11, 2]),
        ([11, 33], [11, 1], [11]),
        ([11, 33], [11, 3], [3, 11]),
    ],
    ids=[
        "hidden size",
        "index is a vector",
        "fewer indices",
        "index has three dimensions",
        "hidden has three dimensions",
        "hidden is a vector",
        "fewer weights",
        "weights are a vector",
        "weights are transposed",
    ],
)
def test_shapes_that_do_not_fit(hidden: list[int], index: list[int], weights: list[int]) -> None:
    message = (
        "`hidden_states` must have shape [T, 33], `top_k_index` and `top_k_weights` [T, A], "
        f"got {hidden}, {index} and {weights}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(torch.randn(hidden), torch.zeros(index).long(), torch.ones(weights))


@pytest.mark.parametrize("value", [-1, EXPERTS + 1, EXPERTS + 40], ids=str)
def test_an_index_without_expert(given: Given, value: int) -> None:
    hidden, index, weights = given
    index[4, 1] = value
    with pytest.raises(
        ValueError, match=rf"`top_k_index` must be integers in \[0, 5\], got {value}\."
    ):
        build()(hidden, index, weights)


@pytest.mark.parametrize(
    ("ups", "downs", "message"),
    [
        (0, 0, "one layer for each expert, all of the same shape, got 0 and 0 with shapes []."),
        (
            2,
            3,
            "one layer for each expert, all of the same shape, got 2 and 3 with shapes "
            "[(42, 33, 33, 21)].",
        ),
    ],
    ids=["none", "unequal"],
)
def test_numbers_of_layers(ups: int, downs: int, message: str) -> None:
    up, down = int8_layers(42, 33, ups), int8_layers(33, 21, downs)
    with pytest.raises(ValueError, match=re.escape(f"`up` and `down` must be {message}")):
        Int8Experts(up, down, silu_gate)


@pytest.mark.parametrize(
    ("up", "down"),
    [([True, True], [True, True]), ([False, False], [True, False])],
    ids=["both", "one expert of two"],
)
def test_where_tokens_may_have_a_zero_point(up: list[bool], down: list[bool]) -> None:
    """All experts read the same rounded tokens."""

    def layers(rows: int, channels: int, asymmetric: list[bool]) -> list[Int8Linear]:
        weight = torch.randn(rows, channels)
        return [Int8Linear.from_float(weight, asymmetric=chosen) for chosen in asymmetric]

    message = (
        f"`up` must be symmetric layers, and `down` all asymmetric or none, got {up} and {down}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Int8Experts(layers(42, 33, up), layers(33, 21, down), silu_gate)


def test_experts_of_two_shapes() -> None:
    up = int8_layers(42, 33, 1) + int8_layers(40, 33, 1)
    down = int8_layers(33, 21, 1) + int8_layers(33, 20, 1)
    message = "got 2 and 2 with shapes [(40, 33, 33, 20), (42, 33, 33, 21)]."
    with pytest.raises(ValueError, match=re.escape(message)):
        Int8Experts(up, down, silu_gate)


@pytest.mark.parametrize(
    ("up", "down"),
    [([42, 33], [32, 21]), ([41, 33], [33, 21]), ([63, 33], [33, 21]), ([21, 42], [21, 33])],
    ids=["another width", "not twice", "three times", "transposed"],
)
def test_matrices_that_do_not_fit_together(up: list[int], down: list[int]) -> None:
    message = f"`up` must be [2 I, D] or [I, D] for `down` of shape [D, I], got {up} and {down}."
    with pytest.raises(ValueError, match=re.escape(message)):
        Int8Experts(int8_layers(*up), int8_layers(*down), silu_gate)


def test_more_rows_than_go_together_give_what_each_gives_alone() -> None:
    """One expert with 2500 rows, and another with a few before and after it."""
    up = [Int8Linear.from_float(torch.randn(12, 8)) for _ in range(3)]
    down = [Int8Linear.from_float(torch.randn(8, 12), asymmetric=True) for _ in range(3)]
    experts = Int8Experts(up, down, torch.relu)
    hidden = torch.randn(2510, 8)
    index = torch.ones(2510, 1, dtype=torch.int64)
    index[:5], index[-5:] = 0, 2
    weights = torch.rand(2510, 1)
    expected = torch.cat(
        [experts(hidden[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(2510)]
    )
    assert torch.equal(experts(hidden, index, weights), expected)

"""Int8Linear as a module: numbers, dtypes, state, copies, the compiler, threads and memory."""

import copy
import io
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from haq.int8 import grid, matmul
from haq.nn import Int8Linear

IN_FEATURES, OUT_FEATURES = 65, 33
BACKENDS = [status.name for status in matmul.backends() if status.device == "cpu" and status.exact]


@pytest.fixture
def parts() -> dict[str, Tensor]:
    """A weight over the whole int8 range, its scales and a bias."""
    return {
        "weight": torch.randint(-128, 128, (OUT_FEATURES, IN_FEATURES), dtype=torch.int8),
        "weight_scale": torch.rand(OUT_FEATURES, 1) + 0.01,
        "bias": torch.randn(OUT_FEATURES),
    }


@pytest.fixture(params=BACKENDS)
def layer(request: pytest.FixtureRequest, parts: dict[str, Tensor]) -> Int8Linear:
    with matmul.use_backend(request.param):
        return Int8Linear(**parts)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, IN_FEATURES)


def meta_layer(bias: bool = True) -> Int8Linear:
    return Int8Linear(
        torch.empty(OUT_FEATURES, IN_FEATURES, dtype=torch.int8, device="meta"),
        torch.empty(OUT_FEATURES, 1, device="meta"),
        torch.empty(OUT_FEATURES, device="meta") if bias else None,
    )


def assert_same(layer: Int8Linear, other: Int8Linear, x: Tensor) -> None:
    """The same parts, and the same bits computed from them."""
    state, other_state = layer.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    torch.testing.assert_close(dict(other_state), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


# --- Numbers --------------------------------------------------------------------------------------


def test_computes_what_its_docstring_says(
    layer: Int8Linear, parts: dict[str, Tensor], x: Tensor
) -> None:
    integers, scale = grid.quantize_rows(x)
    sums = integers.double() @ parts["weight"].double().t()
    expected = sums * parts["weight_scale"].double().view(-1) * scale.double()
    # float32: the sum, two scalings, the bias
    torch.testing.assert_close(
        layer(x).double(), expected + parts["bias"], rtol=4 * 2.0**-24, atol=1e-6
    )


def test_from_float_rounds_to_nearest() -> None:
    weight, bias = torch.randn(OUT_FEATURES, IN_FEATURES), torch.randn(OUT_FEATURES)
    layer = Int8Linear.from_float(weight.bfloat16(), bias.bfloat16())
    integers, scale = grid.quantize_rows(weight.bfloat16())
    expected = {"weight": integers, "weight_scale": scale, "bias": bias.bfloat16().float()}
    torch.testing.assert_close(dict(layer.state_dict()), expected, rtol=0, atol=0)


def test_is_close_to_the_float_layer(x: Tensor) -> None:
    reference = nn.Linear(IN_FEATURES, OUT_FEATURES)
    layer = Int8Linear.from_float(reference.weight, reference.bias)
    signal, error = reference(x), layer(x) - reference(x)
    ratio = 10 * torch.log10(signal.square().sum() / error.square().sum())
    assert ratio > 35  # dB; two int8 roundings of normal numbers leave about 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_has_the_dtype_of_the_input(
    layer: Int8Linear, x: Tensor, dtype: torch.dtype
) -> None:
    result = layer(x.to(dtype))
    assert (result.dtype, result.shape) == (dtype, (2, 5, OUT_FEATURES))


def test_a_layer_without_bias(parts: dict[str, Tensor], x: Tensor) -> None:
    layer = Int8Linear(**parts)
    bias = parts.pop("bias")
    bare = Int8Linear(**parts)
    assert bare.bias is None
    assert list(bare.state_dict()) == ["weight", "weight_scale"]
    torch.testing.assert_close(bare(x) + bias, layer(x), rtol=0, atol=0)


def test_attributes(layer: Int8Linear, parts: dict[str, Tensor]) -> None:
    assert (layer.in_features, layer.out_features) == (IN_FEATURES, OUT_FEATURES)
    assert list(layer.parameters()) == []
    actual = {"weight": layer.weight, "weight_scale": layer.weight_scale, "bias": layer.bias}
    torch.testing.assert_close(actual, parts, rtol=0, atol=0)


def test_repr_names_shape_and_backend(parts: dict[str, Tensor]) -> None:
    with matmul.use_backend("reference"):
        layer = Int8Linear(**parts)
    expected = "Int8Linear(in_features=65, out_features=33, bias=True, backend=reference)"
    assert repr(layer) == expected


def test_arguments_are_not_written_to(parts: dict[str, Tensor], x: Tensor) -> None:
    before = {name: part.clone() for name, part in parts.items()} | {"x": x.clone()}
    Int8Linear(**parts)(x)
    torch.testing.assert_close({**parts, "x": x}, before, rtol=0, atol=0)


def test_parts_need_not_be_contiguous(parts: dict[str, Tensor], x: Tensor) -> None:
    expected = Int8Linear(**parts)
    parts["weight"] = parts["weight"].t().contiguous().t()
    assert_same(expected, Int8Linear(**parts), x)


# --- Gradients ------------------------------------------------------------------------------------


def test_result_is_detached_where_gradients_are_enabled(layer: Int8Linear, x: Tensor) -> None:
    result = layer(x.clone().requires_grad_())
    assert not result.requires_grad
    torch.testing.assert_close(result, layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(
    layer: Int8Linear, x: Tensor, mode: Callable[[], torch.no_grad]
) -> None:
    expected = layer(x)
    with mode():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_float_parameters_lose_their_graph() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    layer = Int8Linear.from_float(weight, nn.Parameter(torch.randn(3)))
    assert not any(part.requires_grad for part in layer.state_dict(keep_vars=True).values())


# --- State ----------------------------------------------------------------------------------------


def test_state_has_these_names_shapes_and_dtypes(layer: Int8Linear) -> None:
    state = {name: (part.dtype, list(part.shape)) for name, part in layer.state_dict().items()}
    assert state == {
        "weight": (torch.int8, [OUT_FEATURES, IN_FEATURES]),
        "weight_scale": (torch.float32, [OUT_FEATURES, 1]),
        "bias": (torch.float32, [OUT_FEATURES]),
    }


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_fills_a_layer_on_the_meta_device(
    layer: Int8Linear, x: Tensor, assign: bool
) -> None:
    empty = meta_layer()
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert_same(layer, empty, x)


def test_loading_replaces_what_was_there(layer: Int8Linear, x: Tensor) -> None:
    other = Int8Linear.from_float(torch.randn(OUT_FEATURES, IN_FEATURES), torch.randn(OUT_FEATURES))
    other.load_state_dict(layer.state_dict())
    assert_same(layer, other, x)


def test_loading_works_inside_a_model(layer: Int8Linear, x: Tensor) -> None:
    empty = nn.Sequential(nn.Identity(), meta_layer())
    empty.load_state_dict(nn.Sequential(nn.Identity(), layer).state_dict())
    assert_same(layer, empty[1], x)


def test_a_loaded_layer_does_not_share_memory_with_the_state(layer: Int8Linear, x: Tensor) -> None:
    state = {name: part.clone() for name, part in layer.state_dict().items()}
    other = meta_layer()
    other.load_state_dict(state)
    for part in state.values():
        part.zero_()
    assert_same(layer, other, x)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.ones(33, 65), r"`1\.weight` must be int8, got torch.float32"),
        (
            "weight",
            torch.ones(33, 64, dtype=torch.int8),
            r"`1\.weight` must have shape \[33, 65\], got \[33, 64\]",
        ),
        (
            "weight_scale",
            torch.ones(33, 1).half(),
            r"`1\.weight_scale` must be float32, got torch.float16",
        ),
        (
            "weight_scale",
            torch.ones(33),
            r"`1\.weight_scale` must have shape \[33, 1\], got \[33\]",
        ),
        ("weight_scale", torch.zeros(33, 1), r"`1\.weight_scale` must be positive, got 0\.0"),
        ("weight_scale", torch.full((33, 1), torch.nan), r"`1\.weight_scale` must be finite"),
        ("bias", torch.ones(33).double(), r"`1\.bias` must be float32, got torch.float64"),
        ("bias", torch.ones(1), r"`1\.bias` must have shape \[33\], got \[1\]"),
        ("bias", torch.full((33,), torch.inf), r"`1\.bias` must be finite.* 33 of its elements"),
    ],
    ids=[
        "weight dtype",
        "weight shape",
        "scale dtype",
        "scale shape",
        "scale zero",
        "scale nan",
        "bias dtype",
        "bias shape",
        "bias infinite",
    ],
)
def test_loading_a_bad_part_names_it_and_changes_nothing(
    parts: dict[str, Tensor], x: Tensor, name: str, value: Tensor, message: str
) -> None:
    layer = Int8Linear(**parts)
    other = {key: part // 2 + 1 for key, part in parts.items()}
    state = {f"1.{key}": part for key, part in {**other, name: value}.items()}
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(nn.Identity(), layer).load_state_dict(state)
    assert_same(Int8Linear(**parts), layer, x)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_a_missing_part_is_named(parts: dict[str, Tensor], name: str) -> None:
    layer = Int8Linear(**parts)
    del parts[name]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "0\.{name}"'):
        nn.Sequential(layer).load_state_dict({f"0.{key}": part for key, part in parts.items()})


def test_parts_may_be_missing_if_loading_is_not_strict(parts: dict[str, Tensor], x: Tensor) -> None:
    layer = Int8Linear(**parts)
    layer.load_state_dict({"bias": parts["bias"] + 1}, strict=False)
    assert_same(Int8Linear(**{**parts, "bias": parts["bias"] + 1}), layer, x)


def test_a_part_that_the_layer_does_not_have_is_named(parts: dict[str, Tensor]) -> None:
    state = dict(parts)
    del parts["bias"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bias"'):
        Int8Linear(**parts).load_state_dict(state)


# --- Moves, casts, copies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        nn.Module.float,
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.half().float(),
    ],
    ids=["half", "bfloat16", "double", "float", "to", "half and back"],
)
def test_casts_change_nothing(
    layer: Int8Linear,
    parts: dict[str, Tensor],
    x: Tensor,
    cast: Callable[[nn.Module], nn.Module],
) -> None:
    backend = layer.backend
    cast(nn.Sequential(layer))
    assert_same(Int8Linear(**parts), layer, x)
    assert layer.backend == backend


def test_casts_do_not_unpack(layer: Int8Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = layer._packed
    layer.half()
    assert layer._packed is packed


def test_moves_and_comes_back_as_a_shape(layer: Int8Linear, x: Tensor) -> None:
    moved = copy.deepcopy(layer).to("meta")
    assert {part.device.type for part in moved.state_dict().values()} == {"meta"}
    assert moved(x.to("meta")).shape == (2, 5, OUT_FEATURES)
    moved.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert_same(layer, moved, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits(layer: Int8Linear, x: Tensor) -> None:
    expected = layer(x)
    moved = copy.deepcopy(layer).to("cuda")
    torch.testing.assert_close(moved(x.to("cuda")).cpu(), expected, rtol=0, atol=0)
    assert_same(layer, moved.to("cpu"), x)


def through_torch_save(layer: Int8Linear) -> Int8Linear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: Int8Linear = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_are_their_own(
    layer: Int8Linear, x: Tensor, duplicate: Callable[[Int8Linear], Int8Linear]
) -> None:
    twin = duplicate(layer)
    assert_same(layer, twin, x)
    assert twin._handle != layer._handle
    expected = layer(x)
    twin.load_state_dict({key: part // 2 + 1 for key, part in twin.state_dict().items()})
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_a_pickle_holds_the_plain_weight(parts: dict[str, Tensor]) -> None:
    """So that it can be read on a machine that has other backends."""
    state = Int8Linear(**parts).__getstate__()
    torch.testing.assert_close(state["_weight"], parts["weight"], rtol=0, atol=0)
    assert "_packed" not in state


def test_many_layers_reach_a_new_process(x: Tensor, tmp_path: Path) -> None:
    """Each weight is unpacked for the passage, and gone before the next one follows."""
    layers = nn.Sequential(*(Int8Linear.from_float(torch.randn(9, IN_FEATURES)) for _ in range(20)))
    path = tmp_path / "layers.pt"
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=torch.save, args=(layers, path))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    for layer, twin in zip(layers, torch.load(path, weights_only=False), strict=True):
        assert isinstance(layer, Int8Linear)
        assert_same(layer, twin, x)


# --- The compiler ---------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Callable[[nn.Module, str], Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()
    return lambda model, backend: torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiler_sees_one_graph(
    layer: Int8Linear,
    x: Tensor,
    compiled: Callable[[nn.Module, str], Callable[[Tensor], Tensor]],
    backend: str,
) -> None:
    model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer).cpu(), nn.Flatten(0, 1))[:2]
    torch.testing.assert_close(compiled(model, backend)(x), model(x), rtol=0, atol=0)


def test_the_compiler_sees_one_operator(layer: Int8Linear, x: Tensor) -> None:
    torch._dynamo.reset()
    seen = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(layer, backend=record, fullgraph=True)(x)
    assert seen == ["haq.int8_linear"]


def test_compiled_layers_keep_apart(
    x: Tensor, compiled: Callable[[nn.Module, str], Callable[[Tensor], Tensor]]
) -> None:
    layers = [Int8Linear.from_float(torch.randn(IN_FEATURES, IN_FEATURES)) for _ in range(3)]
    model = nn.Sequential(*layers)
    torch.testing.assert_close(compiled(model, "eager")(x), model(x), rtol=0, atol=0)


def test_a_compiled_layer_follows_what_is_loaded(
    layer: Int8Linear,
    x: Tensor,
    compiled: Callable[[nn.Module, str], Callable[[Tensor], Tensor]],
) -> None:
    function = compiled(layer, "eager")
    function(x)
    layer.load_state_dict({key: part // 2 + 1 for key, part in layer.state_dict().items()})
    torch.testing.assert_close(function(x), layer(x), rtol=0, atol=0)


def test_compiled_and_detached(
    layer: Int8Linear,
    x: Tensor,
    compiled: Callable[[nn.Module, str], Callable[[Tensor], Tensor]],
) -> None:
    result = compiled(layer, "aot_eager")(x.requires_grad_())
    assert not result.requires_grad


def test_the_operator_obeys_torch(layer: Int8Linear, x: Tensor) -> None:
    operator = torch.ops.haq.int8_linear.default
    torch.library.opcheck(operator, (x, layer._handle, layer.out_features))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_compiles_it(
    parts: dict[str, Tensor],
    x: Tensor,
    compiled: Callable[[nn.Module, str], Callable[[Tensor], Tensor]],
) -> None:
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        pytest.skip("inductor needs a C++ compiler")
    model = nn.Sequential(Int8Linear(**parts), nn.ReLU())
    torch.testing.assert_close(compiled(model, "inductor")(x), model(x), rtol=0, atol=0)


# --- Bad input ------------------------------------------------------------------------------------


def test_wrong_number_of_features(layer: Int8Linear) -> None:
    with pytest.raises(ValueError, match=r"in_features=65, got \[2, 64\]"):
        layer(torch.ones(2, 64))


def test_no_features_at_all(layer: Int8Linear) -> None:
    with pytest.raises(ValueError, match=r"in_features=65, got \[\]"):
        layer(torch.tensor(1.0))


def test_integer_input(layer: Int8Linear) -> None:
    with pytest.raises(TypeError, match=r"must be a float tensor, got torch.int64"):
        layer(torch.ones(2, IN_FEATURES, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(33, 65)}, TypeError, "`weight` must be int8, got torch.float32"),
        ({"weight": torch.ones(33).char()}, ValueError, r"`weight` must be a matrix .*\[33\]"),
        ({"weight": torch.ones(33, 0).char()}, ValueError, r"not empty, got shape \[33, 0\]"),
        (
            {"weight": torch.ones(33, 131_072).char()},
            ValueError,
            "at most 131071 in-features.*got 131072",
        ),
        ({"weight_scale": torch.ones(33)}, ValueError, r"shape \[33, 1\], got \[33\]"),
        ({"weight_scale": torch.ones(33, 1).bfloat16()}, TypeError, "must be float32"),
        ({"weight_scale": -torch.ones(33, 1)}, ValueError, r"must be positive, got -1\.0"),
        ({"weight_scale": torch.full((33, 1), torch.inf)}, ValueError, "must be finite"),
        ({"bias": torch.ones(32)}, ValueError, r"`bias` must have shape \[33\], got \[32\]"),
        ({"bias": torch.full((33,), torch.nan)}, ValueError, "`bias` must be finite"),
    ],
    ids=[
        "weight dtype",
        "weight vector",
        "weight empty",
        "weight too long",
        "scale shape",
        "scale dtype",
        "scale negative",
        "scale infinite",
        "bias shape",
        "bias nan",
    ],
)
def test_bad_parts(
    parts: dict[str, Tensor], changes: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Int8Linear(**{**parts, **changes})


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_float_weight_that_is_not_finite(value: float) -> None:
    weight = torch.randn(5, 7)
    weight[1, 2] = weight[3, 4] = value
    with pytest.raises(ValueError, match=r"`weight` must be finite, got .* in 2 of its rows \(5"):
        Int8Linear.from_float(weight)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 4), (3, 0)], ids=str)
def test_a_float_weight_that_is_no_matrix(shape: tuple[int, ...]) -> None:
    message = re.escape("`weight` must be a matrix [out_features, in_features] that is not empty")
    with pytest.raises(ValueError, match=f"{message}, got shape {re.escape(str(list(shape)))}"):
        Int8Linear.from_float(torch.ones(shape))


@pytest.mark.parametrize(
    ("weight", "bias", "name"),
    [(torch.ones(2, 2).char(), None, "weight"), (torch.ones(2, 2), torch.ones(2).int(), "bias")],
    ids=["weight", "bias"],
)
def test_float_parts_that_are_not_float(weight: Tensor, bias: Tensor | None, name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be a float tensor"):
        Int8Linear.from_float(weight, bias)


# --- Threads and memory ---------------------------------------------------------------------------


def test_threads_get_what_one_gets(layer: Int8Linear) -> None:
    inputs = [torch.randn(tokens, IN_FEATURES) for tokens in (1, 3, 17, 1, 40, 2)]
    expected = [layer(x) for x in inputs]
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(4)

    def run(thread: int) -> None:
        start.wait()
        results[thread] = [layer(x) for _ in range(20) for x in inputs]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(results, dict.fromkeys(range(4), expected * 20), rtol=0, atol=0)


MEMORY_PROGRAM = """
import gc, os, sys, torch
from haq.int8 import matmul
from haq.nn import Int8Linear

def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
x = torch.randn(1, 8192)
with matmul.use_backend(sys.argv[1]):
    Int8Linear.from_float(torch.randn(64, 8192))(x)  # whatever is allocated once
    before = resident_bytes()
    layer = Int8Linear.from_float(torch.randn(8192, 8192))  # 64 MiB of int8
    layer(x)
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_exists_once(backend: str) -> None:
    command = [sys.executable, "-c", MEMORY_PROGRAM, backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weight_bytes = 8192 * 8192
    assert 0.9 * weight_bytes < int(done.stdout) < 1.5 * weight_bytes

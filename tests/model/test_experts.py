"""Fused experts taken apart, compared with `transformers` itself; and what stands beside them."""

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from haq.model.experts import (
    Activation,
    ExpertList,
    dense_layers,
    fused_experts,
    input_matrices,
    is_experts,
    is_fused_experts,
    routers,
    routing_matrices,
    unfuse,
    unknown_weights,
)
from tests.architectures import MIXTURES

EXPERTS, HIDDEN, INNER, SLOTS = 5, 32, 20, 2

# `num_experts_per_tok` is called differently in every second family, so all of them are given.
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": SLOTS,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LOCAL = {"num_local_experts": EXPERTS}
_ROUTED = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}
_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": INNER}

# The module of `transformers`, the prefix of its classes, and what its configuration is given.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "Mixtral", _LOCAL),
    "qwen2-moe": ("qwen2_moe", "Qwen2Moe", _QWEN | {"shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("qwen3_moe", "Qwen3Moe", _QWEN | {"head_dim": 8}),
    "olmoe": ("olmoe", "Olmoe", {"num_experts": EXPERTS}),
    "phimoe": ("phimoe", "Phimoe", _LOCAL),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2", _ROUTED),
    "deepseek-v3": (
        "deepseek_v3",
        "DeepseekV3",
        _ROUTED | {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    ),
    # Transposed, interleaved, with biases, and a gate that is cut off: here where it bites.
    "gpt-oss": ("gpt_oss", "GptOss", _LOCAL | {"head_dim": 8, "swiglu_limit": 1.4}),
    "granitemoe": ("granitemoe", "GraniteMoe", _LOCAL),
    "jamba": (
        "jamba",
        "Jamba",
        {
            "num_experts": EXPERTS,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    # Experts without a gate.
    "nemotron-h": ("nemotron_h", "NemotronH", _ROUTED),
    # Experts that read fewer channels than the block has.
    "nemotron-h-latent": ("nemotron_h", "NemotronH", _ROUTED | {"moe_latent_size": 12}),
}


def config_of(family: str) -> Any:
    _, prefix, options = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(_COMMON | options))
    config._experts_implementation = "eager"
    return config


def fused(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The experts module of a family with random weights, two thirds of its gates open."""
    folder, prefix, _ = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    experts: nn.Module = getattr(module, f"{prefix}Experts")(config_of(family))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype).requires_grad_(False)


def width(experts: nn.Module) -> int:
    """How many channels experts read: their own last dimension is another one if transposed."""
    return 12 if getattr(experts.config, "moe_latent_size", None) else HIDDEN


def routed(experts: nn.Module, tokens: int = 9, none: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 inputs, different experts for every token, and weights that do not sum to 1.

    Args:
        experts: whose inputs they are.
        tokens: how many.
        none: this share of the slots has no expert.
    """
    order = torch.rand(tokens, EXPERTS).argsort(-1)[:, :SLOTS]
    order[torch.rand(tokens, SLOTS) < none] = EXPERTS
    hidden = torch.randn(tokens, width(experts), dtype=torch.float64)
    return hidden, order, torch.rand(tokens, SLOTS, dtype=torch.float64)


class ToyExperts(nn.Module):
    """The least that counts as experts. Tests change one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate.relu() * up


def toy(
    *,
    without: tuple[str, ...] = (),
    attributes: dict[str, bool] | None = None,
    **shapes: tuple[int, ...],
) -> nn.Module:
    experts = ToyExperts()
    for name in without:
        delattr(experts, name)
    for name, shape in shapes.items():
        experts.register_parameter(name, nn.Parameter(torch.randn(shape)))
    for name, value in (attributes or {}).items():
        setattr(experts, name, value)
    return experts


def toy_without_gate_function(has_gate: bool) -> nn.Module:
    experts = nn.Module()
    experts.register_parameter("up_proj", nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN)))
    experts.register_parameter("down_proj", nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER)))
    experts.has_gate, experts.act_fn = has_gate, torch.relu
    return experts


def llama4_experts() -> nn.Module:
    """They take no index: tokens arrive sorted, and already multiplied by the router's weights."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    return Llama4TextExperts(transformers.Llama4TextConfig(**_COMMON, **_LOCAL))


# --- What is known and what is not ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_family_are_known(family: str) -> None:
    experts = fused(family)
    assert is_fused_experts(experts)
    assert is_experts(experts)


@pytest.mark.parametrize("has_gate", [True, False])
def test_what_the_refused_ones_differ_from(has_gate: bool) -> None:
    assert is_fused_experts(ToyExperts() if has_gate else toy_without_gate_function(False))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(HIDDEN, INNER),
        lambda: toy(attributes={"has_post_expert_norm": True}),
        lambda: toy(scale=(EXPERTS,)),
        lambda: toy(up_proj_bias=(EXPERTS, INNER)),
        lambda: toy(up_proj=(EXPERTS, INNER, HIDDEN)),
        lambda: toy(without=("down_proj",)),
        lambda: toy(without=("gate_up_proj",)),
        lambda: toy(gate_up_proj=(EXPERTS, HIDDEN)),
        lambda: toy(down_proj=(EXPERTS, INNER)),
        lambda: toy(gate_up_proj=(EXPERTS + 1, 2 * INNER, HIDDEN)),
        lambda: toy_without_gate_function(True),
        llama4_experts,
        lambda: unfuse(ToyExperts()),
    ],
    ids=[
        "a linear",
        "post expert norm",
        "unknown parameter",
        "bias of another matrix",
        "two first matrices",
        "no down",
        "no up",
        "up 2-D",
        "down 2-D",
        "two numbers of experts",
        "no gate function",
        "llama4",
        "unfused",
    ],
)
def test_what_is_not_known_is_refused(build: Callable[[], nn.Module]) -> None:
    assert not is_fused_experts(build())


def test_a_family_with_a_norm_after_each_expert_is_refused() -> None:
    folder = "transformers.models.muse_spark"
    pytest.importorskip(folder, reason="this transformers is older")
    configuration = importlib.import_module(f"{folder}.configuration_muse_spark")
    modeling = importlib.import_module(f"{folder}.modeling_muse_spark")
    options = _COMMON | _LOCAL | {"moe_hidden_size": HIDDEN, "moe_intermediate_size": INNER}
    experts = modeling.MuseSparkExperts(configuration.MuseSparkTextConfig(**options))
    assert {"gate_up_proj", "down_proj"} < dict(experts.named_parameters()).keys()
    assert not is_fused_experts(experts)


def test_experts_of_a_block_by_name() -> None:
    block = nn.ModuleDict({"first": ToyExperts(), "other": nn.Linear(2, 2), "last": ToyExperts()})
    assert fused_experts(block) == {"first": block["first"], "last": block["last"]}
    block["first"] = unfuse(block["first"])
    assert fused_experts(block) == {"last": block["last"]}
    assert is_experts(block["first"])
    assert not is_experts(block["other"])


# --- Unfused --------------------------------------------------------------------------------------


def assert_computes_the_same(experts: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    """Unfused experts against the ways in which `transformers` computes; returns the result."""
    result: Tensor = unfuse(experts)(*given)
    if experts.config._experts_implementation != "grouped_mm":
        # float64; sums are taken in another order.
        torch.testing.assert_close(result, experts(*given), rtol=1e-12, atol=1e-12)
    else:
        # torch has no grouped product in float64 on the CPU. In float32 about 30 terms of up to 20
        # are rounded to 1e-6 each.
        hidden, index, weights = given
        expected = experts.float()(hidden.float(), index, weights.float())
        torch.testing.assert_close(result.float(), expected, rtol=1e-5, atol=1e-4)
    return result


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_compute_what_transformers_does(family: str, implementation: str) -> None:
    experts = fused(family)
    experts.config._experts_implementation = implementation
    result = assert_computes_the_same(experts, routed(experts))
    assert result.std() > 1  # Nothing that a tolerance of 1e-4 would hide.


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_without_expert_adds_nothing(family: str, implementation: str) -> None:
    experts = fused(family)
    experts.config._experts_implementation = implementation
    experts._is_expert_parallel = True  # Only then does `transformers` look for such slots.
    hidden, index, weights = routed(experts, tokens=12, none=0.4)
    assert 0 < (index == EXPERTS).sum() < index.numel()
    index[3] = EXPERTS
    result = assert_computes_the_same(experts, (hidden, index, weights))
    assert not result[3].any()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    experts = fused("mixtral")
    given = routed(experts, tokens)
    torch.testing.assert_close(unfuse(experts)(*given), experts(*given), rtol=1e-12, atol=1e-12)


def test_one_expert_in_two_slots_counts_twice() -> None:
    experts = fused("mixtral")
    hidden, index, _ = routed(experts, tokens=3)
    index[:] = index[:, :1]
    weights = torch.tensor([[0.25, 0.5]], dtype=torch.float64).expand(3, 2)
    expected = experts(hidden, index[:, :1], torch.full((3, 1), 0.75, dtype=torch.float64))
    torch.testing.assert_close(
        unfuse(experts)(hidden, index, weights), expected, rtol=1e-12, atol=1e-12
    )


def test_the_result_has_the_dtype_of_the_hidden_states() -> None:
    experts = fused("mixtral", torch.bfloat16)
    hidden, index, weights = routed(experts)
    hidden = hidden.bfloat16()
    # Routers give float32 weights in models of 16 bits.
    result = unfuse(experts)(hidden, index, weights.float())
    assert result.dtype == torch.bfloat16
    expected = experts.double()(hidden.double(), index, weights)
    # Numbers of up to 50 with 8 bits, rounded after every step.
    torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_own_their_memory(family: str) -> None:
    experts = fused(family)
    before = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    parameters = list(unfuse(experts).parameters())
    storages = [parameter.untyped_storage() for parameter in parameters]
    # One storage each, no larger than what is in it: an expert that goes frees all that it takes.
    sizes = [parameter.numel() * parameter.itemsize for parameter in parameters]
    assert [storage.nbytes() for storage in storages] == sizes
    storages += [parameter.untyped_storage() for parameter in experts.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for parameter in parameters:
        parameter.zero_()
    torch.testing.assert_close(dict(experts.named_parameters()), before, rtol=0, atol=0)


def test_an_expert_that_is_replaced_is_freed() -> None:
    experts = unfuse(fused("mixtral"))
    weight = weakref.ref(experts.expert(1).down.weight)
    experts[1] = nn.Identity()
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_dtype_of_the_unfused_weights(family: str, dtype: torch.dtype | None) -> None:
    experts = fused(family, torch.bfloat16)
    made = unfuse(experts, dtype)
    assert {p.dtype for p in made.parameters()} == {dtype or torch.bfloat16}
    # Into float32 and back: bfloat16 loses nothing.
    assert experts.down_proj.dtype == torch.bfloat16
    back = made.double()
    given = routed(experts)
    torch.testing.assert_close(back(*given), experts.double()(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "up_name", "up_rows", "channels", "biases"),
    [
        ("mixtral", "gate_up_proj", 2 * INNER, HIDDEN, False),
        ("gpt-oss", "gate_up_proj", 2 * INNER, HIDDEN, True),
        ("nemotron-h-latent", "up_proj", INNER, 12, False),
    ],
)
def test_names_and_shapes(
    family: str, up_name: str, up_rows: int, channels: int, biases: bool
) -> None:
    experts = unfuse(fused(family))
    expected = {f"{up_name}.weight": [up_rows, channels], "down_proj.weight": [channels, INNER]}
    if biases:
        expected |= {f"{up_name}.bias": [up_rows], "down_proj.bias": [channels]}
    assert len(experts) == len(experts.experts) == EXPERTS
    last = experts.expert(EXPERTS - 1)
    assert last is experts.experts[-1]
    assert {name: list(p.shape) for name, p in last.named_parameters()} == expected
    assert all(p.is_contiguous() and not p.requires_grad for p in last.parameters())
    assert (last.up_name, last.up) == (up_name, last.get_submodule(up_name))
    assert last.down is last.down_proj
    assert (last.up.in_features, last.up.out_features) == (channels, up_rows)
    assert (last.down.in_features, last.down.out_features) == (INNER, channels)


# --- What lies between the two matrices -----------------------------------------------------------


def gated(experts: nn.Module, x: Tensor) -> Tensor:
    """What `transformers` itself computes."""
    result: Tensor = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    return result


@pytest.mark.parametrize("duplicate", [lambda a: a, copy.deepcopy, lambda a: through_pickle(a)])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_the_familys_own(
    family: str, duplicate: Callable[[Activation], Activation]
) -> None:
    experts = fused(family)
    x = 3 * torch.randn(7, 2 * INNER if experts.has_gate else INNER)
    activation = duplicate(Activation(experts))
    expected = gated(experts, x)
    assert expected.shape == (7, INNER)
    torch.testing.assert_close(activation(x), expected, rtol=0, atol=0)


def through_pickle(activation: Activation) -> Activation:
    loaded: Activation = pickle.loads(pickle.dumps(activation))
    return loaded


def test_activation_of_gpt_oss_in_numbers() -> None:
    """Gate and up interleaved, both cut off at 1.4: (up + 1) gate sigmoid(1.702 gate)."""
    activation = Activation(fused("gpt-oss"))
    x = torch.tensor([[9.0, 9.0, 0.5, -0.25, -1.0, -9.0]], dtype=torch.float64)
    gate = torch.tensor([1.4, 0.5, -1.0], dtype=torch.float64)
    up = torch.tensor([1.4, -0.25, -1.4], dtype=torch.float64)
    expected = (up + 1) * gate / (1 + (-1.702 * gate).exp())
    torch.testing.assert_close(activation(x), expected[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_holds_no_weights(family: str) -> None:
    experts = fused(family)
    names = [name for name, _ in experts.named_parameters()]
    weights = [weakref.ref(parameter) for parameter in experts.parameters()]
    activation = Activation(experts)
    assert [name for name, _ in experts.named_parameters()] == names  # The original keeps its own.
    del experts
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)
    # Nor does it keep them in its pickle: of 5 * 32 * 20 numbers of 8 bytes there is no trace.
    assert len(pickle.dumps(activation)) < 16_000


# --- What stands beside the experts ---------------------------------------------------------------

_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


def block_of(family: str, layer: int = 0) -> nn.Module:
    _, prefix, _ = FAMILIES[family]
    return decoder_block(prefix, config_of(family), layer)


def decoder_block(prefix: str, config: Any, layer: int = 0) -> nn.Module:
    block = getattr(transformers, f"{prefix}Model")(config).layers[layer]
    assert isinstance(block, nn.Module)
    return block


def hunyuan_block() -> nn.Module:
    options = _COMMON | {"num_experts": EXPERTS, "moe_topk": SLOTS, "head_dim": 8}
    return decoder_block("HunYuanMoEV1", transformers.HunYuanMoEV1Config(**options))


def gemma4_block() -> nn.Module:
    """Experts and router stand in the block itself, beside attention and a dense MLP."""
    pytest.importorskip("transformers.models.gemma4", reason="this transformers is older")
    options = _COMMON | {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": SLOTS,
        "moe_intermediate_size": INNER,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
    }
    return decoder_block("Gemma4Text", transformers.Gemma4TextConfig(**options))


BESIDE: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "mixtral": (lambda: block_of("mixtral"), ["mlp.gate"], _ATTENTION),
    "qwen2-moe": (
        lambda: block_of("qwen2-moe"),
        ["mlp.gate", "mlp.shared_expert_gate"],
        [*_ATTENTION, *(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down"))],
    ),
    "gpt-oss": (lambda: block_of("gpt-oss"), ["mlp.router"], _ATTENTION),
    "granitemoe": (
        lambda: block_of("granitemoe"),
        ["block_sparse_moe.router"],
        _ATTENTION,
    ),
    # Its gate is a module with an ordinary linear in it.
    "hunyuan": (
        hunyuan_block,
        ["mlp.gate"],
        [*_ATTENTION, *(f"mlp.shared_mlp.{x}_proj" for x in ("gate", "up", "down"))],
    ),
    "jamba-mamba": (
        lambda: block_of("jamba", 0),
        ["feed_forward.router"],
        [f"mamba.{x}_proj" for x in ("in", "x", "dt", "out")],
    ),
    "jamba-attention": (lambda: block_of("jamba", 1), ["feed_forward.router"], _ATTENTION),
    "gemma4": (
        gemma4_block,
        ["router"],
        [*_ATTENTION, *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))],
    ),
    "a dense model": (
        lambda: decoder_block("Llama", transformers.LlamaConfig(**_COMMON)),
        [],
        [*_ATTENTION, *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))],
    ),
}


def unfused(block: nn.Module) -> nn.Module:
    """The block with its experts one by one."""
    for name, experts in fused_experts(block).items():
        block.set_submodule(name, unfuse(experts))
    return block


@pytest.mark.parametrize("form", [lambda block: block, unfused], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", BESIDE)
def test_routers_and_dense_layers(family: str, form: Callable[[nn.Module], nn.Module]) -> None:
    build, expected_routers, expected_dense = BESIDE[family]
    block = form(build())
    found = routers(block)
    assert list(found) == expected_routers
    assert all(module is block.get_submodule(name) for name, module in found.items())
    assert sorted(dense_layers(block)) == sorted(expected_dense)
    assert all(m is block.get_submodule(name) for name, m in dense_layers(block).items())


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2-moe", ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]),
        ("gpt-oss", ["mlp.router.weight"]),  # Not its bias.
        ("hunyuan", ["mlp.gate.wg.weight"]),
        ("gemma4", ["router.proj.weight"]),  # Not its scales.
    ],
)
def test_routing_matrices(family: str, expected: list[str]) -> None:
    block = BESIDE[family][0]()
    matrices = routing_matrices(block)
    assert len(matrices) == len(expected)
    pairs = zip(matrices, expected, strict=True)
    assert all(matrix is block.get_parameter(name) for matrix, name in pairs)


@pytest.mark.parametrize("form", [lambda block: block, unfused], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", [name for name in BESIDE if name != "jamba-mamba"])
def test_nothing_is_unknown(family: str, form: Callable[[nn.Module], nn.Module]) -> None:
    assert unknown_weights(form(BESIDE[family][0]())) == {}


def test_what_is_unknown_in_mamba() -> None:
    # 64 channels inside, 16 numbers of state, a convolution over 4 tokens.
    assert unknown_weights(block_of("jamba", 0)) == {
        "mamba.A_log": torch.Size([64, 16]),
        "mamba.conv1d.weight": torch.Size([64, 1, 4]),
    }


def test_experts_that_are_refused_are_unknown_and_so_is_their_router() -> None:
    block = nn.ModuleDict({"experts": toy(scale=(EXPERTS,)), "gate": nn.Linear(HIDDEN, EXPERTS)})
    block.register_parameter("table", nn.Parameter(torch.randn(3, 4)))
    assert unknown_weights(block) == {
        "table": torch.Size([3, 4]),
        "experts.gate_up_proj": torch.Size([EXPERTS, 2 * INNER, HIDDEN]),
        "experts.down_proj": torch.Size([EXPERTS, HIDDEN, INNER]),
    }
    assert routers(block) == {}


# --- What multiplies an input ---------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda experts: experts, unfuse], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_input_matrices_of_experts_absorb_a_scale(
    family: str, form: Callable[[nn.Module], nn.Module]
) -> None:
    experts = form(fused(family))
    hidden, index, weights = routed(fused(family))
    before = experts(hidden, index, weights)
    scale = torch.rand(hidden.shape[1], dtype=torch.float64) + 0.5
    matrices = input_matrices(experts)
    assert len(matrices) == EXPERTS
    for matrix in matrices:
        matrix.mul_(scale)
    after = experts(hidden / scale, index, weights)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(HIDDEN, INNER),
        lambda: Conv1D(INNER, HIDDEN),
        lambda: routers(hunyuan_block())["mlp.gate"],
        lambda: routers(block_of("gpt-oss"))["mlp.router"],
    ],
    ids=["linear", "Conv1D", "hunyuan", "gpt-oss"],
)
def test_input_matrices_of_other_modules_absorb_a_scale(build: Callable[[], nn.Module]) -> None:
    module = build().double().requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    hidden = torch.randn(9, HIDDEN, dtype=torch.float64)
    before = module(hidden)
    scale = torch.rand(HIDDEN, dtype=torch.float64) + 0.5
    (matrix,) = input_matrices(module)
    matrix.mul_(scale)
    after = module(hidden / scale)
    # Routers take a softmax in float32, whatever they are given.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert isinstance(matrix, Tensor)
    assert matrix.shape[1] == HIDDEN


def test_an_expert_list_can_be_pickled() -> None:
    experts = unfuse(fused("gpt-oss"))
    given = routed(fused("gpt-oss"))
    loaded = pickle.loads(pickle.dumps(experts))
    assert isinstance(loaded, ExpertList)
    torch.testing.assert_close(loaded(*given), experts(*given), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_that_are_used_up_leave_their_shapes(family: str) -> None:
    kept, used = (
        next(m for m in MIXTURES[family]().modules() if is_fused_experts(m)) for _ in range(2)
    )
    used.load_state_dict(kept.state_dict())
    expected, found = unfuse(kept, torch.float32), unfuse(used, torch.float32, use_up=True)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, parameter in kept.named_parameters():
        left = used.get_parameter(name)
        if not name.endswith("_bias"):
            assert left.is_meta
        assert (left.shape, left.dtype) == (parameter.shape, parameter.dtype)
        assert not parameter.is_meta

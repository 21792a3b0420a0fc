"""Which weights of a block haq would leave in float because nothing knows what they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from haq.model.experts import unfuse, unknown_weights

EXPERTS, CHANNELS, ROWS = 3, 2, 4


class Adapter(nn.Linear):
    """Adds to what a linear computes, as LoRA does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.sum()


def experts() -> nn.Module:
    config = MixtralConfig(hidden_size=CHANNELS, intermediate_size=ROWS, num_local_experts=EXPERTS)
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


class Mixture(nn.Module):
    """A router and what it chooses from."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts()


def test_matrices_that_no_linear_owns_are_named() -> None:
    block = nn.Module()
    block.linear = nn.Linear(2, 3)
    block.norm = nn.LayerNorm(2)
    block.adapter = Adapter(2, 4, bias=False)
    block.experts = nn.Module()
    block.experts.gate_up = nn.Parameter(torch.ones(4, 2, 3))
    block.experts.bias = nn.Parameter(torch.ones(4))
    assert unknown_weights(block) == {"adapter.weight": (4, 2), "experts.gate_up": (4, 2, 3)}


def test_a_weight_shared_with_a_linear_is_known() -> None:
    block = nn.Module()
    block.linear = nn.Linear(2, 3)
    block.alias = block.linear.weight
    assert unknown_weights(block) == {}


def matrix(rows: int) -> nn.Module:
    """A router of transformers 5: a parameter in a module of its own, no linear."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(rows, CHANNELS))
    return module


@pytest.mark.parametrize("rows", [EXPERTS, 1], ids=["one number for each expert", "one number"])
def test_experts_and_what_decides_over_them_are_known(rows: int) -> None:
    block = nn.ModuleDict({"mlp": Mixture(matrix(rows))})
    assert unknown_weights(block) == {}
    block["mlp"].experts = unfuse(block["mlp"].experts)
    assert unknown_weights(block) == {}


def test_other_matrices_beside_experts_are_not_routers() -> None:
    assert unknown_weights(Mixture(matrix(EXPERTS + 1))) == {"router.weight": (4, CHANNELS)}


def test_the_same_matrix_without_experts_beside_it_is_no_router() -> None:
    block = nn.ModuleDict({"mlp": Mixture(matrix(EXPERTS)), "router": matrix(EXPERTS)})
    assert unknown_weights(block) == {"router.weight": (EXPERTS, CHANNELS)}


def add_a_norm(module: nn.Module) -> None:
    module.has_post_expert_norm = True


def add_a_parameter(module: nn.Module) -> None:
    module.scales = nn.Parameter(torch.ones(EXPERTS))


def drop_a_dimension(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(module.down_proj[:, :, 0])


def drop_an_expert(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(module.down_proj[1:])


def hide_the_gate(module: nn.Module) -> None:
    """As Llama 4 has it: the gate is in the forward, where nothing can call it."""

    class Other(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    module.__class__ = Other


@pytest.mark.parametrize(
    "change", [add_a_norm, add_a_parameter, drop_a_dimension, drop_an_expert, hide_the_gate]
)
def test_experts_that_compute_something_else_are_unknown_and_so_is_their_router(
    change: Callable[[nn.Module], None],
) -> None:
    block = Mixture(matrix(EXPERTS))
    change(block.experts)
    assert unknown_weights(block) == {
        name: parameter.shape
        for name, parameter in block.named_parameters()
        if "scales" not in name
    }


def test_nothing_in_a_mixtral_is_unknown(tiny_mixtral: Callable[..., PreTrainedModel]) -> None:
    model = tiny_mixtral()
    assert [unknown_weights(block) for block in model.model.layers] == [{}, {}]

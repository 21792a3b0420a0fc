"""Models and blocks small enough to say by hand what must be found in them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from haq.model.blocks import BlockBatch, BlockCall
from tests.architectures import VOCABULARY

HIDDEN = 8
INNER = 12
EXPERTS = 4


class Residual(nn.Module):
    """``hidden + fc2(activation(fc1(norm(hidden))))``, the shape of every MLP."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor] = torch.relu, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, INNER)
        self.fc2 = nn.Linear(INNER, hidden)
        self.activation = activation
        for vector in (self.norm.weight, self.norm.bias):
            nn.init.normal_(vector)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.fc2(self.activation(self.fc1(self.norm(hidden_states))))


class OnePlusNorm(nn.Module):
    """Gemma's norm: multiplies by 1 + w."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


class Normed(nn.Module):
    """``hidden + fc(norm(hidden))``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.fc = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.fc(self.norm(hidden_states))


class Fused(nn.Module):
    """A gated MLP with gate and up in one matrix; ``split`` takes them apart."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.split = split
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.split(self.gate_up(hidden_states))
        return hidden_states + self.down(functional.silu(gate) * up)


def fused_experts() -> nn.Module:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


class Router(nn.Module):
    """Takes the two best; has a matrix that reads something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.other = nn.Parameter(torch.randn(1, EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = x @ self.weight.T
        weights, index = (scores * self.other.tanh()).softmax(-1).topk(2)
        return weights, index


class Mixture(nn.Module):
    """``hidden + experts(x) + shared(x)`` with ``x = norm(hidden)``; ``form`` of the experts."""

    def __init__(self, form: Callable[[nn.Module], nn.Module] = lambda experts: experts) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.router = Router()
        self.experts = form(fused_experts())
        self.shared = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states).view(-1, HIDDEN)
        weights, index = self.router(x)
        return hidden_states + (self.experts(x, index, weights) + self.shared(x)).view_as(
            hidden_states
        )


class ToyConfig(PreTrainedConfig):
    model_type = "toy"


class ToyModel(PreTrainedModel):
    """Embeddings, blocks and nothing else. ``between`` is applied to what goes from block to block,
    ``run`` says how many of the blocks are called."""

    config_class = ToyConfig
    _no_split_modules = ("Residual",)

    def __init__(
        self,
        *,
        blocks: int = 2,
        run: int | None = None,
        between: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    ) -> None:
        super().__init__(ToyConfig())
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.run = blocks if run is None else run
        self.between = between

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Tensor:
        hidden = self.embed(input_ids)
        for index, block in enumerate(list(self.blocks)[: self.run]):
            hidden = block(self.between(hidden) if index else hidden)
        return hidden


def batch_of(hidden: Tensor, mask: Tensor | None = None) -> BlockBatch:
    """What a block is given that takes nothing but hidden states ``[B, T, D]``."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
    return BlockBatch(hidden, BlockCall((), {}), mask)

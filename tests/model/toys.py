"""Models and blocks small enough to say by hand what must be found in them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from haq.model.blocks import BlockBatch, BlockCall
from tests.architectures import VOCABULARY

HIDDEN = 8
INNER = 12


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

"""Held-out perplexity of a causal language model, and of a unigram model beside it."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 256


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Tokenize the texts joined into one; returns [N] int64."""
    return torch.tensor(tokenizer("".join(texts), verbose=False)["input_ids"])


def windows(ids: Tensor) -> Tensor:
    """Cut [N] int64 into [N // 256, 256] int64 without overlap, dropping the rest."""
    count = len(ids) // WINDOW
    return ids[: count * WINDOW].view(count, WINDOW)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, batch: int = 16) -> float:
    """Perplexity of tokens 1..255 of every window of ids ([N] int64), in float32."""
    model.eval()
    total, count = 0.0, 0
    for rows in windows(ids).split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        targets = rows[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        total, count = total + loss.item(), count + targets.numel()
    return math.exp(total / count)


def unigram_perplexity(train_ids: Tensor, ids: Tensor, vocabulary: int) -> float:
    """Perplexity, on the same tokens, of add-one smoothed frequencies of train_ids ([M] int64)."""
    counts = torch.bincount(train_ids, minlength=vocabulary).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(-log_probabilities[windows(ids)[:, 1:]].mean().item())


@torch.no_grad()
def expert_shares(model: PreTrainedModel, ids: Tensor, batch: int = 16) -> Tensor:
    """Share of the routed tokens that each expert gets on ids ([N] int64); [layers, experts]."""
    model.eval()
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for rows in windows(ids).split(batch):
        routers = model(input_ids=rows, use_cache=False, output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=counts.shape[1])
    return counts / counts.sum(dim=1, keepdim=True)

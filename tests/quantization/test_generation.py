"""`generate` of int8 models, dense ones and mixtures of experts: every way of decoding."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.architectures import ARCHITECTURES, MIXTURES, token_ids
from tests.quantization import test_mixtures, test_pipeline
from tests.quantization.test_pipeline import logits_of

MODELS = [*ARCHITECTURES, *MIXTURES]


def quantized(name: str) -> PreTrainedModel:
    """Made once for all test files; to be looked at and called only."""
    source = test_pipeline if name in ARCHITECTURES else test_mixtures
    return source.quantized(name)


NEW_TOKENS = 6


def greedy_without_cache(model: PreTrainedModel, ids: Tensor) -> Tensor:
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_is_the_argmax_of_each_step(name: str) -> None:
    model, ids = quantized(name), token_ids(2, 12)
    generated = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(generated, greedy_without_cache(model, ids))


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_does_not_change_what_is_generated(name: str) -> None:
    model = quantized(name)
    prompts = [token_ids(1, 12, seed=1), token_ids(1, 7, seed=2), token_ids(1, 1, seed=3)]
    padded = torch.cat([nn.functional.pad(ids, (12 - ids.shape[1], 0)) for ids in prompts])
    mask = (padded != 0).long()
    together = model.generate(
        padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    for row, ids in zip(together, prompts, strict=True):
        alone = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(row[-alone.shape[1] :], alone[0])


@pytest.mark.parametrize("name", MODELS)
def test_sampling_follows_the_seed(name: str) -> None:
    model, ids = quantized(name), token_ids(2, 5)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("name", MODELS)
def test_beam_search_scores_are_those_of_the_sequences(name: str) -> None:
    model, ids = quantized(name), token_ids(2, 5)
    found = model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    log_probabilities = logits_of(model, found.sequences).log_softmax(-1)[:, 4:-1]
    chosen = log_probabilities.gather(-1, found.sequences[:, 5:, None])[..., 0]
    assert chosen.shape == (2, NEW_TOKENS)
    # The cached keys and values of beams that were reordered, against none.
    torch.testing.assert_close(found.sequences_scores, chosen.sum(1), rtol=1e-2, atol=1e-2)

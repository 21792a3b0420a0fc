"""Steps of decoding that a CUDA graph can hold: what tests of them share."""

import functools

from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from haq import QuantizationConfig, quantize_model
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids, with_cache

PROMPT = 5


@functools.cache
def int8_model(name: str) -> PreTrainedModel:
    """As on a CPU: not to be called, but copied to where the kernels run."""
    config = QuantizationConfig(smoothing="none", rounding="nearest", search_tokens=64)
    model = (ARCHITECTURES | MIXTURES)[name]()
    return quantize_model(model, [token_ids(2, 32)], config, progress=False)


class Decoder:
    """Steps of one token of each of two texts, with a cache whose size is fixed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=16)
        prompt = token_ids(2, PROMPT, seed=3).to(model.device)
        model(prompt, **with_cache(model, self.cache))

    def __call__(self, token: Tensor) -> Tensor:
        logits: Tensor = self.model(token, **with_cache(self.model, self.cache)).logits
        return logits

    def reset(self) -> None:
        """Back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)

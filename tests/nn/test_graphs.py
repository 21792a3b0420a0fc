"""CUDA graphs of whole models, on a GPU; `interpreted_graphs.py` shows what a CPU can show."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from haq.nn import fuse_norms
from tests.architectures import token_ids
from tests.nn.decoding import Decoder, int8_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def captured(step: Decoder, token: Tensor) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(token)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token)
    return lambda: (graph.replay(), logits.clone())[1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen2-moe"])
def test_a_graph_follows_its_tokens(name: str) -> None:
    """Each token of two texts chooses experts of its own."""
    tokens = [token_ids(2, 1, seed=seed).cuda() for seed in range(4, 10)]
    with torch.no_grad():
        model = copy.deepcopy(int8_model(name)).cuda()
        fuse_norms(model)
        step = Decoder(model)
        for _ in range(2):  # Norms learn who reads them.
            step.reset()
            expected = [step(token).clone() for token in tokens]
        token = torch.empty_like(tokens[0]).copy_(tokens[0])
        step.reset()
        replay = captured(step, token)
        step.reset()
        for given, logits in zip(tokens, expected, strict=True):
            token.copy_(given)
            torch.testing.assert_close(replay(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_compiler_makes_graphs(name: str) -> None:
    tokens = [token_ids(2, 1, seed=seed).cuda() for seed in range(4, 8)]
    with torch.no_grad():
        model = copy.deepcopy(int8_model(name)).cuda()
        step = Decoder(model)
        expected = [step(token).clone() for token in tokens]
        model.forward = torch.compile(model.forward, mode="reduce-overhead")
        for _ in range(2):
            step.reset()
            for token, logits in zip(tokens, expected, strict=True):
                torch.testing.assert_close(step(token).clone(), logits, rtol=1e-2, atol=1e-2)

"""Whole models on a GPU: a step of decoding as a CUDA graph; a block made int8. For `gpu.py`."""

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import CALLS_PER_SAMPLE, Run, measure
from shapes import bytes_per_token, cache_argument, int8_copy
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import haq
from haq.nn import fuse_norms

VOCABULARY = 32000
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTRAL_BLOCK: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}
MIXTRAL_LAYERS = 32

PROMPT, CACHE = 128, 256
DECODE_BATCHES = [1, 16]

# What a block is calibrated with: an eighth of the default, for the sake of time.
SAMPLES, LENGTH = 16, 2048


class Step:
    """One token for each of some texts after a prompt, with a cache of a fixed size.

    Args:
        model: on its device.
        batch: how many texts.

    Attributes:
        token: int64 ``[B, 1]``, what is read; to be written to.
    """

    def __init__(self, model: PreTrainedModel, batch: int = 1) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self._filled = {cache_argument(model): self.cache}
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(VOCABULARY, (batch, PROMPT), generator=generator).to(model.device)
        self.token = prompt[:, -1:].clone()
        model(prompt, **self._filled, logits_to_keep=1)

    def __call__(self) -> Tensor:
        logits: Tensor = self.model(self.token, **self._filled).logits
        return logits

    def reset(self) -> None:
        """Back to the end of the prompt: a step moves on, in a graph, too."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def logits(self, tokens: list[int], run: Callable[[], Tensor]) -> Tensor:
        """Of several steps from the end of the prompt, one after the other."""
        self.reset()
        results = []
        for token in tokens:
            self.token.fill_(token)
            results.append(run().clone())
        return torch.stack(results)


def captured(step: Step) -> Callable[[], Tensor]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # They measure, compile, allocate and learn.
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def models(device: torch.device, shape: dict[str, Any]) -> dict[str, PreTrainedModel]:
    """The same random model in bfloat16 and in int8, with fused norms."""
    config = LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=2048)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    int8 = int8_copy(model)
    fuse_norms(int8)
    return {"bf16": model, "int8": int8}


STEPS = [7, 11, 5]


def check_steps(some: dict[str, PreTrainedModel]) -> None:
    """A graph gives the logits that single steps give, and int8 nearly those of bfloat16."""
    logits = {}
    for name, model in some.items():
        step = Step(model)
        expected = step.logits(STEPS, step)
        assert not torch.equal(expected[0], expected[1])
        logits[name] = expected.float()
        if expected.is_cuda:
            result = step.logits(STEPS, captured(step))
            # The libraries, whose head and attention both have, may choose other products there.
            torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-6)
            how = ", bit for bit" if torch.equal(result, expected) else " but for their rounding"
            print(f"{name}: a graph gives the logits of single steps{how}")
    error = (logits["int8"] - logits["bf16"]).norm() / logits["bf16"].norm()
    assert error < 0.15, f"int8 is {error:.1%} off"
    print(f"int8 is {error:.1%} off from bfloat16")


def measure_decode(some: dict[str, PreTrainedModel]) -> list[dict[str, Any]]:
    """A token of each text, everything from its number to the logits of the next one."""
    assert 2 * CALLS_PER_SAMPLE <= CACHE - PROMPT
    rows = []
    for batch in DECODE_BATCHES:
        steps = {name: Step(model, batch) for name, model in some.items()}
        calls: dict[str, list[Run]] = {name: [step] for name, step in steps.items()}
        size = {name: bytes_per_token(model) for name, model in some.items()}

        def reset(steps: dict[str, Step] = steps) -> None:
            for step in steps.values():
                step.reset()

        labels = {"what": "a step of 8 layers of Llama", "tokens": batch}
        rows.append(measure(labels, calls, size, reset))
    return rows


def check_compiled(device: torch.device) -> None:
    """`torch.compile` with CUDA graphs; without them, and without its own kernels, on a CPU."""
    model = models(device, TINY_LLAMA)["int8"]
    step = Step(model)
    expected = step.logits(STEPS, step)
    how: dict[str, Any] = {"mode": "reduce-overhead"}
    if device.type == "cpu":
        how = {"backend": "aot_eager"}
    forward = model.forward
    model.forward = torch.compile(forward, **how)
    step.logits(STEPS, step)  # Graphs are captured in the second call of a shape.
    result = step.logits(STEPS, step)
    model.forward = forward
    error = (result - expected).float().norm() / expected.float().norm()
    assert error < 0.03, f"compiled, it is {error:.1%} off"
    print(f"torch.compile({', '.join(f'{k}={v!r}' for k, v in how.items())}): {error:.2%} off\n")


def measure_quantizing() -> list[dict[str, Any]]:
    """A block of Mixtral's shape, as `haq.quantize_model` makes it int8."""
    config = MixtralConfig(**MIXTRAL_BLOCK, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    with torch.device("cuda"):
        model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    size = (1, LENGTH)
    batches = [torch.randint(VOCABULARY, size, generator=generator) for _ in range(SAMPLES)]
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    haq.quantize_model(model.eval(), batches, progress=False)
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    print(
        f"a block of Mixtral, {SAMPLES} x {LENGTH} tokens: int8 in {taken:.1f} s, peak "
        f"{peak / 2**30:.1f} GiB; {MIXTRAL_LAYERS} blocks would take "
        f"{MIXTRAL_LAYERS * taken / 60:.0f} minutes"
    )
    return [
        {
            "what": "quantizing a block of Mixtral",
            "tokens": SAMPLES * LENGTH,
            "seconds": taken,
            "peak_bytes": peak,
            "seconds_of_32_blocks": MIXTRAL_LAYERS * taken,
        }
    ]

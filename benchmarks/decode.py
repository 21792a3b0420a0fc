"""How fast does a Llama-shaped model decode and prefill in int8 beside bfloat16?

Random weights: speed does not depend on them. Decoding is one token after 128, batch 1, bound by
memory; prefill is those 128 tokens at once, bound by arithmetic, with logits for the last one only.
They are asked for by index: for the slice that ``generate`` takes torch copies the whole head
first, which takes either model as long again as everything else. The blocks' linear layers are
int8, embeddings and ``lm_head`` stay bfloat16, as after ``haq.quantize_model``.
"""

import copy
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from haq.int8 import grid
from haq.nn import Int8Linear

PROMPT = 128
CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=32000,
)


class ExactLinear(nn.Module):
    """What Int8Linear stands for: rounded inputs and weights, multiplied in float64."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.scale = grid.quantize_rows(weight)

    def forward(self, x: Tensor) -> Tensor:
        integers, scale = grid.quantize_rows(x)
        sums = F.linear(integers.double(), self.weight.double()).float()
        return (sums * self.scale.view(-1) * scale).to(x.dtype)


def with_linears(model: PreTrainedModel, convert: Callable[[Tensor], nn.Module]) -> PreTrainedModel:
    """A copy whose blocks' linear layers are converted."""
    converted = copy.deepcopy(model)
    for block in converted.model.layers:
        linears = [item for item in block.named_modules() if isinstance(item[1], nn.Linear)]
        for name, linear in linears:
            block.set_submodule(name, convert(linear.weight))
    return converted


def check(model: PreTrainedModel, int8_model: PreTrainedModel, tokens: Tensor) -> None:
    """The same logits, to the last bit, as integers that are multiplied in float64."""
    expected = with_linears(model, ExactLinear)(tokens).logits
    torch.testing.assert_close(int8_model(tokens).logits, expected, rtol=0, atol=0)


def decoder(model: PreTrainedModel, tokens: Tensor) -> harness.Run:
    """One token after the prompt, again and again: the cache is cut back after each."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)

    def step() -> None:
        model(tokens[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return step


def profile(model: PreTrainedModel, tokens: Tensor) -> None:
    """Where the time of a decoding step goes."""
    step = decoder(model, tokens)
    step()
    with torch.profiler.profile() as profiler:
        for _ in range(10):
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def measure(
    model: PreTrainedModel, int8_model: PreTrainedModel, tokens: Tensor, rounds: int
) -> list[dict[str, Any]]:
    works: dict[str, Callable[[PreTrainedModel], harness.Run]] = {
        "decode, 1 token": lambda model: decoder(model, tokens),
        f"prefill, {PROMPT} tokens": lambda model: (
            lambda: model(tokens, logits_to_keep=torch.tensor([PROMPT - 1]))
        ),
    }
    rows = []
    for work, run in works.items():
        runs = {"bf16": run(model), "int8": run(int8_model)}
        timings = harness.time_in_turn(runs, rounds)
        times_faster = timings["int8"].times_faster_than(timings["bf16"])
        times = {name: timing.to_dict() for name, timing in timings.items()}
        rows.append({"work": work, **times, "times_faster": times_faster})
    return rows


def main() -> None:
    options = harness.arguments(__doc__, profile="show what a decoding step spends its time on")
    facts = harness.card()
    harness.print_card(__doc__, facts)
    if options.quick:
        CONFIG.num_hidden_layers = 2
    torch.manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (1, PROMPT))
    with torch.inference_mode():
        model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
        int8_model = with_linears(model, Int8Linear.from_float)
        check(model, int8_model, tokens[:, :16])
        if options.profile:
            profile(int8_model, tokens)
        rows = measure(model, int8_model, tokens, rounds=5 if options.quick else 21)
    print_rows(rows)
    if options.quick:
        return  # Of so few layers, `lm_head` is half.
    targets = [
        harness.target(f"{row['work']}, times bf16", row["times_faster"], at_least)
        for row, at_least in zip(rows, [2.5, 1.6], strict=True)
    ]
    harness.write("decode", facts, rows=rows, targets=targets)


def print_rows(rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            row["work"],
            harness.milliseconds(row["bf16"]),
            harness.milliseconds(row["int8"]),
            f"{row['times_faster']:.2f}",
        ]
        for row in rows
    ]
    harness.print_table(["work", "bf16, ms", "int8, ms", "times"], cells)


if __name__ == "__main__":
    main()

"""How fast are Mixtral's experts in int8 beside each of transformers' implementations in bfloat16?

One layer of the real shape: D 4096, I 14336, 8 experts, 2 for each token: 1.4 GB in int8, more than
any cache holds, so nothing has to be rotated. With one token the layer waits for the weights of two
experts, and the measure is the share of the read bandwidth; with 128 it computes.

Random weights and random routing: speed does not depend on the first, and every expert is chosen.
"""

from typing import Any

import harness
import roofline
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from haq.int8 import grid
from haq.nn import Int8Experts, Int8Linear

HIDDEN, INNER, EXPERTS, CHOSEN = 4096, 14336, 8, 2
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
TOKENS = [1, 4, 16, 128]

# `batched_mm` gathers the weights of every chosen expert for every token: 0.7 GB a token.
MOST_TOKENS = {"batched_mm": 4}


class GatedSilu:
    """What Mixtral computes between the two matrices."""

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def make(hidden: int, inner: int) -> tuple[MixtralExperts, Int8Experts]:
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=EXPERTS)
    with torch.device("meta"):
        experts = MixtralExperts(config).to(torch.bfloat16)
    experts.to_empty(device="cpu")
    up, down = [], []
    for e in range(EXPERTS):
        for parameter, layers, asymmetric in (
            (experts.gate_up_proj, up, False),
            (experts.down_proj, down, True),  # as `haq.quantize_model` chooses for Mixtral
        ):
            weight = 0.02 * torch.randn(parameter.shape[1:])
            parameter.data[e] = weight
            layers.append(Int8Linear.from_float(weight, asymmetric=asymmetric))
    return experts, Int8Experts(up, down, GatedSilu())


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    """Experts and their weights, ``[tokens, 2]``, all experts about equally often."""
    index = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    return index, torch.rand(tokens, CHOSEN).softmax(-1)


def check(experts: Int8Experts, x: Tensor, index: Tensor, weights: Tensor) -> None:
    """The same as the formula in float64, but for the integers that float32 puts beside a tie."""
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for token, chosen in enumerate(index):
        for slot, e in enumerate(chosen):
            up, down = experts.up[e], experts.down[e]
            rounded = grid.fake_quantize_rows(x[token].float()).double()
            middle = experts.activation(rounded @ (up.weight.double() * up.weight_scale).T)
            middle = _round_asymmetrically(middle)
            output = middle @ (down.weight.double() * down.weight_scale).T
            expected[token] += weights[token, slot].double() * output
    error = (experts(x, index, weights).double() - expected).norm() / expected.norm()
    assert error < 5e-3, f"the int8 experts are wrong by {error:.1e}"


def _round_asymmetrically(x: Tensor) -> Tensor:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def measure(
    experts: MixtralExperts, int8: Int8Experts, tokens: int, rounds: int, read: roofline.MemoryRead
) -> dict[str, Any]:
    x = torch.randn(tokens, int8.up[0].in_features).bfloat16()
    index, weights = routing(tokens)
    check(int8, x[:2], index[:2], weights[:2])
    names = [n for n in IMPLEMENTATIONS if tokens <= MOST_TOKENS.get(n, tokens)]

    def with_implementation(name: str) -> harness.Run:
        def run() -> object:
            experts.config._experts_implementation = name
            return experts(x, index, weights.bfloat16())

        return run

    runs: dict[str, harness.Run] = {**read.runs, "int8": lambda: int8(x, index, weights)}
    runs |= {f"bf16 {name}": with_implementation(name) for name in names}
    timings = harness.time_in_turn(runs, rounds)
    touched = len(index.unique())
    elements = touched * sum(layer[0].weight.numel() for layer in (int8.up, int8.down))
    bytes_read = {name: elements if name == "int8" else 2 * elements for name in runs}
    labels = {"tokens": tokens, "experts": touched, "backend": int8.up[0].backend}
    return roofline.row(labels, timings, bytes_read, read)


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    torch.manual_seed(0)
    shape = (512, 1024) if options.quick else (HIDDEN, INNER)
    with torch.inference_mode():
        experts, int8 = make(*shape)
        read = roofline.MemoryRead()
        rounds = 5 if options.quick else 21
        rows = [measure(experts, int8, tokens, rounds, read) for tokens in TOKENS]
    roofline.print_rows(rows)
    if options.quick:
        return  # A small layer says nothing of the real one.
    of = {row["tokens"]: row["runs"]["int8"] for row in rows}
    targets = [
        harness.target("1 token, times the fastest bf16", of[1]["times_bf16"], 3),
        harness.target("128 tokens, times the fastest bf16", of[128]["times_bf16"], 2),
        harness.target("1 token, share of read", of[1]["share_of_roofline"], 0.8),
    ]
    harness.write_speed("experts", facts, shape=list(shape), rows=rows, targets=targets)


if __name__ == "__main__":
    main()

"""How fast do whole models decode and prefill in int8 beside bfloat16, and beside the memory?

Two Llamas and a Mixtral with random weights, batch 1. Decoding is bound by memory: the measure is
the share of the read bandwidth that the weights of a token take. Prefill is bound by arithmetic.
The linear layers and experts of the blocks are int8; embeddings and `lm_head` stay bfloat16, as
after `haq.quantize_model`. In one more row the head is int8 as well, and on processors without
instructions for bfloat16 there is one of float32.

    python benchmarks/decode.py            minutes on 2 cores, and needs a C++ compiler
    python benchmarks/decode.py --eager    without `torch.compile`
    python benchmarks/decode.py --step     only the decoding step
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import roofline
import shapes
import torch
from clock import Clock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from haq.int8.tokens import round_tokens
from haq.nn import Int8Experts, Int8Linear

Start = Callable[[PreTrainedModel], harness.Run]

WORKS: dict[str, Start] = {
    "decode, 1 token": shapes.decoder,
    f"decode, 1 token after {shapes.LONG_TEXT}": shapes.decoder_of_long_text,
    f"prefill, {shapes.PROMPT} tokens": lambda model: shapes.prefill(model, shapes.PROMPT),
    f"prefill, {shapes.LONG_PROMPT} tokens": shapes.prefill,
}
DECODE, LONG, SHORT, PREFILL = WORKS

# Every work is compiled for itself. A short prompt would tell nothing that a long one does not, and
# each length of a text would be compiled.
COMPILED = "int8, compiled"
NOT_COMPILED = {SHORT, LONG}

# A long prompt takes seconds a round. Processors without instructions for bfloat16 take ten times
# as long in it: where one prompt takes more than this, one is what is timed.
MOST_SECONDS = 15
MOST_SECONDS_OF_BF16 = 4.0

# Layers that are checked, and tokens; products in float64 take long.
CHECKED_LAYERS, CHECKED_TOKENS = 2, 16

# Where a decoding step of an int8 model spends its time. What is in none of it, the rest of
# transformers' code and of Python, is "other".
MODELING = "transformers.models"
PARTS = [
    ("haq.int8.llvm.chain", "Chain.run", "kernels of the layers"),
    ("haq.model.steps", "_FastLayer._fast", "around them"),
    ("haq.nn.experts", "Int8Experts.forward", "around them"),
    ("haq.nn.linear", "Int8Linear.forward", "around single products"),
    ("haq.int8.llvm.weight", "products", "single products"),
    ("haq.nn.rows", "products", "single products"),
    ("haq.int8.cpu", "FbgemmWeight.product", "single products"),
    ("haq.int8.cpu", "OneDnnWeight.product", "single products"),
    ("haq.int8.signs", "SignedRowsWeight.product", "single products"),
    ("torch.nn", "Linear.forward", "head in bfloat16"),
    ("haq.nn.kept", "_run", "head in bfloat16"),
    ("haq.model.attention", "attend", "attention"),
    ("haq.model.attention", "sdpa_attention_forward", "attention"),
    ("haq.nn.norms", "_run_on_cpu", "norms"),
    (f"{MODELING}.llama.modeling_llama", "LlamaRMSNorm.forward", "norms"),
    (f"{MODELING}.mixtral.modeling_mixtral", "MixtralRMSNorm.forward", "norms"),
    (f"{MODELING}.llama.modeling_llama", "apply_rotary_pos_emb", "rotation"),
    (f"{MODELING}.mixtral.modeling_mixtral", "apply_rotary_pos_emb", "rotation"),
    (f"{MODELING}.mixtral.modeling_mixtral", "MixtralTopKRouter.forward", "router and its block"),
    (
        f"{MODELING}.mixtral.modeling_mixtral",
        "MixtralSparseMoeBlock.forward",
        "router and its block",
    ),
]
WARM_STEPS, TIMED_STEPS = 5, 41

# Of logits, where the last bit of a sigmoid may differ.
MOST_ERROR = 1e-3


class ExactLinear(nn.Module):
    """What an Int8Linear stands for: its integers, multiplied in float64."""

    def __init__(self, layer: Int8Linear) -> None:
        super().__init__()
        self.asymmetric = layer.asymmetric
        self.weight, self.scale = layer.weight, layer.weight_scale.view(-1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = round_tokens(x.reshape(-1, x.shape[-1]).float(), self.asymmetric)
        sums = F.linear(tokens.integers.double(), self.weight.double()).float() * self.scale
        if tokens.shift is not None:
            sums.addcmul_(tokens.shift, self.weight.sum(1).float() * self.scale)
        return (sums * tokens.scale).to(x.dtype).view(*x.shape[:-1], -1)


class ExactExperts(nn.Module):
    """What Int8Experts stands for: every token through each of its experts by itself."""

    def __init__(self, experts: Int8Experts) -> None:
        super().__init__()
        pairs = [experts.expert(index) for index in range(experts.num_experts)]
        self.pairs = [tuple(map(ExactLinear, pair)) for pair in pairs]
        self.activation = experts.activation

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = [
            sum(self._expert(e, token[None].float()) * w for e, w in zip(*choice, strict=True))
            for token, choice in zip(x, zip(index.tolist(), weights, strict=True), strict=True)
        ]
        return torch.cat(rows).to(x.dtype)

    def _expert(self, index: int, token: Tensor) -> Tensor:
        up, down = self.pairs[index]
        output: Tensor = down(self.activation(up(token)))
        return output


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The int8 model as it has to be, slowly."""
    modules = shapes.outermost_int8(model)
    copied = shapes.with_own_modules(model, modules.values())
    for name, module in modules.items():
        exact = ExactLinear(module) if isinstance(module, Int8Linear) else ExactExperts(module)
        copied.set_submodule(name, exact)
    return copied


def check(name: str) -> None:
    """The logits of integers that are multiplied in float64: of a Llama to the last bit."""
    tokens = shapes.prompt(CHECKED_TOKENS)
    int8 = shapes.with_int8_head(shapes.int8_copy(shapes.build(name, CHECKED_LAYERS)))
    expected = exact_copy(int8)(tokens).logits
    logits = int8(tokens).logits
    error = float((logits.double() - expected.double()).norm() / expected.double().norm())
    has_experts = any(isinstance(module, Int8Experts) for module in int8.modules())
    assert error <= (MOST_ERROR if has_experts else 0), f"{name} is wrong by {error:.1e}"


def variants_of(name: str, layers: int | None, eager: bool) -> dict[str, PreTrainedModel]:
    model = shapes.build(name, layers)
    int8 = shapes.int8_copy(model)
    variants = {"bf16": model, "int8": int8, "int8, head too": shapes.with_int8_head(int8)}
    if not torch.cpu._is_avx512_bf16_supported():  # Without instructions for it, bf16 is slow.
        variants["float32"] = copy.deepcopy(model).float()
    return variants if eager else {**variants, COMPILED: torch.compile(int8, dynamic=False)}


def measure(
    labels: Mapping[str, Any],
    variants: Mapping[str, PreTrainedModel],
    works: Mapping[str, Start],
    rounds: int,
) -> list[dict[str, Any]]:
    read = roofline.MemoryRead()
    bytes_read = {name: shapes.bytes_per_token(model) for name, model in variants.items()}
    rows = []
    for work, start in works.items():
        runs, failures, once = {}, {}, {}
        for name, model in variants.items():
            if name == COMPILED and work in NOT_COMPILED:
                continue
            try:
                runs[name] = start(model)
                seconds = harness.seconds_per_call(runs[name], 1)
                if name == "bf16" and seconds > MOST_SECONDS_OF_BF16:
                    del runs[name]
                    once = {"bf16_once_ms": seconds * 1e3}
            except Exception as error:  # noqa: BLE001 - whatever the compiler of a machine raises
                runs.pop(name, None)
                failures[name] = harness.first_line(error)
        timings = harness.time_in_turn({**read.runs, **runs}, rounds, MOST_SECONDS)
        of = bytes_read if work == DECODE else {}
        rows.append(roofline.row({**labels, "work": work, **once}, timings, of, read, failures))
    return rows


def parts_of(model: PreTrainedModel) -> dict[str, float]:
    """Where the time of a decoding step goes: milliseconds by part."""
    step = shapes.decoder(model)
    clock = Clock()
    try:
        for part in PARTS:
            clock.around(*part)
        rounds = []
        for _ in range(WARM_STEPS + TIMED_STEPS):
            clock.start_again()
            start = time.perf_counter()
            step()
            rounds.append(clock.all(time.perf_counter() - start))
    finally:
        clock.stop()
    names = {name for each in rounds[WARM_STEPS:] for name in each}
    timed = rounds[WARM_STEPS:]
    return {n: statistics.median(each.get(n, 0.0) for each in timed) * 1e3 for n in sorted(names)}


def print_parts(name: str, parts: Mapping[str, float]) -> None:
    rows = sorted(parts.items(), key=lambda item: -item[1])
    harness.print_table([f"{name}, a token", "ms"], [[part, f"{ms:.2f}"] for part, ms in rows])


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    targets = []
    for row in rows:
        name, int8 = f"{row['model']}, {row['work']}", row["runs"]["int8"]
        if row["work"] == DECODE:
            targets.append(harness.target(f"{name}, times bf16", int8["times_bf16"], 3))
            share = int8["share_of_roofline"]
            targets.append(harness.target(f"{name}, share of roofline", share, 0.75))
        elif row["work"] == PREFILL:
            once = row.get("bf16_once_ms", 0) / int8["median_ms"]
            times = int8.get("times_bf16", once)
            targets.append(harness.target(f"{name}, times bf16", times, 1.8))
    return targets


def main() -> None:
    options = harness.arguments(
        __doc__, eager="without torch.compile", step="only the decoding step"
    )
    facts = harness.card()
    harness.print_card(__doc__, facts)
    works = {DECODE: WORKS[DECODE]} if options.step else WORKS
    rows, parts = [], {}
    for name in shapes.SHAPES:
        with torch.inference_mode():
            check(name)
            variants = variants_of(name, 1 if options.quick else None, options.eager)
            rounds = 5 if options.quick else 21
            found = measure({"model": name}, variants, works, rounds)
            parts[name] = parts_of(variants["int8"])
        roofline.print_rows(found)
        print_parts(name, parts[name])
        rows += found
    if options.quick:
        return  # Of so few layers, `lm_head` is half.
    harness.write_speed("decode", facts, rows=rows, parts_ms=parts, targets=targets_of(rows))


if __name__ == "__main__":
    main()

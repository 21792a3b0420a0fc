"""Two tiers of memory on a GPU: does it give the same answers, stay inside its budget, and pay?

    python benchmarks/offload.py                 about four minutes; part of `make gpu`
    python benchmarks/offload.py --device cpu    the checks only, on a tiny model

The real shape of Mixtral-8x7B, 32 layers, random weights. All layers share the memory of one
layer's experts on the CPU, which no cache holds, so that 93 GB need not be there; on the GPU every
resident expert has its own, and those of a layer are computed together. Right first: with
`cold="gpu"` the bits of the model that is on the GPU as a whole. Then, for budgets of 25, 40 and
60 % of what the model takes in bfloat16, tokens per second, the time to the first token of a prompt
of 512, the peak of memory against the promise, and the overlap of the lanes; beside it accelerate's
offload of the bfloat16 model in the same memory, all experts on the CPU, and everything on the GPU.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import haq
from haq.model.experts import Activation, unfuse
from haq.nn import Int8Experts, Int8Linear, fuse_norms, unfuse_norms
from haq.offload.weights import expert_weights

REAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LAYERS, EXPERTS, VOCABULARY = 32, 8, 32000
BUDGETS = (0.25, 0.40, 0.60)
PROMPT, ANSWER, LONG_PROMPT = 16, 32, 512
ROUNDS = 3

# Targets: tokens per second over accelerate's at 40 %, measured over expected seconds in experts,
# and memory saved against bfloat16 at 40 %.
TIMES_ACCELERATE, SHARE_OF_BOUND, SAVED = 8, 0.85, 0.6


def one_layer(shape: dict[str, int]) -> MixtralForCausalLM:
    """A model of one layer in bfloat16; the others will be made of it."""
    config = MixtralConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"] // 4,
        num_local_experts=EXPERTS,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model: MixtralForCausalLM = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def grown(model: MixtralForCausalLM, layers: int, shared: Callable[[int], nn.Module]) -> None:
    """Make it ``layers`` deep; every layer has dense weights of its own, and experts from where
    ``shared`` says."""
    first = model.model.layers[0]
    first.mlp.experts = nn.Identity()
    blocks = [copy.deepcopy(first) for _ in range(layers)]
    for i, block in enumerate(blocks):
        block.self_attn.layer_idx = i
        block.mlp.experts = shared(i)
        block.mlp.gate.weight.data.normal_(0, 0.02)  # Layers choose differently.
    model.model.layers = nn.ModuleList(blocks)
    model.config.num_hidden_layers = layers


def int8_experts(experts: nn.Module) -> Int8Experts:
    floats = unfuse(experts).experts
    up = [Int8Linear.from_float(e.up.weight.float()) for e in floats]
    down = [Int8Linear.from_float(e.down.weight.float(), asymmetric=True) for e in floats]
    return Int8Experts(up, down, Activation(experts))


def alias(module: nn.Module) -> nn.Module:
    """Another module with the same parameters, which can be moved by itself."""
    other = copy.copy(module)
    other._parameters = dict(module._parameters)
    return other


def bfloat16_bytes(shape: dict[str, int], layers: int) -> int:
    """What all experts and everything else take."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    dense = 2 * VOCABULARY * hidden + layers * int(2.5 * hidden * hidden)
    return 2 * (dense + layers * EXPERTS * 3 * hidden * inner)


def prompt(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def generate(model: MixtralForCausalLM, length: int, new: int) -> Tensor:
    ids = prompt(length).to(model.device)
    mask = torch.ones_like(ids)
    tokens: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return tokens


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median of a few runs after one that does not count."""
    run()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def speed(model: MixtralForCausalLM, rounds: int = ROUNDS) -> dict[str, float]:
    """Tokens per second of decoding, and seconds to the first token of a long prompt."""
    first = seconds(lambda: generate(model, PROMPT, 1), rounds)
    more = seconds(lambda: generate(model, PROMPT, 1 + ANSWER), rounds)
    return {
        "tokens_per_second": ANSWER / (more - first),
        "first_token_seconds": seconds(lambda: generate(model, LONG_PROMPT, 1), rounds),
    }


@contextmanager
def offloaded(
    model: MixtralForCausalLM, device: torch.device, memory: int | None, **options: Any
) -> Iterator[haq.ExpertOffloader]:
    config = haq.OffloadConfig(max_length=LONG_PROMPT + ANSWER, **options)
    with haq.ExpertOffloader(model, device=device, gpu_memory=memory, config=config) as offloader:
        yield offloader


def check(model: MixtralForCausalLM, device: torch.device, memory: int) -> None:
    """The same bits wherever the experts are, if all of them are computed on the GPU."""
    ids = prompt(64).to(device)
    with torch.no_grad():
        with offloaded(model, device, None) as whole:
            assert whole.placement.num_resident == EXPERTS * len(whole.placement.resident)
            expected, text = model(ids).logits.cpu(), generate(model, PROMPT, ANSWER).cpu()
        with offloaded(model, device, memory, cold="gpu") as offloader:
            torch.testing.assert_close(model(ids).logits.cpu(), expected, rtol=0, atol=0)
            assert torch.equal(generate(model, PROMPT, ANSWER).cpu(), text)
            assert sum(c.copied for c in offloader.report().counts) > 0, "nothing was cold"
        with offloaded(model, device, memory, cold="cpu") as offloader:
            logits = model(ids).logits.cpu()
            assert sum(c.misses for c in offloader.report().counts) > 0, "nothing was cold"
    # The activation between the products is computed by another processor: its last bits differ.
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0.1, atol=0.1)
    print("the same bits with every expert on the GPU, and close to them with some on the CPU\n")


def measure_offloader(
    model: MixtralForCausalLM, device: torch.device, memory: int | None, name: str
) -> dict[str, Any]:
    """One budget."""
    with torch.no_grad(), offloaded(model, device, memory) as offloader:
        row = {"name": name, **speed(model)}
        offloader.reset()
        generate(model, PROMPT, 1 + ANSWER)
        report = offloader.report()
        peak = torch.cuda.max_memory_allocated(device)
        busy = [max(c.gpu_seconds, c.cpu_seconds) / max(c.calls, 1) for c in report.counts]
        row |= {
            "resident": offloader.placement.num_resident,
            "promised_bytes": memory,
            "peak_bytes": peak,
            "hit_rate": report.hit_rate,
            "overlap": report.overlap,
            "expected_ms_per_token": offloader.placement.seconds * 1e3,
            "measured_ms_per_token": sum(busy) * 1e3,
            "costs": offloader.costs.to_dict(),
        }
    assert memory is None or peak <= memory, f"{peak} bytes, promised {memory}"
    print(
        f"{name}: {row['tokens_per_second']:.2f} tokens/s, first of {LONG_PROMPT} in "
        f"{row['first_token_seconds']:.2f} s, peak {peak / 2**30:.1f} GiB",
        flush=True,
    )
    return row


def measure_accelerate(
    model: MixtralForCausalLM, device: torch.device, on_gpu: int, name: str
) -> dict[str, Any]:
    """Layers that fit on the GPU are there, the others' weights come when they are called."""
    blocks = model.model.layers
    for part in (model.model.embed_tokens, model.model.norm, model.model.rotary_emb, model.lm_head):
        part.to(device)
    for block in blocks[:on_gpu]:
        block.to(device)
    for block in blocks[on_gpu:]:
        cpu_offload(block, execution_device=device, offload_buffers=True)
    with torch.no_grad():
        row = {"name": name, **speed(model, rounds=1)}
    for block in blocks[on_gpu:]:
        remove_hook_from_submodules(block)
    print(f"{name}: {row['tokens_per_second']:.2f} tokens/s", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no CUDA device here; `--device cpu` runs the checks")
    facts = harness.card()
    harness.print_card(__doc__, facts)
    shape, layers = (REAL, LAYERS) if on_gpu else (TINY, 4)
    model = one_layer(shape)
    floats = model.model.layers[0].mlp.experts
    int8 = int8_experts(floats)
    grown(model, layers, lambda _: Int8Experts([*int8.up], [*int8.down], int8.activation))
    fuse_norms(model)  # As in every model that haq made int8 where there is a GPU.
    whole = bfloat16_bytes(shape, layers)
    probe = haq.ExpertOffloader(
        model, device=device, config=haq.OffloadConfig(max_length=LONG_PROMPT + ANSWER)
    )
    print(probe.budget, end="\n\n")
    some = probe.budget.needed + layers * EXPERTS // 2 * expert_weights(int8).expert_bytes
    check(model, device, some)
    if not on_gpu:
        return
    rows = [measure_offloader(model, device, int(b * whole), f"haq, {b:.0%}") for b in BUDGETS]
    rows.append(measure_offloader(model, device, probe.budget.needed, "haq, all on the CPU"))
    rows.append(measure_offloader(model, device, None, "haq, all on the GPU"))
    per_layer = whole / layers
    resident = int(0.4 * whole / per_layer) - 1
    twin = copy.deepcopy(floats).to(device)
    unfuse_norms(model)
    grown(model, layers, lambda i: alias(twin if i < resident else floats))
    rows.append(measure_accelerate(model, device, resident, "accelerate, bfloat16, 40%"))
    middle, accelerate = rows[1], rows[-1]
    times = middle["tokens_per_second"] / accelerate["tokens_per_second"]
    bound = middle["expected_ms_per_token"] / middle["measured_ms_per_token"]
    targets = [
        harness.target("40 %: tokens per second over accelerate's", times, TIMES_ACCELERATE),
        harness.target("40 %: expected over measured seconds of lanes", bound, SHARE_OF_BOUND),
        harness.target("40 %: memory saved", 1 - middle["peak_bytes"] / whole, SAVED),
    ]
    harness.write("offload", facts, shape=shape, layers=layers, rows=rows, targets=targets)


if __name__ == "__main__":
    main()

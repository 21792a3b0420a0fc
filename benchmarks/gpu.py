"""Everything that only a CUDA device can show: first that it is right, then how fast it is.

    make gpu                                     or: python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu        the checks only, to see that they run

Right: each backend's proof, the bits of `Int8Linear` against the CPU's, and the shipped models, a
dense one and a mixture of experts, quantized on the device against the same on the CPU. Fast:
`Int8Linear` beside `nn.Linear` in bfloat16, weights rotated past the cache, and beside the
bandwidth of a copy on the device.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import haq
from haq import Int8Linear

MODELS = Path(__file__).parents[1] / "examples/tiny_models"
SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096)]  # [N, K]
TOKENS = [1, 4, 16, 256, 4096]
ROUNDS = 21

# More than twice the cache of today's largest GPUs.
CACHE_BYTES = 256 * 2**20


def check_products(device: torch.device) -> None:
    """Every backend of the device is exact, and its bits are those of the CPU."""
    print(haq.backends())
    inexact = [s for s in haq.backends() if s.device == device.type and s.available and not s.exact]
    if inexact:
        sys.exit(f"not exact: {inexact}")
    for rows, columns in ((37, 53), (512, 1024)):
        layer = Int8Linear.from_float(torch.randn(rows, columns), torch.randn(rows))
        moved = copy.deepcopy(layer).to(device)
        for tokens in (1, 16, 17, 100):
            x = torch.randn(tokens, columns).bfloat16()
            torch.testing.assert_close(moved(x.to(device)).cpu(), layer(x), rtol=0, atol=0)
    print("Int8Linear: the bits of the CPU")
    for rows, columns in ((37, 53), (512, 1024)):
        layer = Int8Linear.from_float(torch.randn(rows, columns), asymmetric=True)
        moved = copy.deepcopy(layer).to(device)
        x = torch.rand(17, columns)
        # A GPU adds what a zero point stands for without rounding in between.
        torch.testing.assert_close(moved(x.to(device)).cpu(), layer(x), rtol=1e-5, atol=1e-4)
    print("with zero points: within float32 rounding\n")


def check_model(name: str, device: torch.device) -> None:
    """A model quantized on the device predicts what one quantized on the CPU does."""
    generator = torch.Generator().manual_seed(0)
    calibration = [torch.randint(3, 2048, (4, 128), generator=generator) for _ in range(4)]
    text = torch.randint(3, 2048, (1, 2048), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    on_cpu = haq.quantize_model(copy.deepcopy(model), calibration, progress=False)
    on_device = haq.quantize_model(copy.deepcopy(model).to(device), calibration, progress=False)
    against_float = haq.compare(model, on_cpu, text, sequence_length=128, progress=False)
    against_cpu = haq.compare(on_cpu, on_device, text, sequence_length=128, progress=False)
    print(f"{name}\nKL(float || int8 on the CPU)        {against_float.kl:.2e}")
    print(f"KL(int8 on the CPU || on {device})  {against_cpu.kl:.2e}")
    if against_cpu.kl > against_float.kl:
        sys.exit("what the device computes is farther from the CPU than int8 is from float")
    prompt = text[:, :16].to(device)
    moved = copy.deepcopy(on_device).to("cpu")
    written = [
        m.generate(p, max_new_tokens=16, do_sample=False)
        for m, p in ((on_device, prompt), (moved, prompt.cpu()))
    ]
    print(
        f"greedy tokens after moving to the CPU: {(written[0].cpu() == written[1]).sum()} of 32\n"
    )


def seconds(run: Callable[[], object]) -> float:
    """Per call, on the device's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20 / 1e3


def measure_linear(shape: tuple[int, int]) -> list[dict[str, Any]]:
    rows, columns = shape
    copies = -(-CACHE_BYTES // (rows * columns))
    floats = [
        nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="cuda")
        for _ in range(copies)
    ]
    int8s = [Int8Linear.from_float(layer.weight) for layer in floats]
    source = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    results = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        runs = {
            "copy": partial(target.copy_, source),
            "bf16": harness.rotating([partial(layer, x) for layer in floats]),
            "int8": harness.rotating([partial(layer, x) for layer in int8s]),
        }
        for run in runs.values():
            seconds(run)
        rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(ROUNDS)]
        middle = {name: statistics.median(r[name] for r in rounds) for name in runs}
        results.append(
            {
                "shape": list(shape),
                "tokens": tokens,
                "bf16_ms": middle["bf16"] * 1e3,
                "int8_ms": middle["int8"] * 1e3,
                "times_bf16": statistics.median(r["bf16"] / r["int8"] for r in rounds),
                # A copy reads and writes; the weight is only read.
                "share_of_copy_bandwidth": (rows * columns / middle["int8"])
                / (2 * CACHE_BYTES / middle["copy"]),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; `--device cpu` runs the checks")
    facts = harness.card()
    harness.print_card(__doc__, facts)
    with torch.no_grad():
        check_products(device)
        for name in ("opt-python", "mixtral-python"):
            check_model(name, device)
        if device.type != "cuda":
            return
        rows = [row for shape in SHAPES for row in measure_linear(shape)]
    harness.print_table(
        ("shape", "tokens", "bf16 ms", "int8 ms", "times bf16", "share of copy"),
        [
            (
                str(r["shape"]),
                str(r["tokens"]),
                f"{r['bf16_ms']:.3f}",
                f"{r['int8_ms']:.3f}",
                f"{r['times_bf16']:.2f}",
                f"{r['share_of_copy_bandwidth']:.2f}",
            )
            for r in rows
        ],
    )
    harness.write("gpu", facts, rows=rows)


if __name__ == "__main__":
    main()

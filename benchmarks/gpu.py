"""Everything that only a CUDA device can show: first that it is right, then how fast it is.

    make gpu                                     or: python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu        the checks only, to see that they run

Right: each backend's proof, the bits of `Int8Linear`, of the kernels for experts and of
`Int8Experts` against the CPU's, fused norms against plain ones, the shipped models, a dense one and
a mixture of experts, quantized on the device against the same on the CPU, and a model whose step of
decoding is a CUDA graph against the same step by step. Fast: that step beside bfloat16, the experts
of a layer of Mixtral beside torch's grouped products, the quantizing of a block of Mixtral, norms
fused with what follows and not, and `Int8Linear` with Triton's kernels beside `torch._int_mm` and
`nn.Linear`; all beside the bandwidth of a copy on the device. What there is no time for is named.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_layers
import gpu_models
import harness
import roofline
import torch
from gpu_timing import TimeLimit
from transformers import AutoModelForCausalLM

import haq
from haq import Int8Linear
from haq.int8 import matmul

MODELS = Path(__file__).parents[1] / "examples/tiny_models"

# Nothing is begun later than this, so that `make gpu` is done in nine minutes.
MOST_SECONDS = 240

# Up to so many tokens a product takes as long as reading the weight.
DECODE_TOKENS = 16

# What Triton's kernels were to reach, at decode and with a long prompt.
TIMES_BF16, TIMES_BF16_LONG, SHARE_OF_COPY = 1.7, 1.5, 0.85


def check_products(device: torch.device) -> None:
    """Every backend of the device is exact, and its bits are those of the CPU."""
    print(haq.backends())
    here = [status for status in haq.backends() if status.device == device.type]
    inexact = [status for status in here if status.available and not status.exact]
    if inexact:
        sys.exit(f"not exact: {inexact}")
    for name in (status.name for status in here if status.exact):
        # torch divides by a number on a GPU by multiplying with its inverse, Triton's kernels do
        # not: with the others a token's scale may differ in its last bit, and an integer with it.
        same_bits = device.type == "cpu" or name == "triton"
        check_backend(name, device, same_bits)
        print(f"{name}: {'the bits' if same_bits else 'as good as the numbers'} of the CPU")


def check_backend(name: str, device: torch.device, same_bits: bool) -> None:
    for rows, columns in ((37, 53), (1024, 2048)):
        weight, bias = torch.randn(rows, columns), torch.randn(rows)
        layers = [Int8Linear.from_float(weight, bias, asymmetric=shift) for shift in (False, True)]
        for layer in layers:
            parts = [part.to(device) for part in (layer.weight, layer.weight_scale, bias)]
            with matmul.use_backend(name):
                moved = Int8Linear(*parts, asymmetric=layer.asymmetric)
            for tokens, dtype in itertools.product(
                (1, 16, 17, 300), (torch.bfloat16, torch.float32)
            ):
                x = torch.randn(tokens, columns).to(dtype)
                expected, result = layer(x), moved(x.to(device)).cpu()
                error = (result.double() - expected.double()).norm() / expected.double().norm()
                # torch may add what a zero point stands for without rounding in between.
                if same_bits and not layer.asymmetric:
                    torch.testing.assert_close(result, expected, rtol=0, atol=0)
                elif error > 1e-3:
                    sys.exit(f"{name} is off by {error:.1e} for {tokens} tokens of {dtype}")


def exact(name: str, device: torch.device) -> bool:
    """Whether a backend is there, and proved."""
    return any(s.name == name and s.device == device.type and s.exact for s in haq.backends())


def check_experts(device: torch.device) -> None:
    """The kernels for experts, where there are some: the bits of a product for each expert."""
    if not exact("triton", device):
        print("no kernels for experts here\n")
        return
    from haq.int8 import kernels

    slots, rows, columns = 4, 530, 1030
    layers = [Int8Linear.from_float(torch.randn(rows, columns)) for _ in range(slots)]
    weight = torch.stack([layer.weight for layer in layers]).to(device)
    scale = torch.stack([layer.weight_scale for layer in layers]).to(device)
    for counts in ((1, 0, 1, 0), (0, 40, 3, 7), (300, 0, 100, 200)):
        starts = [sum(counts[:slot]) for slot in range(slots)]
        x, index = torch.randn(50, columns).bfloat16(), torch.randint(50, (sum(counts),))
        gates = torch.rand(len(index))
        parts = zip(layers, x[index].split(counts), strict=True)
        expected = torch.cat([layer(part.float()) for layer, part in parts]) * gates[:, None]
        result = kernels.grouped_linear(
            kernels.quantize_tokens(x.to(device)),
            weight,
            scale,
            kernels.row_tiles(list(zip(range(slots), starts, counts, strict=True)), device),
            index=index.to(device),
            gates=gates.to(device),
        )
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0)
    print("experts: the bits of the CPU\n")


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


def check(device: torch.device) -> None:
    """Everything is right, or the program ends."""
    check_products(device)
    check_experts(device)
    gpu_layers.check_int8_experts(device)
    gpu_layers.check_norm(device)
    for name in ("opt-python", "mixtral-python"):
        check_model(name, device)
    gpu_models.check_steps(gpu_models.models(device, gpu_models.TINY_LLAMA))
    gpu_models.check_compiled(device)


def measure(device: torch.device, time: TimeLimit) -> tuple[list[Any], list[Any]]:
    """Rows of times, and what quantizing takes; what matters most comes first."""
    rows = time.run("decoding", partial(measure_decode, device))
    rows += time.run("experts", gpu_layers.measure_int8_experts)
    quantizing = time.run("quantizing a block", gpu_models.measure_quantizing)
    rows += time.run("norms", gpu_layers.measure_norm)
    backends = [name for name in ("int_mm", "triton") if exact(name, device)]
    for shape in gpu_layers.LINEAR_SHAPES:
        work = partial(gpu_layers.measure_linear, shape, backends)
        rows += time.run(f"linear layers of {shape}", work)
    return rows, quantizing


def measure_decode(device: torch.device) -> list[dict[str, Any]]:
    models = gpu_models.models(device, gpu_models.LLAMA)
    gpu_models.check_steps(models)
    return gpu_models.measure_decode(models)


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for row, name in itertools.product(rows, ("triton", "int8")):
        run = row["runs"].get(name)
        if run is None:
            continue
        what = f"{name}, {row['what']}, {row['tokens']} tokens"
        if row["tokens"] <= DECODE_TOKENS:
            results.append(harness.target(f"{what}: times bf16", run["times_bf16"], TIMES_BF16))
            share = run["share_of_roofline"]
            results.append(harness.target(f"{what}: share of copy", share, SHARE_OF_COPY))
        elif row["tokens"] == max(gpu_layers.LINEAR_TOKENS):
            at_least = TIMES_BF16_LONG
            results.append(harness.target(f"{what}: times bf16", run["times_bf16"], at_least))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; `--device cpu` runs the checks")
    time = TimeLimit(MOST_SECONDS)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    with torch.no_grad():
        check(device)
        if device.type != "cuda":
            return
        rows, quantizing = measure(device, time)
    print("Milliseconds in a CUDA graph, and as called from Python.")
    roofline.print_rows(rows, more={"eager, ms": "eager_ms"})
    harness.write(
        "gpu",
        facts,
        rows=rows,
        quantizing=quantizing,
        skipped=time.skipped,
        targets=targets(rows),
    )


if __name__ == "__main__":
    main()

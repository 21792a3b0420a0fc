"""Everything that only a CUDA device can show: first that it is right, then how fast it is.

    make gpu                                     or: python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu        the checks only, to see that they run

Right: each backend's proof, the bits of `Int8Linear` and of the kernels for experts against the
CPU's, and the shipped models, a dense one and a mixture of experts, quantized on the device against
the same on the CPU. Fast: `Int8Linear` with Triton's kernels beside `torch._int_mm` and `nn.Linear`
in bfloat16, and all experts of a layer of Mixtral's shape beside the same in bfloat16, weights
rotated past the cache, and beside the bandwidth of a copy on the device.
"""

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import haq
from haq import Int8Linear
from haq.int8 import matmul

MODELS = Path(__file__).parents[1] / "examples/tiny_models"
SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096)]  # [N, K]
TOKENS = [1, 4, 16, 256, 4096]
ROUNDS = 21

# The two matrices of each of Mixtral's experts, [N, K], and how many there are.
EXPERT_SHAPES = [(28672, 4096), (4096, 14336)]
EXPERTS, EXPERTS_PER_TOKEN = 8, 2
EXPERT_TOKENS = [1, 128]

# Up to so many tokens a product takes as long as reading the weight.
DECODE_TOKENS = 16

# More than twice the cache of today's largest GPUs.
CACHE_BYTES = 256 * 2**20

Run = Callable[[], object]


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


def seconds(run: Run) -> float:
    """Per call, on the device's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20 / 1e3


def in_one_graph(runs: Sequence[Run]) -> Run:
    """All runs as one CUDA graph, in which no launch is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # The first calls measure, compile and allocate.
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def measure(candidates: dict[str, list[Run]], weight_bytes: int) -> dict[str, Any]:
    """Time calls in turn, one by one as they are and all together in a CUDA graph.

    Args:
        candidates: by name, the same call for each of several weights. Those whose names begin with
            "bf16" are baselines, of which the fastest counts.
        weight_bytes: what a call of the others reads.

    Returns:
        By name, milliseconds as called from Python and in a graph, and for what is no baseline how
        many times faster it is and its share of the bandwidth of a copy, both in the graph.
    """
    source = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    copying = partial(torch.empty_like(source).copy_, source)
    graphs = {name: in_one_graph(runs) for name, runs in candidates.items()}
    eager = {name: harness.rotating(runs) for name, runs in candidates.items()}
    for run in (copying, *graphs.values(), *eager.values()):
        seconds(run)
    rounds = [
        (
            seconds(copying),
            {name: seconds(run) for name, run in eager.items()},
            {name: seconds(run) / len(candidates[name]) for name, run in graphs.items()},
        )
        for _ in range(ROUNDS)
    ]
    result: dict[str, Any] = {}
    for name in candidates:
        result[name] = {
            "graph_ms": statistics.median(graph[name] for _, _, graph in rounds) * 1e3,
            "eager_ms": statistics.median(eager[name] for _, eager, _ in rounds) * 1e3,
        }
        if name.startswith("bf16"):
            continue
        result[name]["times_bf16"] = statistics.median(
            min(graph[other] for other in graph if other.startswith("bf16")) / graph[name]
            for _, _, graph in rounds
        )
        # A copy reads and writes; the weight is only read.
        result[name]["share_of_copy_bandwidth"] = statistics.median(
            weight_bytes / graph[name] / (2 * CACHE_BYTES / copying_takes)
            for copying_takes, _, graph in rounds
        )
    return result


def measure_linear(shape: tuple[int, int], backends: Sequence[str]) -> list[dict[str, Any]]:
    rows, columns = shape
    copies = -(-CACHE_BYTES // (rows * columns))
    layers: dict[str, list[nn.Module]] = {
        "bf16": [
            nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device="cuda")
            for _ in range(copies)
        ]
    }
    for name in backends:
        with matmul.use_backend(name):
            layers[name] = [Int8Linear.from_float(layer.weight) for layer in layers["bf16"]]
    results = []
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        calls = {name: [partial(layer, x) for layer in some] for name, some in layers.items()}
        results.append(
            {"shape": list(shape), "tokens": tokens, "runs": measure(calls, rows * columns)}
        )
    return results


def measure_experts(shape: tuple[int, int], backends: Sequence[str]) -> list[dict[str, Any]]:
    """One of the matrices of all experts of a layer; every token reads two of them."""
    rows, columns = shape
    floats = torch.randn(EXPERTS, rows, columns, dtype=torch.bfloat16, device="cuda")
    with matmul.use_backend(backends[0]):
        layers = [Int8Linear.from_float(weight) for weight in floats]
    weight = torch.stack([layer.weight for layer in layers])
    scale = torch.stack([layer.weight_scale for layer in layers])
    results = []
    for tokens in EXPERT_TOKENS:
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        chosen = min(EXPERTS, tokens * EXPERTS_PER_TOKEN)
        each = tokens * EXPERTS_PER_TOKEN // chosen  # rows of each expert that was chosen
        index = torch.arange(chosen * each, device="cuda") % tokens
        offsets = torch.arange(1, chosen + 1, device="cuda", dtype=torch.int32) * each
        calls: dict[str, list[Run]] = {name: [] for name in ("bf16", "bf16 grouped", *backends)}
        for first in range(0, EXPERTS, chosen):  # Other experts each time.
            some = range(first, first + chosen)
            linears = [partial(F.linear, weight=floats[expert]) for expert in some]
            calls["bf16"].append(partial(one_by_one, linears, x, index))
            stacked = floats[first : first + chosen].transpose(1, 2)
            calls["bf16 grouped"].append(partial(grouped_floats, x, index, stacked, offsets))
            if "int_mm" in backends:
                int8s = [layers[expert] for expert in some]
                calls["int_mm"].append(partial(one_by_one, int8s, x, index))
            if "triton" in backends:
                groups = [(expert, place * each, each) for place, expert in enumerate(some)]
                calls["triton"].append(partial(grouped_int8(groups), x, index, weight, scale))
        try:
            calls["bf16 grouped"][0]()
        except (AttributeError, RuntimeError) as error:
            print("torch multiplies no groups here:", str(error).partition("\n")[0])
            del calls["bf16 grouped"]
        runs = measure(calls, chosen * rows * columns)
        results.append({"shape": [EXPERTS, *shape], "tokens": tokens, "runs": runs})
    return results


def one_by_one(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, index: Tensor) -> Tensor:
    parts = zip(layers, x[index].chunk(len(layers)), strict=True)
    return torch.cat([layer(part) for layer, part in parts])


def grouped_floats(x: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x[index], weight, offs=offsets)


def grouped_int8(groups: list[tuple[int, int, int]]) -> Callable[..., Tensor]:
    from haq.int8 import kernels

    tiles = kernels.row_tiles(groups, "cuda")

    def run(x: Tensor, index: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        tokens = kernels.quantize_tokens(x)
        return kernels.grouped_linear(tokens, weight, scale, tiles, index=index, dtype=x.dtype)

    return run


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
        check_experts(device)
        for name in ("opt-python", "mixtral-python"):
            check_model(name, device)
        if device.type != "cuda":
            return
        backends = [name for name in ("int_mm", "triton") if exact(name, device)]
        rows = [row for shape in SHAPES for row in measure_linear(shape, backends)]
        rows += [row for shape in EXPERT_SHAPES for row in measure_experts(shape, backends)]
    print("Milliseconds in a CUDA graph, and as called from Python.")
    harness.print_table(
        ("shape", "tokens", "run", "graph", "eager", "times bf16", "share of copy"),
        [
            (
                str(row["shape"]),
                str(row["tokens"]),
                name,
                f"{run['graph_ms']:.3f}",
                f"{run['eager_ms']:.3f}",
                *(
                    f"{run[key]:.2f}" if key in run else ""
                    for key in ("times_bf16", "share_of_copy_bandwidth")
                ),
            )
            for row in rows
            for name, run in row["runs"].items()
        ],
    )
    harness.write("gpu", facts, rows=rows, targets=targets(rows, backends[-1:]))


def targets(rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """What the last of the backends was to reach, at decode and with a long prompt."""
    results = []
    for row, name in itertools.product(rows, names):
        run, what = row["runs"][name], f"{name}, {row['shape']}, {row['tokens']} tokens"
        if row["tokens"] <= DECODE_TOKENS:
            share = run["share_of_copy_bandwidth"]
            results.append(harness.target(f"{what}: times bf16", run["times_bf16"], 1.7))
            results.append(harness.target(f"{what}: share of copy", share, 0.85))
        elif row["tokens"] == max(TOKENS):
            results.append(harness.target(f"{what}: times bf16", run["times_bf16"], 1.5))
    return results


if __name__ == "__main__":
    main()

"""Does it take more memory to quantize a checkpoint of more layers, and what comes of it on disk?

`haq.quantize_checkpoint` has one block in memory at a time. Random checkpoints in bfloat16, shaped
as Mixtral (D 1024, I 3584, 8 experts: 182 MB a block) with 4, 8 and 16 layers, are each quantized
by the whole method in a process of its own, whose peak of resident memory the system tells, with
what Python and its libraries take, and with pages of files that are mapped. The result is checked
first: every int8 tensor is there, and the last block's weights are the float ones up to what the
method folds into their rows and columns, and to the rounding.

Then the bytes of decoder blocks in int8 against those in bfloat16, of trained models: of the one
in this repository, and of `tiny-mixtral` of the reference data if that is beside the checkout
(HAQ_SHARED). And the time to load the smallest of the random models in int8 against the time to
read the bytes of its files.

    python benchmarks/checkpoints.py            about 20 minutes on one core
    python benchmarks/checkpoints.py --quick    blocks of a hundredth of the size
"""

import gc
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import torch
from quality import SHARED, print_targets, target
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.utils import logging

import haq
from haq.checkpoint.files import INDEX, TensorFiles

EXPERTS, VOCABULARY = 8, 32000
REAL = {"hidden_size": 1024, "intermediate_size": 3584}
QUICK = {"hidden_size": 128, "intermediate_size": 448}
LAYERS = (4, 8, 16)
WINDOWS, LENGTH = 4, 128
LOADS = 3

TRAINED = [
    Path(__file__).parents[1] / "examples/tiny_models/mixtral-python",
    SHARED / "models/tiny-mixtral",
]

# Of the int8 weights from the float ones, relative: an int8 grid of normally distributed numbers
# costs 0.01, and compensating for errors in other columns costs more than it.
MAX_DISTANCE = 0.05

# Targets: how much the peak may grow from the fewest layers to the most, the peak as a share of
# the largest checkpoint, time for a layer of the most over one of the fewest, bytes of the blocks.
GROWTH = 0.05
SHARE_OF_LARGEST = 1 / 3
TIME_OF_A_LAYER = 1.1
SIZE = 0.52


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a new Python process, with as many threads as this one has."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_with_threads, threads, function, *arguments).result()


def _with_threads(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    return function(*arguments)


# --- memory against layers -----------------------------------------------------------------------


def write_random(folder: Path, shape: dict[str, int], layers: int) -> None:
    """A checkpoint as it would be published, file by file: one for what is around the blocks."""
    config = MixtralConfig(
        **shape,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    hidden = shape["hidden_size"]
    around = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden)}
    parts = [around | {"model.norm": (hidden,)}]
    parts += [block_shapes(f"model.layers.{i}", shape) for i in range(layers)]
    weight_map = {}
    for i, shapes in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        tensors = {f"{name}.weight": random(each) for name, each in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def block_shapes(name: str, shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    attention, mixture = f"{name}.self_attn", f"{name}.block_sparse_moe"
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.input_layernorm": (hidden,),
        f"{name}.post_attention_layernorm": (hidden,),
        f"{attention}.q_proj": (hidden, hidden),
        f"{attention}.k_proj": (hidden // 2, hidden),
        f"{attention}.v_proj": (hidden // 2, hidden),
        f"{attention}.o_proj": (hidden, hidden),
        f"{mixture}.gate": (EXPERTS, hidden),
    }
    for expert in range(EXPERTS):
        shapes[f"{mixture}.experts.{expert}.w1"] = (inner, hidden)
        shapes[f"{mixture}.experts.{expert}.w2"] = (hidden, inner)
        shapes[f"{mixture}.experts.{expert}.w3"] = (inner, hidden)
    return shapes


def random(shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


def quantize(source: Path, output: Path) -> dict[str, Any]:
    """In a process of its own: the peak is of all that it ever did."""
    imported = _resident()
    torch.manual_seed(0)
    batches = [torch.randint(VOCABULARY, (1, LENGTH)) for _ in range(WINDOWS)]
    others, start, cpu = harness.OtherWork(), time.perf_counter(), time.process_time()
    report = haq.quantize_checkpoint(source, output, batches, progress=False)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "share_of_others": others.share(),
        "imported_bytes": imported,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rounded_with_hessian": sum(layer.rounding == "hessian" for layer in report.layers),
        "rounded_to_nearest": sum(layer.rounding == "nearest" for layer in report.layers),
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def check(source: Path, output: Path, layers: int) -> dict[str, Any]:
    """Whether all is there that should be, and how far the last block's weights are."""
    floats, files = TensorFiles(source), TensorFiles(output)
    scaled = {name.removesuffix("_scale") for name in files.headers if name.endswith("_scale")}
    assert files.headers.keys() == floats.headers.keys() | {f"{name}_scale" for name in scaled}
    assert len(scaled) == layers * (4 + 3 * EXPERTS)
    for name, header in files.headers.items():
        assert name not in floats.headers or header.shape == floats.headers[name].shape
        expected = "I8" if name in scaled else "F32" if name.endswith("_scale") else "BF16"
        assert header.dtype == expected, f"{name} is {header.dtype}"
    distances = {
        name: distance(floats.read(name), files.read(name) * files.read(f"{name}_scale"))
        for name in sorted(scaled)
        if name.startswith(f"model.layers.{layers - 1}.")
    }
    worst = max(distances, key=distances.__getitem__)
    assert distances[worst] < MAX_DISTANCE, f"{worst} is {distances[worst]:.3f} off"
    return {
        "int8_tensors": len(scaled),
        "largest_distance": distances[worst],
        "float_bytes": _size(source),
        "int8_bytes": _size(output),
    }


def distance(weight: Tensor, int8: Tensor) -> float:
    """Relative, up to the scales of rows and columns that smoothing moves from layer to layer."""
    weight = weight.float()
    for _ in range(3):
        for dim in (0, 1):
            fit = (weight * int8).sum(dim, keepdim=True) / int8.square().sum(dim, keepdim=True)
            int8 = int8 * fit
    return ((int8 - weight).norm() / weight.norm()).item()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(shape: dict[str, int], layers: int, *, load: bool) -> dict[str, Any]:
    """One model, from nothing on disk to nothing on disk."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "float"), Path(folder, "int8")
        alone(write_random, source, shape, layers)
        row = {"layers": layers, **alone(quantize, source, output)}
        row["seconds_per_layer"] = row["seconds"] / layers
        row |= alone(check, source, output, layers)
        if load:
            row["loading"] = alone(time_loading, output)
    print(f"{layers} layers: {row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.3f} GB", flush=True)
    return row


# --- loading and size ----------------------------------------------------------------------------


def time_loading(folder: Path) -> dict[str, Any]:
    """Seconds to load a model, and to read its files, which the system has in its cache."""
    files = sorted(folder.iterdir())
    for file in files:
        file.read_bytes()
    runs: dict[str, Callable[[], object]] = {
        "read": lambda: [file.read_bytes() for file in files],
        "load": lambda: haq.from_pretrained(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    others = harness.OtherWork()
    for _ in range(LOADS):
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            seconds[name].append(time.perf_counter() - start)
            del result
            gc.collect()
    read, load = (harness.Timing(tuple(seconds[name])) for name in runs)
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": seconds,
        "median_read": read.median,
        "median_load": load.median,
        "load_over_read": read.times_faster_than(load),
        "share_of_others": others.share(),
    }


def size_of_blocks(source: Path) -> dict[str, Any]:
    """Bytes of all tensors of decoder blocks, in int8 and in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    torch.manual_seed(0)
    vocabulary = model.config.vocab_size
    batches = [torch.randint(vocabulary, (1, LENGTH)) for _ in range(WINDOWS)]
    haq.quantize_model(model, batches, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        haq.save_pretrained(model, Path(folder, "int8"))
        stored = blocks(Path(folder, "int8"))
    int8 = sum(header.num_bytes for header in stored)
    bfloat16 = 2 * sum(torch.Size(header.shape).numel() for header in blocks(source))
    return {"model": source.name, "int8_bytes": int8, "bfloat16_bytes": bfloat16}


def blocks(folder: Path) -> list[Any]:
    headers = TensorFiles(folder).headers
    return [header for name, header in headers.items() if name.startswith("model.layers.")]


# --- what is shown -------------------------------------------------------------------------------


def print_memory(rows: list[dict[str, Any]]) -> None:
    cells = [
        [
            str(row["layers"]),
            f"{row['float_bytes'] / 1e9:.2f}",
            f"{row['int8_bytes'] / 1e9:.2f}",
            f"{row['imported_bytes'] / 1e9:.3f}",
            f"{row['peak_bytes'] / 1e9:.3f}",
            f"{row['seconds']:.0f}",
            f"{row['seconds_per_layer']:.1f}",
            f"{row['cpu_seconds'] / row['layers']:.1f}",
            f"{100 * row['share_of_others']:.0f}",
            f"{row['largest_distance']:.4f}",
        ]
        for row in rows
    ]
    head = ["layers", "bf16 GB", "int8 GB", "imports GB", "peak GB"]
    head += ["s", "s a layer", "CPU s a layer", "% others' work", "weights off"]
    harness.print_table(head, cells)


def print_sizes(sizes: list[dict[str, Any]]) -> None:
    cells = [
        [each["model"], f"{each['bfloat16_bytes'] / 1e6:.2f}", f"{each['int8_bytes'] / 1e6:.2f}"]
        for each in sizes
    ]
    harness.print_table(["blocks, MB", "bf16", "int8"], cells)


def print_loading(loading: dict[str, Any]) -> None:
    print(
        f"{loading['bytes'] / 1e9:.2f} GB of int8: loaded in {loading['median_load']:.2f} s, read "
        f"in {loading['median_read']:.2f} s, {loading['load_over_read']:.1f} times as long"
    )
    print()


def targets(rows: list[dict[str, Any]], sizes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fewest, most = rows[0], rows[-1]
    span = f"from {fewest['layers']} to {most['layers']} layers"
    growth = most["peak_bytes"] / fewest["peak_bytes"] - 1
    share = max(row["peak_bytes"] for row in rows) / most["float_bytes"]
    slower = most["seconds_per_layer"] / fewest["seconds_per_layer"]
    found = [
        target(f"growth of the peak {span}", growth, GROWTH),
        target("peak over the largest checkpoint", share, SHARE_OF_LARGEST),
        target(f"growth of the seconds a layer takes {span}, factor", slower, TIME_OF_A_LAYER),
    ]
    for each in sizes:
        ratio = each["int8_bytes"] / each["bfloat16_bytes"]
        found.append(target(f"{each['model']}: blocks in int8 over bfloat16", ratio, SIZE))
    return found


def main() -> None:
    quick = harness.arguments(__doc__).quick
    facts = harness.card()
    harness.print_card(__doc__, facts)
    shape = QUICK if quick else REAL
    rows = [measure(shape, layers, load=layers == LAYERS[0]) for layers in LAYERS]
    print()
    print_memory(rows)
    sizes = [alone(size_of_blocks, model) for model in TRAINED if model.is_dir()]
    print_sizes(sizes)
    print_loading(rows[0]["loading"])
    found = targets(rows, sizes)
    print_targets(found)
    if not quick:
        harness.write(
            "checkpoints",
            facts,
            shape=shape,
            tokens=WINDOWS * LENGTH,
            targets=found,
            rows=rows,
            sizes=sizes,
        )


if __name__ == "__main__":
    main()

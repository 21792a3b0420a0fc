"""How fast is Int8Linear beside nn.Linear in bfloat16, and beside the memory?

With few tokens (decoding) a linear layer only waits for its weight, so the measure is the share of
the read bandwidth that it reaches; with many (prefill) it computes. Weights rotate, so that no
cache holds them: in a model each layer's weight comes from memory, too.
"""

import statistics
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor, nn

from haq.int8 import matmul
from haq.nn import Int8Linear

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (2048, 2048)]  # [N, K]
TOKENS = [1, 4, 16, 64, 256]


def make_layers(shape: tuple[int, int]) -> tuple[list[nn.Linear], list[Int8Linear]]:
    """As many layers of each kind as the cache cannot hold."""
    rows, columns = shape
    float_layers, int8_layers = [], []
    for _ in range(harness.copies_beyond_cache(rows * columns)):
        layer = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        float_layers.append(layer)
        int8_layers.append(Int8Linear.from_float(layer.weight))
    return float_layers, int8_layers


def check(layer: Int8Linear, x: Tensor) -> None:
    """The same bits as the reference product, which is proved against int64."""
    with matmul.use_backend("reference"):
        reference = Int8Linear(layer.weight, layer.weight_scale)
    torch.testing.assert_close(layer(x), reference(x), rtol=0, atol=0)


def measure(shape: tuple[int, int], tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    float_layers, int8_layers = make_layers(shape)
    read = harness.MemoryRead()
    results = []
    for count in tokens:
        x = torch.randn(count, shape[1]).bfloat16()
        check(int8_layers[0], x)
        runs = {
            "read": read,
            "bf16": harness.rotating([partial(layer, x) for layer in float_layers]),
            "int8": harness.rotating([partial(layer, x) for layer in int8_layers]),
        }
        timings = harness.time_in_turn(runs, rounds)
        bandwidths = read.bytes_per_second(timings["read"])
        weight_bytes = shape[0] * shape[1]
        rates = [weight_bytes / seconds for seconds in timings["int8"].seconds]
        shares = [rate / top for rate, top in zip(rates, bandwidths, strict=True)]
        results.append(
            {
                "shape": list(shape),
                "tokens": count,
                "bf16": timings["bf16"].to_dict(),
                "int8": timings["int8"].to_dict(),
                "times_faster": timings["int8"].times_faster_than(timings["bf16"]),
                "int8_gb_per_s": statistics.median(rates) / 1e9,
                "read_gb_per_s": statistics.median(bandwidths) / 1e9,
                "share_of_read": statistics.median(shares),
                "backend": int8_layers[0].backend,
            }
        )
    return results


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    print(matmul.backends(), end="\n\n")
    shapes = SHAPES[:1] if options.quick else SHAPES
    rounds = 5 if options.quick else 21
    with torch.inference_mode():
        rows = [row for shape in shapes for row in measure(shape, TOKENS, rounds)]
    print_rows(rows)
    of = {row["tokens"]: row for row in rows if row["shape"] == list(SHAPES[0])}
    name = f"[{SHAPES[0][0]}, {SHAPES[0][1]}]"
    targets = [
        harness.target(f"{name}, 1 token, times bf16", of[1]["times_faster"], 3),
        harness.target(f"{name}, 1 token, share of read", of[1]["share_of_read"], 0.8),
        harness.target(f"{name}, 16 tokens, times bf16", of[16]["times_faster"], 2.5),
        harness.target(f"{name}, 256 tokens, times bf16", of[256]["times_faster"], 1.5),
    ]
    if not options.quick:
        harness.write("linear", facts, rows=rows, targets=targets)


def print_rows(rows: list[dict[str, Any]]) -> None:
    harness.print_table(
        ["[N, K]", "tokens", "bf16, ms", "int8, ms", "times", "int8, GB/s", "read, GB/s", "share"],
        [
            [
                "[{}, {}]".format(*row["shape"]),
                str(row["tokens"]),
                harness.milliseconds(row["bf16"]),
                harness.milliseconds(row["int8"]),
                f"{row['times_faster']:.2f}",
                f"{row['int8_gb_per_s']:.1f}",
                f"{row['read_gb_per_s']:.1f}",
                f"{row['share_of_read']:.2f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()

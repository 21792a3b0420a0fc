"""How fast is Int8Linear beside nn.Linear in bfloat16, and beside the memory?

With few tokens (decoding) a linear layer only waits for its weight, so the measure is the share of
the read bandwidth that it reaches; with many (prefill) it computes. Weights rotate, so that no
cache holds them: in a model each layer's weight comes from memory, too.
"""

from functools import partial
from typing import Any

import harness
import roofline
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
    for _ in range(roofline.copies_beyond_cache(rows * columns)):
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
    read = roofline.MemoryRead()
    elements = shape[0] * shape[1]
    bytes_read = {"bf16": 2 * elements, "int8": elements}
    rows = []
    for count in tokens:
        x = torch.randn(count, shape[1]).bfloat16()
        check(int8_layers[0], x)
        runs = {
            **read.runs,
            "bf16": roofline.rotating([partial(layer, x) for layer in float_layers]),
            "int8": roofline.rotating([partial(layer, x) for layer in int8_layers]),
        }
        labels = {"shape": list(shape), "tokens": count, "backend": int8_layers[0].backend}
        timings = harness.time_in_turn(runs, rounds)
        rows.append(roofline.row(labels, timings, bytes_read, read))
    return rows


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    print(matmul.backends(), end="\n\n")
    shapes = SHAPES[:1] if options.quick else SHAPES
    rounds = 5 if options.quick else 21
    with torch.inference_mode():
        rows = [row for shape in shapes for row in measure(shape, TOKENS, rounds)]
    roofline.print_rows(rows)
    of = {row["tokens"]: row["runs"]["int8"] for row in rows if row["shape"] == list(SHAPES[0])}
    name = f"[{SHAPES[0][0]}, {SHAPES[0][1]}]"
    targets = [
        harness.target(f"{name}, 1 token, times bf16", of[1]["times_bf16"], 3),
        harness.target(f"{name}, 1 token, share of read", of[1]["share_of_roofline"], 0.8),
        harness.target(f"{name}, 16 tokens, times bf16", of[16]["times_bf16"], 2.5),
        harness.target(f"{name}, 256 tokens, times bf16", of[256]["times_bf16"], 1.5),
    ]
    if not options.quick:
        harness.write_speed("linear", facts, rows=rows, targets=targets)


if __name__ == "__main__":
    main()

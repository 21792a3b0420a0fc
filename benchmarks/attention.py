"""How long does one new token take to attend, by haq's attention and by torch's, in bfloat16?

Heads of 128 channels, as many for keys and values as for queries or a quarter of them, and texts of
several lengths, on the CPU. Checked first: haq's is as near to float64 as torch's.
"""

from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

from haq.nn.attention import attend

HEADS = [(16, 16), (32, 8)]  # of queries, and of keys and values
SIZE = 128
TOKENS = [128, 512, 2048, 8192]


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `transformers` calls it."""
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=shared)


def by_haq(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, None, None)


def error(result: Tensor, *inputs: Tensor) -> float:
    expected = by_torch(*(tensor.double() for tensor in inputs))
    return float((result.double() - expected).norm() / expected.norm())


def measure(heads: tuple[int, int], tokens: int, rounds: int) -> dict[str, Any]:
    query = 3 * torch.randn(1, heads[0], 1, SIZE).bfloat16()
    key, value = torch.randn(2, 1, heads[1], tokens, SIZE).bfloat16()
    inputs = query, key, value
    errors = {run.__name__: error(run(*inputs), *inputs) for run in (by_torch, by_haq)}
    assert errors["by_haq"] < 1.5 * errors["by_torch"], errors
    runs = {"torch": partial(by_torch, *inputs), "haq": partial(by_haq, *inputs)}
    timings = harness.time_in_turn(runs, rounds)
    return {
        "heads": list(heads),
        "tokens": tokens,
        **{name: timing.to_dict() for name, timing in timings.items()},
        "times_faster": timings["haq"].times_faster_than(timings["torch"]),
    }


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    torch.manual_seed(0)
    lengths, rounds = (TOKENS[:2], 5) if options.quick else (TOKENS, 21)
    with torch.inference_mode():
        rows = [measure(heads, tokens, rounds) for heads in HEADS for tokens in lengths]
    harness.print_table(
        ["heads", "tokens", "torch, ms", "haq, ms", "times"],
        [
            [
                "{} / {}".format(*row["heads"]),
                str(row["tokens"]),
                harness.milliseconds(row["torch"]),
                harness.milliseconds(row["haq"]),
                f"{row['times_faster']:.1f}",
            ]
            for row in rows
        ],
    )
    if not options.quick:
        harness.write_speed("attention", facts, rows=rows)


if __name__ == "__main__":
    main()

"""How long does attention take, haq's and torch's, in bfloat16: of one new token, and of a prompt?

Heads of 128 channels, as many for keys and values as for queries or a quarter of them, and texts of
several lengths, on the CPU. Checked first: haq's is as near to float64 as torch's.
"""

from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

from haq.nn.attention import attend, attend_to_prompt

HEADS = [(16, 16), (32, 8)]  # of queries, and of keys and values
SIZE = 128
TOKENS = [128, 512, 2048, 8192]
PROMPTS = [128, 512, 2048]


def by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `transformers` calls it."""
    shared, causal = query.shape[1] != key.shape[1], query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)


def by_haq(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.shape[2] == 1:
        return attend(query, key, value, None, None)
    result = attend_to_prompt(query, key, value, True, None)
    assert result is not None, "there is no kernel for prompts here"
    return result


def error(result: Tensor, *inputs: Tensor) -> float:
    expected = by_torch(*(tensor.double() for tensor in inputs))
    return float((result.double() - expected).norm() / expected.norm())


def measure(heads: tuple[int, int], queries: int, tokens: int, rounds: int) -> dict[str, Any]:
    query = 3 * torch.randn(1, heads[0], queries, SIZE).bfloat16()
    key, value = torch.randn(2, 1, heads[1], tokens, SIZE).bfloat16()
    inputs = query, key, value
    errors = {run.__name__: error(run(*inputs), *inputs) for run in (by_torch, by_haq)}
    assert errors["by_haq"] < 1.5 * errors["by_torch"], errors
    runs = {"torch": partial(by_torch, *inputs), "haq": partial(by_haq, *inputs)}
    timings = harness.time_in_turn(runs, rounds)
    return {
        "heads": list(heads),
        "queries": queries,
        "tokens": tokens,
        **{name: timing.to_dict() for name, timing in timings.items()},
        "times_faster": timings["haq"].times_faster_than(timings["torch"]),
    }


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    torch.manual_seed(0)
    most, rounds = (2, 5) if options.quick else (len(TOKENS), 21)
    lengths = [(1, tokens) for tokens in TOKENS[:most]] + [(each, each) for each in PROMPTS[:most]]
    with torch.inference_mode():
        rows = [measure(heads, *length, rounds) for heads in HEADS for length in lengths]
    harness.print_table(
        ["heads", "queries", "tokens", "torch, ms", "haq, ms", "times"],
        [
            [
                "{} / {}".format(*row["heads"]),
                str(row["queries"]),
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

"""What does it cost to run a layer's experts through the lanes when all of them are resident?

One int8 layer of Mixtral's real shape: D 4096, I 14336, 8 experts, 2 for each token, with both
tiers on the CPU, so that nothing is copied and nothing waits. Beside the experts as they are:
dividing the tokens by where their experts live, learning from the routing, and counting. The result
is checked first: the same bits.
"""

from typing import Any

import harness
import torch
from experts import CHOSEN, EXPERTS, HIDDEN, INNER, make, routing

from haq import Costs, OffloadConfig, RoutingStatistics
from haq.nn import Int8Experts
from haq.offload.build import make_machine, residents_of
from haq.offload.executor import Lanes
from haq.offload.placement import place
from haq.offload.weights import expert_weights

TOKENS = [1, 16, 128]
MOST_OVERHEAD = 0.05

# Of no consequence here: with everything resident nothing is decided.
COSTS = Costs(1e-3, 1e-5, 1e-2, 1e-3, 1e-2, 1e-4)


def lanes_of(experts: Int8Experts) -> Lanes:
    """The layer with every expert resident."""
    weights, device = expert_weights(experts), torch.device("cpu")
    statistics = RoutingStatistics(1, EXPERTS, CHOSEN)
    sizes = [weights.expert_bytes]
    placement = place("latency", statistics, COSTS, sizes, EXPERTS * weights.expert_bytes)
    machine = make_machine(device, OffloadConfig(), COSTS, placement, statistics, [weights])
    residents = residents_of(weights, placement.resident[0], device)
    assert len(residents) == EXPERTS
    return Lanes(0, "experts", weights, residents, machine)


def measure(experts: Int8Experts, lanes: Lanes, tokens: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(tokens, experts.up[0].in_features).bfloat16()
    index, weights = routing(tokens)
    assert torch.equal(lanes.run(x, index, weights), experts(x, index, weights))
    runs: dict[str, harness.Run] = {
        "experts": lambda: experts(x, index, weights),
        "lanes": lambda: lanes.run(x, index, weights),
    }
    timings = harness.time_in_turn(runs, rounds)
    return {
        "tokens": tokens,
        **{name: timing.to_dict() for name, timing in timings.items()},
        "overhead": 1 / timings["lanes"].times_faster_than(timings["experts"]) - 1,
    }


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    torch.manual_seed(0)
    shape = (512, 1024) if options.quick else (HIDDEN, INNER)
    with torch.inference_mode():
        _, experts = make(*shape)
        lanes = lanes_of(experts)
        rows = [measure(experts, lanes, n, 5 if options.quick else 21) for n in TOKENS]
    harness.print_table(
        ["tokens", "experts, ms", "lanes, ms", "overhead, %"],
        [
            [
                str(row["tokens"]),
                harness.milliseconds(row["experts"]),
                harness.milliseconds(row["lanes"]),
                f"{100 * row['overhead']:.1f}",
            ]
            for row in rows
        ],
    )
    if options.quick:
        return  # A small layer says nothing of the real one.
    worst = max(row["overhead"] for row in rows)
    met = worst <= MOST_OVERHEAD
    verdict = "met" if met else "MISSED"
    print(f"largest overhead {worst:.3f}, target at most {MOST_OVERHEAD:g}: {verdict}")
    targets = [{"name": "overhead", "value": worst, "target": MOST_OVERHEAD, "met": met}]
    harness.write_speed("lanes", facts, shape=list(shape), rows=rows, targets=targets)


if __name__ == "__main__":
    main()

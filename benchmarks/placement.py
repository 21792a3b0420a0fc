"""Which experts should live on the GPU, and does it matter? Four policies on recorded routing.

With 25, 50 and 75 % of the experts resident: the hit rate, its standard deviation over layers, and
the time of one token in the experts of all layers. The routing, of the reference data beside the
checkout (HAQ_SHARED), is that of

- Mixtral-8x7B, base and instruct, on seven subjects of MMLU: placed by all of them and judged on
  them, and placed by six and judged on the seventh, seven times;
- layers 0, 7 and 15 of Mixtral-8x7B and of OLMoE, in the same two ways with kinds of text;
- `tiny-mixtral`, token by token: placed by its routing of C4 and Wikitext-103, and judged by
  replaying its routing of Wikitext-2. There also: how many of a layer's experts can be told one to
  three layers before, and what parallel lanes and copies ahead bring.

No GPU takes part, and the costs are computed, not measured: bytes of an int8 expert over the
bandwidth of what reads them, for one token, whose products hide behind the reading. Desktop: an
RTX 4090 (1 TB/s), two channels of DDR5 (80 GB/s), PCIe 4 (24 GB/s); server: an H200 (4.8 TB/s), a
CPU with 400 GB/s, PCIe 5 (50 GB/s). A round trip is taken to be 30 us on both. OLMoE's experts have
6.3 MB; all others are taken to have the 176 MB of Mixtral-8x7B.

    python benchmarks/placement.py            about a quarter of a minute on one core
    python benchmarks/placement.py --quick    a few seconds
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from quality import CALIBRATION, SHARED, TEXTS, print_targets, target
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import haq
from haq import Costs, RoutingStatistics
from haq.offload.placement import POLICIES, Placement, expected_seconds, place
from haq.offload.recall import prediction_recall

Row = dict[str, Any]

ROUTING = SHARED / "data/routing"
SUBJECTS = ROUTING / "mixtral-popularity-mmlu"
TRAINED = SHARED / "models/tiny-mixtral"

SHARES = (0.25, 0.5, 0.75)
BYTES = 3 * 4096 * 14336
BYTES_OLMOE = 3 * 2048 * 1024
ROUND_TRIP = 30e-6

# Experts for which there is room beside the residents, where copies are made ahead.
SPARE = 4

# Targets: expected seconds of "latency" over those of the best other policy; spread over layers of
# "path" over that of "popularity"; how far its hit rate is below.
TIME, SPREAD, HIT_RATE = 1, 0.5, 0.01


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second: of the GPU's memory, of the CPU's, and of the way between them."""

    gpu: float
    cpu: float
    link: float

    def costs(self, expert_bytes: int) -> Costs:
        return Costs(
            gpu_expert=expert_bytes / self.gpu,
            gpu_token=0.0,
            cpu_expert=expert_bytes / self.cpu,
            cpu_token=0.0,
            copy=expert_bytes / self.link,
            round_trip=ROUND_TRIP,
        )


MACHINES = {"desktop": Bandwidths(1e12, 80e9, 24e9), "server": Bandwidths(4.8e12, 400e9, 50e9)}


@dataclass(frozen=True)
class Source:
    """Routing of one model on several kinds of text: int64 ``[L, E]`` by kind."""

    name: str
    counts: dict[str, NDArray[np.int64]]
    experts_per_token: int
    expert_bytes: int

    def statistics(self, *kinds: str) -> RoutingStatistics:
        total = np.sum([self.counts[kind] for kind in kinds], axis=0)
        return RoutingStatistics.from_counts(total, experts_per_token=self.experts_per_token)


# --- popularity ----------------------------------------------------------------------------------


def sources() -> Iterator[Source]:
    for name, folder in (("base", "mixtral_8x7b_original"), ("instruct", "mixtral_8x7b_instruct")):
        files = sorted((SUBJECTS / folder).glob("*.json"))
        if not files:
            missing(f"Mixtral-8x7B, {name}", SUBJECTS / folder)
            continue
        counts = {
            file.stem.removeprefix("expert_popularity_"): np.array(
                json.loads(file.read_text())["expert_popularity"]
            )
            for file in files
        }
        yield Source(f"Mixtral-8x7B, {name}", counts, 2, BYTES)
    for name, file, expert_bytes in (
        ("Mixtral-8x7B, 3 layers", "mixtral8x7b_routing.json", BYTES),
        ("OLMoE, 3 layers", "olmoe1b7b_routing.json", BYTES_OLMOE),
    ):
        if not (ROUTING / file).is_file():
            missing(name, ROUTING / file)
            continue
        values = json.loads((ROUTING / file).read_text())
        counts = {kind: np.array(v["counts"]) for kind, v in values["domains"].items()}
        yield Source(name, counts, values["top_k"], expert_bytes)


def missing(name: str, path: Path) -> None:
    print(f"{name}: skipped, it needs the reference data: {path} is not there (set HAQ_SHARED)\n")


def placements(
    routing: RoutingStatistics, expert_bytes: int
) -> Iterator[tuple[Row, Costs, Placement]]:
    """Every policy, share and machine."""
    layers = len(routing.layers)
    for machine, bandwidths in MACHINES.items():
        costs = bandwidths.costs(expert_bytes)
        for share in SHARES:
            budget = round(share * layers * routing.num_experts) * expert_bytes
            for policy in POLICIES:
                placement = place(policy, routing, costs, [expert_bytes] * layers, budget)
                row = {
                    "machine": machine,
                    "share": share,
                    "policy": policy,
                    "resident": placement.num_resident,
                    "expected_seconds": placement.seconds,
                }
                yield row, costs, placement


def judged_by_popularity(
    placed_by: RoutingStatistics, judged_by: RoutingStatistics, expert_bytes: int
) -> Iterator[Row]:
    shares = judged_by.popularity / judged_by.experts_per_token
    for row, costs, placement in placements(placed_by, expert_bytes):
        pairs = zip(shares, placement.resident, strict=True)
        rates = [share[list(experts)].sum() for share, experts in pairs]
        row["hit_rate"], row["spread"] = float(np.mean(rates)), float(np.std(rates))
        row["seconds"] = expected_seconds(placement.resident, judged_by, costs)
        yield row


def measure(source: Source, kinds_left_out: int | None) -> list[Row]:
    """On the text that it was placed by, and on each kind of text that it was not."""
    kinds = list(source.counts)
    everything = source.statistics(*kinds)
    cases: list[tuple[str | None, RoutingStatistics, RoutingStatistics]]
    cases = [(None, everything, everything)]
    for kind in kinds[:kinds_left_out]:
        others = source.statistics(*(other for other in kinds if other != kind))
        cases.append((kind, others, source.statistics(kind)))
    return [
        {"source": source.name, "left_out": left_out, **row}
        for left_out, placed_by, judged_by in cases
        for row in judged_by_popularity(placed_by, judged_by, source.expert_bytes)
    ]


# --- traces --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """How the trained model routes: what it is placed by, and the trace that it is judged on."""

    routing: RoutingStatistics
    trace: NDArray[np.int64]


def record(windows: int, length: int = 128) -> Trained:
    """Statistics of so many windows of each of two corpora, a trace of as many of a third."""
    model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    seen = [
        batch
        for text in (CALIBRATION, TEXTS["c4"])
        for batch in haq.calibration_batches(
            tokenizer, text, num_samples=windows, sequence_length=length
        )
    ]
    ids = haq.evaluation_tokens(tokenizer, [TEXTS["wikitext2"].read_text(encoding="utf-8")])
    unseen = ids[:, : 2 * windows * length].reshape(-1, length)
    return Trained(
        RoutingStatistics.collect(model, torch.cat(seen).split(16)),
        haq.routing_trace(model, unseen.split(16)),
    )


def measure_trained(trained: Trained) -> list[Row]:
    rows = []
    for row, costs, placement in placements(trained.routing, BYTES):
        result = haq.simulate(trained.trace, placement, costs)
        row["hit_rate"], row["spread"] = result.hit_rate, result.spread_over_layers
        row["seconds"] = result.seconds_per_token
        row["layers_without_round_trip"] = result.layers_without_round_trip
        rows.append({"source": TRAINED.name, "left_out": "wikitext2", **row})
    return rows


def measure_prediction(trained: Trained) -> list[Row]:
    return [
        {"ahead": ahead, **prediction_recall(trained.routing, trained.trace, 2, ahead)}
        for ahead in (1, 2, 3)
    ]


def measure_lanes(trained: Trained, tokens: int) -> list[Row]:
    """Half of the experts resident: one lane after the other, side by side, and with copies.

    Copies take room, so the same room for more residents stands beside them. The third machine is
    a desktop whose CPU is slower than the way from it, as without instructions for int8.
    """
    machines = MACHINES | {"slow CPU": Bandwidths(1e12, 10e9, 24e9)}
    layers, trace = len(trained.routing.layers), trained.trace[:tokens]
    half = layers * trained.routing.num_experts // 2
    rows = []
    for machine, bandwidths in machines.items():
        costs = bandwidths.costs(BYTES)
        placement, larger = (
            place("latency", trained.routing, costs, [BYTES] * layers, experts * BYTES)
            for experts in (half, half + SPARE)
        )
        runs = {
            "one lane after the other": haq.simulate(trace, placement, costs, lanes="sequential"),
            "in parallel": haq.simulate(trace, placement, costs),
            f"and {SPARE} more residents": haq.simulate(trace, larger, costs),
        }
        for ahead in (1, 2, 3):
            runs[f"and room for {SPARE} copies, {ahead} ahead"] = haq.simulate(
                trace,
                placement,
                costs,
                statistics=trained.routing,
                prefetch=True,
                spare=SPARE,
                ahead=ahead,
            )
        rows += [{"machine": machine, "lanes": name, **run.to_dict()} for name, run in runs.items()]
    return rows


# --- what is shown -------------------------------------------------------------------------------


def averaged(rows: list[Row]) -> list[Row]:
    """Rows of several kinds of text, each left out in turn, as one for each setting and policy."""
    keys = ("hit_rate", "spread", "seconds", "expected_seconds")
    cells: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["machine"], row["share"], row["policy"]), []).append(row)
    return [
        {
            **same[0],
            "left_out": "each in turn",
            **{key: statistics.fmean(row[key] for row in same) for key in keys},
        }
        for same in cells.values()
    ]


def print_rows(title: str, rows: list[Row]) -> None:
    """A table of one source on one text."""
    head = [title]
    for machine in MACHINES:
        head += [f"{machine}: hit rate", "spread", "ms"]
    table = []
    for share in SHARES:
        for policy in POLICIES:
            cells = [f"{share:.0%} {policy}"]
            for row in rows:
                if (row["share"], row["policy"]) == (share, policy):
                    cells += [f"{row['hit_rate']:.4f}", f"{row['spread']:.4f}"]
                    cells.append(f"{1e3 * row['seconds']:.3f}")
            table.append(cells)
    harness.print_table(head, table)


def print_prediction(rows: list[Row]) -> None:
    names = ["transitions", "popularity", "lru"]
    harness.print_table(
        [f"{TRAINED.name}: recall in 2 of 8", *names],
        [[f"{row['ahead']} ahead", *(f"{row[name]:.3f}" for name in names)] for row in rows],
    )


def print_lanes(rows: list[Row]) -> None:
    cells = [
        [
            f"{row['machine']}, {row['lanes']}",
            f"{1e3 * row['seconds_per_token']:.3f}",
            f"{row['hit_rate']:.4f}",
            f"{max(row['overlap'], 0):.2f}",
            str(row["copied"]),
            str(row["prefetches_used"]),
        ]
        for row in rows
    ]
    head = [f"{TRAINED.name}: 50% latency", "ms", "hit rate", "overlap", "copied", "used"]
    harness.print_table(head, cells)


def settings(rows: list[Row]) -> Iterator[dict[str, Row]]:
    """Rows by policy, of one text, machine and share each."""
    found: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        setting = row["left_out"], row["machine"], row["share"]
        found.setdefault(setting, {})[row["policy"]] = row
    yield from found.values()


def largest_ratio(rows: list[Row], key: str) -> float:
    """Seconds of "latency" over those of the best other policy, in the worst setting."""
    others = [policy for policy in POLICIES if policy != "latency"]
    ratios = [by["latency"][key] / min(by[other][key] for other in others) for by in settings(rows)]
    return float(max(ratios))


def targets(name: str, rows: list[Row]) -> list[dict[str, Any]]:
    """For one source, in its worst setting."""
    pairs = [(by["path"], by["popularity"]) for by in settings(rows)]
    spread = max(path["spread"] / popularity["spread"] for path, popularity in pairs)
    below = max(popularity["hit_rate"] - path["hit_rate"] for path, popularity in pairs)
    # Rounded, since equal sums are taken in another order.
    time = round(largest_ratio(rows, "expected_seconds"), 9)
    return [
        target(f"{name}: expected time, latency over the best other", time, TIME),
        target(f"{name}: spread over layers, path over popularity", spread, SPREAD),
        target(f"{name}: hit rate, path below popularity", below, HIT_RATE),
    ]


def main() -> None:
    quick = harness.arguments(__doc__).quick
    logging.disable_progress_bar()
    facts = harness.card()
    harness.print_card(__doc__, facts)
    for machine, bandwidths in MACHINES.items():
        one = bandwidths.costs(BYTES)
        print(
            f"{machine}: an expert of Mixtral-8x7B takes {1e3 * one.gpu_expert:.3f} ms on the "
            f"GPU, {1e3 * one.cpu_expert:.3f} on the CPU, {1e3 * one.copy:.3f} from there to here"
        )
    print()
    rows: list[Row] = []
    found: list[dict[str, Any]] = []
    content: dict[str, list[Row]] = {}
    other_text: dict[str, float] = {}
    for source in sources():
        new = measure(source, 1 if quick else None)
        seen = [row for row in new if row["left_out"] is None]
        unseen = [row for row in new if row["left_out"] is not None]
        rows += seen + averaged(unseen)
        print_rows(source.name, seen)
        print_rows(f"{source.name}, other text", averaged(unseen))
        found += targets(source.name, seen)
        other_text[source.name] = largest_ratio(unseen, "seconds")
    if TRAINED.is_dir() and CALIBRATION.is_file():
        trained = record(windows=8 if quick else 96)
        new = measure_trained(trained)
        print_rows(f"{TRAINED.name}, other text", new)
        found += targets(TRAINED.name, new)
        rows += new
        other_text[TRAINED.name] = largest_ratio(new, "seconds")
        content["prediction"] = measure_prediction(trained)
        print_prediction(content["prediction"])
        content["lanes"] = measure_lanes(trained, tokens=500 if quick else 8000)
        print_lanes(content["lanes"])
    else:
        missing(TRAINED.name, TRAINED)
    for name, ratio in other_text.items():
        print(f"{name}: on other text, latency over the best other {ratio:.4f} at worst")
    print_targets(found)
    if not quick:
        costs = {name: bandwidths.costs(BYTES).to_dict() for name, bandwidths in MACHINES.items()}
        content["rows"] = rows
        harness.write(
            "placement",
            facts,
            costs=costs,
            targets=found,
            worst_on_other_text=other_text,
            **content,
        )


if __name__ == "__main__":
    main()

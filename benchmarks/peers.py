"""How fast are others that make these models int8, beside haq in the same minute?

    make peers                       sets up an environment with all of them, in .venv-peers
    python benchmarks/peers.py       in an environment with some of them, about 25 minutes
    python benchmarks/peers.py --peer torchao     one of them
    python benchmarks/peers.py --nearest          the two that come nearest, about ten minutes

Every peer runs on every shape in a process of its own, which has transformers in bfloat16 and haq
as well, and all are timed in turn. Where a peer makes the head int8, too, it is compared with haq
with an int8 head. Another process, which holds the peer alone, tells how much memory it takes once
it is converted. The logits are compared with those of bfloat16: it has to be the same model, and
the error is in the table. What fails is a row that says why.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from peers_run import HAQ, HAQ_WITH_HEAD, LLAMA_CPP

COMPILED = "torchao, compiled"

# What to install, by peer.
PEERS = {
    LLAMA_CPP: "llama-cpp-python",
    "torch.ao": "torch",
    "optimum-quanto": "optimum-quanto",
    "torchao": "torchao",
    COMPILED: "torchao",
    "torchao, experts by name": "torchao",
    "bitsandbytes": "bitsandbytes",
}
NEAREST = [LLAMA_CPP, "torch.ao"]
ONLY_MIXTURES = {"torchao, experts by name"}

# Their memory is that of another one, and what their compiler takes.
NO_MEMORY = {COMPILED}
ALONE = ["bf16", HAQ, HAQ_WITH_HEAD]

# A long one takes bfloat16 a minute where there are no instructions for it.
PROMPT = shapes.LONG_PROMPT if torch.cpu._is_avx512_bf16_supported() else shapes.PROMPT

# So long a peer has for all its shapes; the compiler takes a minute for each of six graphs. And so
# long its memory may take.
SECONDS_PER_PEER = 240
SECONDS_WITH_COMPILER = 420
SECONDS_FOR_MEMORY = 90

# To see that all of it runs: of one layer.
QUICK_SHAPES = ["llama-2048", "mixtral-1024"]


class Process:
    """What a process of `peers_run.py` found."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = [f"--threads={torch.get_num_threads()}", f"--prompt={PROMPT}"]
        self._options += ["--quick"] if options.quick else []

    def __call__(self, what: str, peer: str, shape: str, seconds: float) -> dict[str, Any]:
        if seconds <= 0:
            return {"failed": "the time of this peer is used up"}
        result = self._folder / "result.json"
        result.unlink(missing_ok=True)
        script = Path(__file__).with_name("peers_run.py")
        command = [sys.executable, script, what, peer, shape, self._folder, result, *self._options]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            so_far = json.loads(result.read_text()) if result.exists() else {}
            return {**so_far, "failed": f"not done after {seconds:.0f} s"}
        for line in done.stdout.splitlines():
            if line.startswith(harness.DISTURBED):
                print(line)
        if result.exists():
            content: dict[str, Any] = json.loads(result.read_text())
            return content
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"failed": f"the process ended with {done.returncode}: {last[0]}"}


def shapes_of(peer: str, quick: bool) -> list[str]:
    """Those that a peer runs on."""
    if quick and peer == COMPILED:
        return QUICK_SHAPES[:1]
    names = QUICK_SHAPES if quick else list(shapes.SHAPES)
    return [name for name in names if peer not in ONLY_MIXTURES or name.startswith("mixtral")]


def measure(process: Process, peer: str, quick: bool) -> list[dict[str, Any]]:
    """All shapes of one peer."""
    rows: list[dict[str, Any]] = []
    left = float(SECONDS_WITH_COMPILER if peer == COMPILED else SECONDS_PER_PEER)
    for shape in shapes_of(peer, quick):
        labels = {"peer": peer, "shape": shape}
        start = time.perf_counter()
        found = process("times", peer, shape, left)
        left -= time.perf_counter() - start
        if "failed" in found:
            rows.append({**labels, "failed": found.pop("failed")})
            print(f"{peer}, {shape}: {rows[-1]['failed']}", flush=True)
        if "rows" not in found:
            continue
        memory = {}
        if peer not in NO_MEMORY and not quick:
            memory = process("memory", peer, shape, SECONDS_FOR_MEMORY)
        for row in found.pop("rows"):
            print(f"{peer}, {shape}, {row['work']}: {row['haq_times']:.2f}", flush=True)
            rows.append({**labels, **found, **row, "memory": memory})
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        if "failed" in row:
            continue
        run = row["runs"][row["peer"]]
        notes = ["head too"] if row["int8_head"] else []
        notes += ["experts stay bf16"] if row["int8_experts"] is False else []
        memory = row["memory"].get("peak_rss_bytes")
        cells.append(
            [
                row["peer"],
                row["shape"],
                row["work"],
                harness.milliseconds(run),
                f"{run['times_bf16']:.2f}" if "times_bf16" in run else "",
                f"{row['haq_times']:.2f}",
                f"{memory / 2**20:.0f}" if memory else "",
                f"{row['logits_error']:.3f}",
                ", ".join(notes),
            ]
        )
    head = ["peer", "shape", "work", "ms", "times bf16", "haq times", "MB", "error", "int8"]
    if cells:
        harness.print_table(head, cells)
    for row in rows:
        if "failed" in row:
            print(f"{row['peer']}, {row['shape']} failed: {row['failed']}")


def memory_alone(process: Process) -> dict[str, dict[str, dict[str, Any]]]:
    """Of bfloat16 and haq, by shape and name."""
    found = {
        shape: {name: process("memory", name, shape, SECONDS_FOR_MEMORY) for name in ALONE}
        for shape in shapes.SHAPES
    }
    for shape, results in found.items():
        sizes = (f"{n} {r.get('peak_rss_bytes', 0) / 2**20:.0f}" for n, r in results.items())
        print(f"{shape}, MB:", ", ".join(sizes))
    return found


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        harness.target(f"{row['peer']}, {row['shape']}, {row['work']}, haq", row["haq_times"], 1)
        for row in rows
        if "failed" not in row
    ]


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in sorted(set(PEERS.values())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    choice = {"peer": f"one of {', '.join(PEERS)}"}
    options = harness.arguments(__doc__, choice, nearest=f"{' and '.join(NEAREST)}")
    if options.peer not in (None, *PEERS):
        sys.exit(f"`--peer` must be one of {', '.join(PEERS)}; got {options.peer!r}.")
    facts = harness.card()
    harness.print_card(__doc__, facts)
    installed = (f"{name} {version or 'not installed'}" for name, version in versions().items())
    print("peers    ", ", ".join(installed), end="\n\n")
    names = [options.peer] if options.peer else NEAREST if options.nearest else list(PEERS)
    print("How many times as fast haq is:")
    with tempfile.TemporaryDirectory() as folder:
        process = Process(Path(folder), options)
        rows = [row for name in names for row in measure(process, name, options.quick)]
        memory = {} if options.quick else memory_alone(process)
    print()
    print_rows(rows)
    if options.quick:
        return  # Of the last layer llama.cpp computes only the last token: here it is all there is.
    targets = targets_of(rows)
    if not options.peer:
        harness.write_speed(
            "peers_nearest" if options.nearest else "peers",
            facts,
            prompt=PROMPT,
            peers=versions(),
            memory=memory,
            rows=rows,
            targets=targets,
        )


if __name__ == "__main__":
    main()

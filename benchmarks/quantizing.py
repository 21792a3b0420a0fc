"""How long does it take to quantize a decoder block, by step, and beside llm-compressor?

    make peers                           sets up an environment with llm-compressor, in .venv-peers
    python benchmarks/quantizing.py      about eight minutes; without llm-compressor
                                         haq alone

Blocks of Llama-7B's shape (D 4096, I 11008, 32 heads) with random weights in bfloat16, two of them
and a small vocabulary; random tokens, the same for both. haq does all that `haq.quantize_model`
does, the search for scales and the report included; llm-compressor does its documented recipe for
W8A8, SmoothQuant and GPTQ. Each runs in a process of its own: haq before the other and after it,
for the machine is another one from one minute to the next, and what counts is the mean of both.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from quantizing_run import LAYERS, LENGTH

WINDOWS, QUICK_WINDOWS = 8, 2
TIMES_LLM_COMPRESSOR = 3

HAQ, LLM_COMPRESSOR = "haq", "llm-compressor"
SECONDS_AT_MOST = 600


def quantize(library: str, quick: bool) -> dict[str, Any]:
    """What `quantizing_run.py` found, or why it did not."""
    script = Path(__file__).with_name("quantizing_run.py")
    windows = QUICK_WINDOWS if quick else WINDOWS
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, script, library, result]
        command += [f"--threads={torch.get_num_threads()}", f"--windows={windows}"]
        command += ["--quick"] if quick else []
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=SECONDS_AT_MOST
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {SECONDS_AT_MOST} s"}
        if result.exists():
            return {"tokens": windows * LENGTH, **json.loads(result.read_text())}
    return {"failed": (done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"])[0]}


def mean_of(*runs: dict[str, Any]) -> dict[str, Any]:
    """Of several runs of one library; one that failed, if one did."""
    failed = [run for run in runs if "failed" in run]
    if failed:
        return failed[0]
    seconds = {
        name: statistics.mean(run[name] for run in runs)
        for name in ("seconds_per_block", "cpu_seconds_per_block")
    }
    steps = {step: statistics.mean(run["steps"][step] for run in runs) for step in runs[0]["steps"]}
    of_each = {"seconds_per_block_of_each_run": [run["seconds_per_block"] for run in runs]}
    return {**runs[0], **seconds, **of_each, "steps": steps}


def print_results(results: dict[str, dict[str, Any]]) -> None:
    for library, found in results.items():
        if "failed" in found:
            print(f"{library} failed: {found['failed']}\n")
            continue
        seconds = found["seconds_per_block"]
        print(f"{library} {found['version']}: {seconds:.1f} s a block, {found['tokens']} tokens")
        steps = sorted(found["steps"].items(), key=lambda item: -item[1])
        harness.print_table(
            ["step", "s", "%"],
            [[step, f"{taken:.1f}", f"{100 * taken / seconds:.0f}"] for step, taken in steps],
        )


def main() -> None:
    options = harness.arguments(__doc__)
    facts = harness.card()
    harness.print_card(__doc__, facts)
    before, other, after = (quantize(name, options.quick) for name in (HAQ, LLM_COMPRESSOR, HAQ))
    results = {HAQ: mean_of(before, after), LLM_COMPRESSOR: other}
    print_results(results)
    if any("failed" in found for found in results.values()):
        targets = []
    else:
        haq, other = (results[name]["seconds_per_block"] for name in (HAQ, LLM_COMPRESSOR))
        targets = [harness.target("times llm-compressor", other / haq, TIMES_LLM_COMPRESSOR)]
    if not options.quick:
        shape = {"layers": LAYERS, "window": LENGTH, "windows": WINDOWS}
        harness.write_speed("quantizing", facts, shape=shape, results=results, targets=targets)


if __name__ == "__main__":
    main()

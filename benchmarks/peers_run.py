"""One peer on one shape, in a process of its own: run by `peers.py`.

    python peers_run.py times PEER SHAPE FOLDER RESULT.json     beside bfloat16 and haq, in turn
    python peers_run.py memory PEER SHAPE FOLDER RESULT.json    alone: the most memory it takes

FOLDER keeps what is written for a peer. The result says what failed, if something did.
"""

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LLAMA_CPP = "llama.cpp Q8_0"
HAQ, HAQ_WITH_HEAD = "haq", "haq, head too"
ROUNDS, QUICK_ROUNDS, MOST_SECONDS = 21, 3, 10

# Processors without instructions for bfloat16 take ten times as long: a prompt is then left out.
MOST_SECONDS_OF_BF16 = 2.0

# Relative errors of logits. The noise of int8 is a few hundredths, and of seven bits twice that;
# above this it is another model.
MOST_ERROR, MOST_ERROR_OF_PEERS = 0.1, 0.5


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Decoding and a long prompt: milliseconds, and how many times as fast haq is."""
    import harness
    import peers_torch
    import roofline
    import shapes
    import torch

    model = shapes.build(options.shape, 1 if options.quick else None)
    int8 = shapes.int8_copy(model)
    works = shapes.works(options.prompt)
    models = {"bf16": model, HAQ: int8, HAQ_WITH_HEAD: shapes.with_int8_head(int8)}
    if options.peer == LLAMA_CPP:
        has_experts = hasattr(model.config, "num_local_experts")
        facts = {"int8_head": True, "int8_experts": True if has_experts else None}
        peer = llama_works(options, model)
    else:
        other = peers_torch.PEERS[options.peer](shapes.with_own_modules(model))
        facts = {
            "int8_head": peers_torch.head_is_int8(other),
            "int8_experts": peers_torch.experts_are_int8(other),
        }
        peer = {work: lambda start=start: start(other) for work, start in works.items()}
    same_head = HAQ_WITH_HEAD if facts["int8_head"] else HAQ
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    rows = []
    for work, start in works.items():
        runs = {name: start(each) for name, each in models.items()} | {options.peer: peer[work]()}
        started, logits = time.perf_counter(), {}
        for name, run in runs.items():
            logits[name] = torch.as_tensor(run()).double().flatten()
            if name == "bf16":
                bf16_seconds = time.perf_counter() - started
        errors = {
            name: float((each - logits["bf16"]).norm() / logits["bf16"].norm())
            for name, each in logits.items()
        }
        for name, error in errors.items():
            most = MOST_ERROR_OF_PEERS if name == options.peer else MOST_ERROR
            assert error < most, f"another model: the logits of {name} are off by {error:.2f}"
        if work == "prefill":  # The head of one token is nothing in it.
            baseline = ["bf16"] if bf16_seconds < MOST_SECONDS_OF_BF16 else []
            runs = {name: runs[name] for name in (*baseline, same_head, options.peer)}
        timings = harness.time_in_turn(runs, rounds, MOST_SECONDS)
        faster = timings[same_head].times_faster_than(timings[options.peer])
        labels = {"work": work, "haq": same_head, "haq_times": faster}
        labels |= {"logits_error": errors[options.peer], "haq_logits_error": errors[same_head]}
        rows.append(roofline.row(labels, timings))
        write(options, {**facts, "rows": rows})  # The next work may take longer than there is time.
    return {**facts, "rows": rows}


def write(options: argparse.Namespace, result: Mapping[str, Any]) -> None:
    Path(options.result).write_text(json.dumps(result))


def llama_works(options: argparse.Namespace, model: Any) -> dict[str, Callable[[], Any]]:
    """What starts decoding, and a long prompt, in llama.cpp; written first, if it is not there."""
    import peers_llama

    path = Path(options.folder, f"{options.shape}.gguf")
    if model is not None:
        peers_llama.write(model, path)
    other = peers_llama.LlamaCpp(path, options.threads)
    prompts = [list(range(1, length + 1)) for length in (129, options.prompt)]
    if model is not None:
        import shapes

        prompts = [shapes.prompt(len(tokens))[0].tolist() for tokens in prompts]
    return {
        "decode": lambda: other.decoder(prompts[0]),
        "prefill": lambda: other.prefill(prompts[1]),
    }


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """The most resident memory while it decodes and while it reads a long prompt, and before."""
    if options.peer == LLAMA_CPP:
        before = status("VmRSS")
        starts: Mapping[str, Callable[[], Any]] = llama_works(options, None)
    else:
        import peers_torch
        import shapes

        before = status("VmRSS")
        model = shapes.build(options.shape, 1 if options.quick else None)
        model = peers_torch.PEERS[options.peer](model)
        works = shapes.works(options.prompt)
        starts = {work: lambda start=start: start(model) for work, start in works.items()}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Forget the most memory so far.
    for start in starts.values():
        run = start()
        run()
        run()
    return {"peak_rss_bytes": status("VmHWM"), "rss_before_bytes": before}


def status(name: str) -> int:
    """One of the numbers that Linux has of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":") for line in lines)[name].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["times", "memory"])
    for name in ("peer", "shape", "folder", "result"):
        parser.add_argument(name)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True, help="tokens of the long prompt")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    work = {"times": times, "memory": memory}[options.what]
    try:
        result = without_gradients(work, options)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        lines = str(error).strip().splitlines()
        path = Path(options.result)
        result = json.loads(path.read_text()) if path.exists() else {}
        result |= {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    write(options, result)


def without_gradients(
    work: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    if options.peer == LLAMA_CPP and options.what == "memory":
        return work(options)  # Without torch, which would be most of it.
    import torch

    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        return work(options)


if __name__ == "__main__":
    main()

"""The main job on small trained models: load, quantize, compare, save, load again, generate.

    python examples/quickstart.py
    python examples/quickstart.py facebook/opt-125m      # any causal language model of the hub

Without an argument it uses two models of this repository, trained on Python's standard library, so
it needs no network: an OPT, and a Mixtral with eight experts, each of which becomes int8 as well.
Calibration and evaluation read the standard library of the Python that runs this; the evaluation
text was kept out of the training.
"""

import argparse
import copy
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_models.corpus import standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import haq

TINY_MODELS = Path(__file__).parent / "tiny_models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a directory or a hub name")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens to compare on")
    arguments = parser.parse_args()
    if arguments.model:
        show(arguments.model, arguments.tokens)
        return
    for name in ("opt-python", "mixtral-python"):
        print(f"\n=== {name} ===\n")
        show(TINY_MODELS / name, arguments.tokens)
    print(f"\nint8 products on this machine:\n{haq.backends()}")


def show(name: str | Path, tokens: int) -> None:
    """Quantize one model, and show what it cost and what it writes."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    reference = copy.deepcopy(model)

    # The three lines that matter.
    calibration = haq.calibration_batches(
        tokenizer, standard_library("train"), num_samples=64, sequence_length=256
    )
    started = time.perf_counter()
    haq.quantize_model(model, calibration)
    seconds = time.perf_counter() - started

    print(fitting(haq.quantization_report(model)))
    print(f"\nQuantized in {seconds:.0f} s. Weights: {megabytes(reference)} -> {megabytes(model)}.")

    text = haq.evaluation_tokens(tokenizer, standard_library("held_out"))
    print("\nfloat32 -> int8, on held-out text:")
    print(haq.compare(reference, model, text[:, :tokens], sequence_length=256))

    with tempfile.TemporaryDirectory() as folder:
        haq.save_pretrained(model, folder, tokenizer)
        loaded = haq.from_pretrained(folder)

    prompt = tokenizer("def", return_tensors="pt")
    for kind, each in (("float32", reference), ("int8, saved and loaded,", loaded)):
        written = each.generate(**prompt, max_new_tokens=40, do_sample=False)
        print(f"\n{kind} writes:\n{tokenizer.decode(written[0], skip_special_tokens=True)}")


def fitting(report: haq.QuantizationReport) -> str:
    """Every layer, if a terminal is wide enough for that, else the summary."""
    width = max(len(line) for line in str(report).partition("\n\n")[0].splitlines())
    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < width
    return report.summary() if narrow else str(report)


def megabytes(model: PreTrainedModel) -> str:
    """What the model's state takes, each tensor once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return f"{sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()

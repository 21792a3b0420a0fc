"""The main job on a small trained model: load, quantize, compare, generate.

    python examples/quickstart.py
    python examples/quickstart.py facebook/opt-125m      # any causal language model of the hub

Without an argument it uses a model of this repository, trained on Python's standard library, so it
needs no network. Calibration and evaluation read the standard library of the Python that runs this;
the evaluation text was kept out of the training.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from tiny_models.corpus import standard_library
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import haq

TINY_OPT = Path(__file__).parent / "tiny_models" / "opt-python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=TINY_OPT, help="a directory or a hub name")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens to compare on")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    reference = copy.deepcopy(model)

    # The three lines that matter.
    calibration = haq.calibration_batches(
        tokenizer, standard_library("train"), num_samples=64, sequence_length=256
    )
    started = time.perf_counter()
    haq.quantize_model(model, calibration)
    seconds = time.perf_counter() - started

    print(haq.quantization_report(model))
    print(f"\nQuantized in {seconds:.0f} s. Weights: {megabytes(reference)} -> {megabytes(model)}.")
    print(f"\nint8 products on this machine:\n{haq.backends()}")

    text = haq.evaluation_tokens(tokenizer, standard_library("held_out"))
    print("\nfloat32 -> int8, on held-out text:")
    print(haq.compare(reference, model, text[:, : arguments.tokens], sequence_length=256))

    prompt = tokenizer("def", return_tensors="pt")
    for name, each in (("float32", reference), ("int8", model)):
        written = each.generate(**prompt, max_new_tokens=40, do_sample=False)
        print(f"\n{name} writes:\n{tokenizer.decode(written[0], skip_special_tokens=True)}")


def megabytes(model: PreTrainedModel) -> str:
    """What the model's state takes, each tensor once."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return f"{sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()

"""Quantizes a model by haq or by llm-compressor and takes the time: run by `quantizing.py`.

    python quantizing_run.py haq|llm-compressor RESULT.json --threads 2 --windows 4

The steps are timed from outside, by functions around those of the libraries.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path

import shapes
import torch
from clock import Clock
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

LAYERS, LENGTH, VOCABULARY = 2, 512, 1024
QUICK = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}

# Where each step is: module, name, step. What is in none of them is "other".
HAQ = "haq.quantization"
STEPS_OF_HAQ = [
    (f"{HAQ}.pipeline", "capture_block_inputs", "calibration passes"),
    (f"{HAQ}.work", "BlockWork.__init__", "float32 copy"),
    (f"{HAQ}.block", "find_groups", "finding groups"),
    (f"{HAQ}.work", "BlockWork.observe_sample", "calibration passes"),
    (f"{HAQ}.work", "BlockWork.observe_rest", "calibration passes"),
    (f"{HAQ}.work", "BlockWork.observe_int8", "calibration passes"),
    (f"{HAQ}.hessian", "SecondMoment.update", "Hessian"),
    (f"{HAQ}.layers", "triangular_root", "Hessian"),
    (f"{HAQ}.work", "BlockWork.smooth", "smoothing search"),
    (f"{HAQ}.work", "BlockWork.choose_zero_points", "zero points"),
    (f"{HAQ}.layers", "round_with_compensation", "rounding"),
    (f"{HAQ}.work", "BlockWork.round_with_hessian", "packing"),
    (f"{HAQ}.work", "BlockWork.round_to_nearest", "packing"),
    (f"{HAQ}.work", "BlockWork.output_errors", "report"),
    (f"{HAQ}.pipeline", "run_block", "propagation"),
]
LLM = "llmcompressor.modifiers"
STEPS_OF_LLM_COMPRESSOR = [
    (f"{LLM}.gptq.base", "accumulate_hessian", "Hessian"),
    (f"{LLM}.gptq.base", "quantize_weight", "rounding"),
    (f"{LLM}.gptq.base", "GPTQModifier.compress_modules", "rounding"),
    (f"{LLM}.transform.smoothquant.base", "SmoothQuantModifier._apply_smoothing", "smoothing"),
]


def model_of(quick: bool) -> PreTrainedModel:
    """Two layers of Llama-7B's shape with a small vocabulary."""
    shape = {**shapes.LLAMA_4096, **(QUICK if quick else {}), "num_hidden_layers": LAYERS}
    shape["num_key_value_heads"] = shape["num_attention_heads"]
    return shapes.build_from(LlamaConfig(**shape, vocab_size=VOCABULARY))


def windows_of(count: int) -> list[Tensor]:
    """Random tokens, int64 ``[1, 512]`` each."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCABULARY, (1, LENGTH), generator=generator) for _ in range(count)]


def by_haq(model: PreTrainedModel, windows: list[Tensor]) -> None:
    import haq

    haq.quantize_model(model, windows, progress=False)
    report = haq.quantization_report(model)
    assert all(layer.rounding == "hessian" for block in report.blocks for layer in block.layers)


def by_llm_compressor(model: PreTrainedModel, windows: list[Tensor]) -> None:
    """Its documented recipe for W8A8."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    # It insists on a tokenizer and on a folder with the configuration, and uses neither.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ]
    folder = tempfile.TemporaryDirectory()
    model.config.save_pretrained(folder.name)
    model.config._name_or_path = model.name_or_path = folder.name
    rows = [{"input_ids": w[0], "attention_mask": torch.ones_like(w[0])} for w in windows]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=1),
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=LENGTH,
    )
    schemes = [m for m in model.modules() if getattr(m, "quantization_scheme", None) is not None]
    assert len(schemes) == 7 * LAYERS, f"{len(schemes)} layers were quantized"


LIBRARIES = {
    "haq": (by_haq, STEPS_OF_HAQ, "haq"),
    "llm-compressor": (by_llm_compressor, STEPS_OF_LLM_COMPRESSOR, "llmcompressor"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("result")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quantize, steps, distribution = LIBRARIES[options.library]
    clock = Clock()
    for step in steps:
        clock.around(*step)
    model, windows = model_of(options.quick), windows_of(options.windows)
    start, before = time.perf_counter(), os.times()
    quantize(model, windows)
    total, after = time.perf_counter() - start, os.times()
    result = {
        "version": importlib.metadata.version(distribution),
        "seconds_per_block": total / LAYERS,
        "cpu_seconds_per_block": (sum(after[:2]) - sum(before[:2])) / LAYERS,
        "steps": {step: seconds / LAYERS for step, seconds in clock.all(total).items()},
    }
    Path(options.result).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

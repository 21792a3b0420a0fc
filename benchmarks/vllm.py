"""Does vLLM serve what `haq.save_pretrained` writes, and does it write the same text as haq?

    make vllm                                    sets up vLLM for the CPU first, in .venv-vllm
    python benchmarks/vllm.py --vllm PYTHON      with a Python that has vLLM

Trained and random models are quantized, exported and loaded back, and haq and vLLM go on after the
same prompts greedily, both in float32 with int8 linear layers. Both round alike, but sum floats in
another order, and an input between two integers may then go to the other one. So where the two
best logits nearly meet, the texts may part: a difference counts as explained if vLLM took haq's
second choice, and haq's two best logits are apart by less than MAX_GAP of the range of the logits
there. Two more go through the comparison: haq in float64, for how much the last bits of floats do
to the same int8 model, and the float model, for what another model looks like.

vLLM has int8 experts for GPUs only: of the mixture it has to choose its int8 method, and then say
that this machine has no kernels for it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

import haq

MODELS = Path(__file__).parents[1] / "examples/tiny_models"
sys.path.append(str(MODELS))
from corpus import standard_library  # noqa: E402

PROMPTS = 20
PROMPT_TOKENS = 16
NEW_TOKENS = 24
MAX_GAP = 0.01

# vLLM rounds every input symmetrically. With zero points haq would round some in another way, and
# the two would be different models.
CONFIG = haq.QuantizationConfig(asymmetric_inputs=False)

# Heads of 64: vLLM's attention on the CPU knows few sizes. Large weights, or all logits of a random
# model are about the same.
RANDOM = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

# What vLLM logs, or raises.
INT8_LINEAR = "CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8"
INT8_EXPERTS = "CompressedTensorsW8A8Int8MoEMethod"
NO_KERNELS = "NotImplementedError: No Int8 MoE backend"

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Texts:
    """What a model wrote after each prompt.

    Attributes:
        tokens: [prompts, new tokens].
        logits: what they were chosen by, [prompts, new tokens, vocabulary].
    """

    tokens: Tensor
    logits: Tensor

    def logprobs(self) -> Tensor:
        """Of the tokens, [prompts, new tokens]."""
        return self.logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]


def trained(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()


def random(config_class: type, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **RANDOM,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    calibration = haq.calibration_batches(
        tokenizer, standard_library("train"), num_samples=16, sequence_length=128
    )
    haq.quantize_model(model, calibration, CONFIG)
    haq.save_pretrained(model, directory, tokenizer)


@torch.inference_mode()
def write_on(model: PreTrainedModel, prompts: Tensor) -> Texts:
    """Greedily, by the logits of the whole text each time: nothing of a cache is compared."""
    tokens, logits = prompts, []
    for _ in range(NEW_TOKENS):
        logits.append(model(tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
    return Texts(tokens[:, prompts.shape[1] :], torch.stack(logits, 1))


def vllm_process(python: str, checkpoint: Path, prompts: Tensor) -> tuple[dict[str, Any], str]:
    """What vLLM wrote, nothing if it failed, and its log."""
    with tempfile.TemporaryDirectory() as folder:
        asked, result = Path(folder, "prompts.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(prompts.tolist()))
        script = Path(__file__).with_name("vllm_generate.py")
        done = subprocess.run(
            [python, "-P", script, checkpoint, asked, str(NEW_TOKENS), result],
            env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        content = json.loads(result.read_text()) if done.returncode == 0 else {}
    return content, done.stdout


def compare(haqs: Texts, tokens: Tensor, logprobs: Tensor) -> dict[str, Any]:
    """How far the same tokens were written, and whether what parts the texts is explained.

    The chosen tokens' log probabilities are compared up to where the texts part: after that the two
    have read different texts.
    """
    same = haqs.tokens == tokens
    together = same.cumprod(1).bool()
    parted = [
        {"prompt": prompt, **difference(haqs, tokens, prompt, int(together[prompt].sum()))}
        for prompt in range(len(tokens))
        if not together[prompt].all()
    ]
    return {
        "prompts": len(tokens),
        "identical": len(tokens) - len(parted),
        "differences": parted,
        "unexplained": sum(not each["explained"] for each in parted),
        "max_logprob_difference": (haqs.logprobs() - logprobs).abs().mul(together).max().item(),
    }


def difference(haqs: Texts, tokens: Tensor, prompt: int, position: int) -> dict[str, Any]:
    """The first token that differs: was it a close second?"""
    logits = haqs.logits[prompt, position]
    best, second = logits.topk(2).indices.tolist()
    gap = ((logits[best] - logits[second]) / (logits.max() - logits.min())).item()
    is_second = int(tokens[prompt, position]) == second
    return {
        "position": position,
        "is_second_choice": is_second,
        "gap": gap,
        "explained": is_second and gap < MAX_GAP,
    }


def serve(
    python: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor
) -> dict[str, Any]:
    """Export a model, and compare what vLLM and others write with haq's texts."""
    float_texts = write_on(model, prompts)  # before it is quantized in place
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "int8")
        export(model, tokenizer, checkpoint)
        haqs = write_on(haq.from_pretrained(checkpoint), prompts)
        precise = write_on(haq.from_pretrained(checkpoint, dtype=torch.float64), prompts)
        written, log = vllm_process(python, checkpoint, prompts)
    kernel = last_line(log, INT8_LINEAR)
    if not (written and kernel):
        print(log[-4000:], file=sys.stderr)
        return {"served": False, "kernel": kernel, "error": last_line(log, "Error")}
    vllm_texts = (torch.tensor(written[name]) for name in ("tokens", "logprobs"))
    return {
        "served": True,
        "kernel": kernel,
        "versions": written["versions"],
        "vLLM": compare(haqs, *vllm_texts),
        "haq in float64": compare(haqs, precise.tokens, precise.logprobs()),
        "float model": compare(haqs, float_texts.tokens, float_texts.logprobs()),
    }


def refuse(
    python: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Export a mixture of experts, and see where vLLM gives up: after its choice of a method."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "int8")
        export(model, tokenizer, checkpoint)
        written, log = vllm_process(python, checkpoint, torch.tensor([[0]]))
    facts = {
        "served": bool(written),
        "int8_method": INT8_EXPERTS if INT8_EXPERTS in log else "",
        "error": last_line(log, NO_KERNELS),
    }
    if not (facts["int8_method"] and facts["error"]):
        print(log[-4000:], file=sys.stderr)
    return facts


def last_line(log: str, text: str) -> str:
    """The log's last line with that text, from there on: what is before names a process."""
    lines = [line[line.index(text) :] for line in log.splitlines() if text in line]
    return lines[-1] if lines else ""


def print_rows(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        for kind in ("vLLM", "haq in float64", "float model") if row["served"] else ():
            each = row[kind]
            gaps = [difference["gap"] for difference in each["differences"]]
            cells.append(
                [
                    f"{row['model']}, {kind}",
                    f"{each['identical']} of {each['prompts']}",
                    str(each["unexplained"]),
                    f"{max(gaps):.4f}" if gaps else "-",
                    f"{each['max_logprob_difference']:.4f}",
                ]
            )
    head = [
        "beside haq's int8",
        "identical",
        "unexplained",
        "largest gap",
        "largest change of log p",
    ]
    harness.print_table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="a Python that has vLLM")
    python = parser.parse_args().vllm
    torch.set_num_threads(1)
    facts = harness.card()
    harness.print_card(__doc__, facts)

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "opt-python")
    windows = haq.calibration_batches(
        tokenizer,
        standard_library("held_out"),
        num_samples=PROMPTS,
        sequence_length=PROMPT_TOKENS,
    )
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "opt-python": lambda: trained("opt-python"),
        "random Llama": lambda: random(LlamaConfig, tokenizer),
        "random Qwen3": lambda: random(Qwen3Config, tokenizer),
    }
    rows = [
        {"model": name, **serve(python, build(), tokenizer, torch.cat(windows))}
        for name, build in models.items()
    ]
    mixture = {"model": "mixtral-python", **refuse(python, trained("mixtral-python"), tokenizer)}
    print_rows(rows)
    print(f"mixtral-python: {mixture['int8_method'] or 'no int8 method'}\n{mixture['error']}\n")

    harness.write("vllm", facts, max_gap=MAX_GAP, rows=rows, mixture=mixture)
    failed = [row["model"] for row in rows if not row["served"] or row["vLLM"]["unexplained"]]
    if not (mixture["int8_method"] and mixture["error"]):
        failed.append(mixture["model"])
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()

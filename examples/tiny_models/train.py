"""Train a tokenizer and two tiny language models on Python's standard library, in minutes.

    python examples/tiny_models/train.py

writes opt-python/ (OPT: pre-norm, ReLU), mixtral-python/ (Mixtral: 8 experts, top 2) and
RESULTS.json beside this file.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from corpus import standard_library
from measure import WINDOW, expert_shares, perplexity, token_ids, unigram_perplexity
from recipes import BUILDERS, RECIPES, SPECIAL_IDS, Recipe, train_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

WARM_UP_STEPS = 60


def training_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Tokenize each text between <s> and </s>, one after the other; returns [N] int64."""
    bos, eos = SPECIAL_IDS["bos_token_id"], SPECIAL_IDS["eos_token_id"]
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (bos, *ids, eos)])


def batches(stream: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield [batch, 256] int64 for ever, every epoch cut at other places and shuffled."""
    while True:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        count = (len(stream) - offset) // WINDOW
        rows = stream[offset : offset + count * WINDOW].view(count, WINDOW)
        order = torch.randperm(count, generator=generator)
        for chosen in order[: count - count % batch].split(batch):
            yield rows[chosen]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0."""
    warm_up = min(WARM_UP_STEPS, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def make_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def fit(model: PreTrainedModel, stream: Tensor, recipe: Recipe, seed: int) -> None:
    """Train the model in place on stream ([N] int64)."""
    data = batches(stream, recipe.batch, torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe.steps)
    )
    extra = {"output_router_logits": True} if model.config.model_type == "mixtral" else {}
    model.train()
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        ids = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{recipe.steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)


def train_one(
    name: str, recipe: Recipe, stream: Tensor, held_out: Tensor, out: Path, seed: int
) -> dict[str, object]:
    """Train and save one model; return what was measured on the weights that were saved."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    start = time.perf_counter()
    fit(model, stream, recipe, seed)
    seconds = time.perf_counter() - start
    folder = out / recipe.folder
    model.to(torch.float16).save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result: dict[str, object] = {
        "held_out_perplexity": round(perplexity(saved, held_out), 3),
        "parameters": saved.num_parameters(),
        "train_tokens_seen": recipe.steps * recipe.batch * WINDOW,
        "steps": recipe.steps,
        "train_seconds": round(seconds),
        "seed": seed,
    }
    if name == "mixtral":
        shares = expert_shares(saved, held_out)
        result["expert_share_min"] = round(shares.min().item(), 4)
        result["expert_share_max"] = round(shares.max().item(), 4)
    print(f"{name}: {result}", flush=True)
    return result


def prepare_tokenizer(texts: list[str], names: list[str], out: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer, save it beside each model and return it as users will load it."""
    tokenizer = train_tokenizer(texts)
    for name in names:
        tokenizer.save_pretrained(out / RECIPES[name].folder)
    return AutoTokenizer.from_pretrained(out / RECIPES[names[0]].folder)


def write_results(path: Path, new: dict[str, object], trained: dict[str, object]) -> None:
    """Write what was measured, keeping the other model's part if only one was trained."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new["models"] = {**old.get("models", {}), **trained}
    text = json.dumps(new, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train tiny models on the standard library.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this model alone")
    parser.add_argument("--steps", type=int, help="steps of each model (default: its recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    names = [arguments.only] if arguments.only else list(RECIPES)
    texts = standard_library("train")
    tokenizer = prepare_tokenizer(texts, names, arguments.out)
    stream = training_stream(tokenizer, texts)
    held_out = token_ids(tokenizer, standard_library("held_out"))
    print(f"tokens: {len(stream):,} train, {len(held_out):,} held out", flush=True)
    new: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vocabulary": len(tokenizer),
        "train_tokens": len(stream),
        "held_out_tokens": len(held_out),
        "window": WINDOW,
        "unigram_held_out_perplexity": round(
            unigram_perplexity(stream, held_out, len(tokenizer)), 3
        ),
    }
    for name in names:
        steps = arguments.steps or RECIPES[name].steps
        recipe = replace(RECIPES[name], steps=steps)
        result = train_one(name, recipe, stream, held_out, arguments.out, arguments.seed)
        write_results(arguments.out / "RESULTS.json", new, {name: result})


if __name__ == "__main__":
    main()

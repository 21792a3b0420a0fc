"""``haq generate``: a model writes, word by word on a terminal."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import typer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from haq.cli import terminal
from haq.cli.models import config_of, model_of, positions_of, tokenizer_of
from haq.config import OffloadConfig
from haq.devices import checked_device
from haq.logs import get_logger
from haq.offload.budget import parse_memory
from haq.offload.offloader import ExpertOffloader
from haq.offload.routing import RoutingStatistics

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest, unless something is asked for.

    Raises:
        ValueError: a number is out of range.
    """

    sample: bool
    temperature: float | None
    top_p: float | None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(
                f"`--temperature` must be above 0, got {self.temperature}. Leave it out for the "
                "likeliest tokens."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`--top-p` must be above 0 and at most 1, got {self.top_p}.")

    def options(self) -> dict[str, Any]:
        """As `generate` takes them."""
        asked = {"temperature": self.temperature, "top_p": self.top_p}
        given = {name: value for name, value in asked.items() if value is not None}
        return given | {"do_sample": self.sample or bool(given)}


@dataclass(frozen=True)
class Tiers:
    """Where a model runs: in one place, or a mixture of experts in two."""

    device: str
    gpu_memory: str | None
    statistics: RoutingStatistics | None

    @classmethod
    def checked(cls, device: str | None, gpu_memory: str | None, statistics: Path | None) -> Self:
        """From what was typed. What is wrong with it is said before a model is read.

        Raises:
            ValueError: the device is not there, or the memory is no size.
        """
        place = device or ("cpu" if gpu_memory is None else "cuda")
        checked_device(place)
        if gpu_memory is not None:
            parse_memory(gpu_memory)
        return cls(
            place, gpu_memory, None if statistics is None else RoutingStatistics.load(statistics)
        )

    def load(self, name: str, config: PretrainedConfig) -> PreTrainedModel:
        """The model, where it has to be before `offloading` it."""
        return model_of(name, config, self.device if self.gpu_memory is None else "cpu")

    def offloading(
        self, model: PreTrainedModel, length: int
    ) -> AbstractContextManager[ExpertOffloader | None]:
        """The model runs in two tiers inside of it, if that was asked for."""
        if self.gpu_memory is None:
            return nullcontext()
        return ExpertOffloader(
            model,
            device=self.device,
            gpu_memory=self.gpu_memory,
            statistics=self.statistics,
            config=OffloadConfig(max_length=length),
        )


def generate(
    name: str,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool,
    sampling: Sampling,
    seed: int,
    tiers: Tiers,
    as_json: bool,
) -> None:
    """Print what a model writes; while it writes, if a person is watching."""
    config, tokenizer = config_of(name), tokenizer_of(name)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    inputs = _inputs(tokenizer, text, chat)
    given = inputs["input_ids"].shape[1]
    length = _checked_length(given, max_new_tokens, config)
    model = tiers.load(name, config)
    live = terminal.on_terminal() and not as_json
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True) if live else None
    with tiers.offloading(model, length) as offloader:
        torch.manual_seed(seed)
        started = time.perf_counter()
        written = _write(model, inputs, max_new_tokens, streamer, sampling)
        seconds = time.perf_counter() - started
        report = None if offloader is None else offloader.report()
    new = written[given:]
    shown = tokenizer.decode(new if chat else written, skip_special_tokens=True)
    values = {
        "text": shown,
        "prompt_tokens": given,
        "new_tokens": len(new),
        "finish_reason": "stop" if len(new) < max_new_tokens or _ends(model, new) else "length",
        "seconds": seconds,
        "offload": None if report is None else report.to_dict(),
    }
    if not live:
        terminal.result(str(shown), values, as_json)
    logger.info(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} a second.")
    if report is not None and not as_json:
        # The table of all layers is for `--json`; what is above it is for people.
        typer.echo("\n" + str(report).partition("\n\n")[0], err=True)


def _inputs(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> dict[str, Tensor]:
    """Token ids and mask of a prompt, or of what a user says to a model that answers."""
    if not chat:
        encoded = tokenizer(text, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise ValueError(
            "`--chat` needs a model whose tokenizer has a chat template, and this one has none. "
            "Leave it out to let the model go on with the prompt."
        )
    else:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    if encoded["input_ids"].numel() == 0:
        raise ValueError("The prompt must hold at least one token, got an empty one.")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def _checked_length(prompt: int, new: int, config: PretrainedConfig) -> int:
    """Tokens in the end. Some models fail deep inside when there are more than positions."""
    positions = positions_of(config)
    if positions is not None and prompt + new > positions:
        raise ValueError(
            f"Prompt and answer must be at most {positions} tokens, the positions of the model, "
            f"got {prompt} and {new}. Pass a shorter prompt, or --max-new-tokens "
            f"{max(positions - prompt, 1)}."
        )
    return prompt + new


def _write(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    streamer: TextStreamer | None,
    sampling: Sampling,
) -> Tensor:
    """Prompt and answer, int64 ``[T]``."""
    write: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    there = {name: values.to(model.device) for name, values in inputs.items()}
    return write(**there, max_new_tokens=max_new_tokens, streamer=streamer, **sampling.options())[0]


def _ends(model: PreTrainedModel, new: Tensor) -> bool:
    """Whether the last token is one that ends a text."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return len(new) > 0 and int(new[-1]) in (ends if isinstance(ends, list) else [ends])

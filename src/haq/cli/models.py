"""Models, tokenizers and texts, from a directory or from the hub."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import list_repo_files, snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from haq.checkpoint.load import from_pretrained
from haq.devices import checked_device
from haq.evaluation import evaluation_tokens
from haq.logs import get_logger
from haq.quantization.calibration import calibration_batches

logger = get_logger(__name__)

# What a model is run on at most, unless more is asked for.
_USUAL_LENGTH = 2048

_CORPORA = ("wikitext2", "c4")

Got = TypeVar("Got")


def checked_name(name: str) -> str:
    """The name of a model that can be: a directory with a config, or what the hub calls one.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"`{path / 'config.json'}` is missing: `{path}` is no complete checkpoint."
            )
    elif path.exists() or path.is_absolute() or len(path.parts) > 2 or name.startswith("."):
        raise FileNotFoundError(
            f"`{name}` must be a directory with a model, or the name of one on the Hugging Face "
            "hub, such as facebook/opt-125m."
        )
    return name


def config_of(name: str) -> PretrainedConfig:
    """The config of a model, from which the rest can be told.

    Raises:
        FileNotFoundError: there is no such directory.
        OSError: it is on no hub that can be reached.
        ValueError: it is damaged.
    """
    read: Callable[[], PretrainedConfig] = partial(AutoConfig.from_pretrained, name)
    return read() if Path(checked_name(name)).is_dir() else of_hub(name, read)


def has_safetensors(name: str) -> bool:
    """Whether a model can be read tensor by tensor; older ones on the hub are pickled as a whole.

    Raises:
        OSError: the hub cannot be asked.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            files = of_hub(name, lambda: list_repo_files(name))
        except OSError:  # Without a network, what was downloaded counts.
            folder = Path(snapshot_download(name, local_files_only=True))
        else:
            return any(file.endswith(".safetensors") for file in files)
    return any(folder.glob("*.safetensors"))


def of_hub(name: str, get: Callable[[], Got]) -> Got:
    """What the hub has of a model; what goes wrong is said with the name in it.

    Raises:
        OSError: it could not be had.
    """
    logger.info(f"Asking the Hugging Face hub for {name}.")
    try:
        return get()
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"`{name}` is no directory here, and the Hugging Face hub could not give it: {reason}"
        ) from error


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def model_of(name: str, config: PretrainedConfig, device: str) -> PreTrainedModel:
    """An int8 model by haq, any other by `transformers`."""
    if getattr(config, "quantization_config", None):
        folder = name if Path(name).is_dir() else snapshot_download(name)
        return from_pretrained(folder, device=device)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    model.to(checked_device(device))  # type: ignore[arg-type]
    return model


def length_of(config: PretrainedConfig, asked: int | None) -> int:
    """Tokens of a window: what was asked for, or as many as usual if the model has them."""
    return min(_USUAL_LENGTH, positions_of(config) or _USUAL_LENGTH) if asked is None else asked


def positions_of(config: PretrainedConfig) -> int | None:
    """How long a sequence can be; None if the config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def batches_of(name: str, source: str, option: str, **options: Any) -> list[Tensor]:
    """Windows of a text to calibrate on; ``option`` is what the text is given by."""
    tokenizer = tokenizer_of(name)
    return _read(source, option, lambda: calibration_batches(tokenizer, source, **options))


def tokens_of(name: str, source: str, option: str) -> Tensor:
    """A text to evaluate on, int64 ``[1, T]``; ``option`` is what the text is given by."""
    tokenizer = tokenizer_of(name)
    return _read(source, option, lambda: evaluation_tokens(tokenizer, source))


def _read(source: str, option: str, read: Callable[[], Got]) -> Got:
    if source not in _CORPORA:
        return read()
    logger.info(f"Getting {source} from the Hugging Face hub.")
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return read()
    except RuntimeError as error:
        raise RuntimeError(
            f"{source} could not be had from the Hugging Face hub ({error.__cause__ or error}). "
            f"Pass a text of your own instead, one like what the model is for: {option} FILE.txt "
            "(or .json, .jsonl)."
        ) from error

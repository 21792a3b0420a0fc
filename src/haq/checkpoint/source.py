"""Where a float checkpoint comes from: a directory, or the hub; and the tokenizer beside it."""

import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from haq.checkpoint.files import read_json

# Beside weights and configs, what belongs to a tokenizer.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The directory of a float checkpoint; one of the hub is downloaded to the hub's cache.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is quantized.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:
            raise FileNotFoundError(
                f"`source` must be the directory of a checkpoint or a name on the hub, got "
                f"`{source}`."
            )
        patterns = ["*.json", "*.safetensors", *_TOKENIZER]
        folder = Path(snapshot_download(str(source), allow_patterns=patterns))
    entry = read_json(folder / "config.json").get("quantization_config")
    if entry is not None:
        raise ValueError(
            f"`{folder / 'config.json'}` must be of a float model, got one quantized with "
            f"{entry.get('quant_method')!r}. Take the original checkpoint."
        )
    return folder


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy what belongs to a tokenizer from one directory to another."""
    for pattern in _TOKENIZER:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)

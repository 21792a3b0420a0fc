"""The command line with names of the hub: from its cache on disk, and by headers alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
)

from haq.checkpoint.files import TensorFiles
from haq.cli import contents, models
from tests.test_cli import SOURCE, done, refused

NAME = "somebody/opt-python"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A home of the hub's client in which one model was downloaded."""
    folder = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("0" * 40)).symlink_to(SOURCE)
    return tmp_path


@pytest.mark.slow
def test_a_model_that_was_downloaded_needs_no_network(cache: Path, tmp_path: Path) -> None:
    def by_name(*arguments: object) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "haq.cli", *map(str, arguments)],
            env=os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    text, output = tmp_path / "text.txt", tmp_path / "int8"
    text.write_text("def add(first, second):\n    return first + second\n\n" * 40)
    assert by_name("inspect", NAME) == done("inspect", SOURCE)
    size = ("--calibration", text, "--num-samples", 2, "--sequence-length", 32)
    assert f"Saved in {output}" in by_name("quantize", NAME, output, *size)
    options = ("def add", "--max-new-tokens", 4)
    assert by_name("generate", NAME, *options) == done("generate", SOURCE, *options)


# --- Headers that the hub hands out ---------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the hub's client. What it was asked for, and what it holds."""
    files: dict[str, Any] = {"config.json": SOURCE / "config.json", "asked": []}

    def not_here(name: str, **options: object) -> str:
        assert options == {"local_files_only": True}
        raise LocalEntryNotFoundError("not in the cache")

    def download(name: str, file: str) -> str:
        files["asked"].append((name, file))
        if file not in files:
            raise EntryNotFoundError(f"{name} has no {file}")
        return str(files[file])

    def metadata(name: str) -> object:
        tensors = {
            name: SimpleNamespace(dtype=header.dtype, shape=list(header.shape))
            for name, header in TensorFiles(SOURCE).headers.items()
        }
        return SimpleNamespace(
            files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)}
        )

    monkeypatch.setattr(contents, "snapshot_download", not_here)
    monkeypatch.setattr(contents, "hf_hub_download", download)
    monkeypatch.setattr(contents, "get_safetensors_metadata", metadata)
    return files


def test_inspect_downloads_no_weights(hub: dict[str, Any]) -> None:
    assert done("inspect", NAME) == done("inspect", SOURCE)
    assert hub["asked"] == [(NAME, "config.json"), (NAME, "haq.json")]


def test_inspect_shows_the_report_of_a_model_on_the_hub(
    hub: dict[str, Any], tmp_path: Path
) -> None:
    from haq import QuantizationConfig
    from haq.quantization.report import QuantizationReport

    report = QuantizationReport("OPTForCausalLM", QuantizationConfig(), 4, 128)
    hub["haq.json"] = tmp_path / "haq.json"
    hub["haq.json"].write_text(json.dumps({"report": report.to_dict()}))
    assert report.summary() in done("inspect", NAME)


def test_a_model_without_safetensors(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> object:
        raise NotASafetensorsRepoError(f"'{name}' is not a safetensors repo")

    monkeypatch.setattr(contents, "get_safetensors_metadata", none)
    assert f"`{NAME}` must hold safetensors, and holds none" in refused("inspect", NAME)


def test_an_int8_model_of_the_hub_is_loaded_by_haq(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(models, "snapshot_download", lambda name: f"/cache/{name}")
    monkeypatch.setattr(models, "from_pretrained", lambda *a, **o: asked.append((a, o)))
    models.model_of(NAME, SimpleNamespace(quantization_config={"format": "int-quantized"}), "cpu")  # type: ignore[arg-type]
    assert asked == [((f"/cache/{NAME}",), {"device": "cpu"})]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["config.json", "pytorch_model.bin"], False),
        (["config.json", "model-00001-of-00002.safetensors"], True),
    ],
)
def test_whether_a_model_of_the_hub_can_be_read_by_tensors(
    files: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "list_repo_files", lambda name: files)
    assert models.has_safetensors(NAME) is expected


@pytest.mark.parametrize("command", ["inspect", "evaluate", "generate", "profile", "quantize"])
def test_a_name_that_nobody_knows(command: str, tmp_path: Path) -> None:
    rest = {"generate": ("hello",), "profile": (tmp_path / "o",), "quantize": (tmp_path / "o",)}
    message = refused(command, "nobody/nothing", *rest.get(command, ()))
    expected = "haq: `nobody/nothing` is no directory here, and the Hugging Face hub could not give"
    assert message.startswith(expected)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["./nothing", "/no/such/directory", "a/b/c"])
def test_a_path_is_not_asked_of_the_hub(name: str) -> None:
    for command in (("inspect", name), ("generate", name, "hello")):
        assert refused(*command) == (
            f"haq: `{name}` must be a directory with a model, or the name of one on the Hugging "
            "Face hub, such as facebook/opt-125m."
        )

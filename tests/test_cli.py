"""The command line: results on standard output, the rest on standard error, and exit codes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import haq
from haq import cli
from haq.quantization.report import QuantizationReport

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "examples" / "tiny_models" / "opt-python"

COMMANDS = {
    "quantize": [
        *("SOURCE", "OUTPUT", "--calibration", "--num-samples", "--sequence-length", "--seed"),
        *("--exclude", "--smoothing", "--rounding", "--device", "--resume", "--no-resume"),
        "--json",
    ],
    "inspect": ["DIRECTORY", "--json"],
    "evaluate": [
        *("MODEL", "--text", "--reference", "--sequence-length", "--max-tokens", "--device"),
        "--json",
    ],
    "generate": [
        "MODEL",
        "PROMPT",
        "--max-new-tokens",
        "--sample",
        "--no-sample",
        "--seed",
        "--device",
        "--gpu-memory",
        "--statistics",
    ],
    "profile": [
        *("MODEL", "OUTPUT", "--text", "--num-samples", "--sequence-length", "--seed", "--device"),
        "--json",
    ],
}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    """Standard output of a command that works."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refused(*arguments: object) -> str:
    """The message of a command that does not work."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    # But for the bars of transformers.
    lines = [line for line in result.stderr.splitlines() if line and "it/s" not in line]
    assert lines[0].startswith("haq: ")
    return "\n".join(lines)


def as_process(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "haq.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    functions = [
        f"def add_{number}(first, second):\n"
        f'    """Add {number} to the sum of two numbers."""\n'
        f"    return first + second + {number}\n\n"
        for number in range(60)
    ]
    file.write_text("".join(functions))
    return file


def quantize(text: Path, output: Path, *more: object) -> Any:
    size = ("--num-samples", 4, "--sequence-length", 32)
    return run("quantize", SOURCE, output, "--calibration", text, *size, *more)


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An int8 directory to be looked at only, and what making it printed."""
    folder = tmp_path_factory.mktemp("made")
    result = quantize(text, folder / "int8")
    assert result.exit_code == 0, result.output
    assert [path.name for path in folder.iterdir()] == ["int8"]
    return folder / "int8", result


@pytest.fixture(scope="module")
def int8(made: tuple[Path, Any]) -> Path:
    return made[0]


def saved_report(folder: Path) -> QuantizationReport:
    return QuantizationReport.from_dict(json.loads((folder / "haq.json").read_text())["report"])


# --- quantize -------------------------------------------------------------------------------------


def test_quantize_prints_the_report_and_where_it_is(made: tuple[Path, Any]) -> None:
    folder, result = made
    assert result.stdout == f"{saved_report(folder)}\n\nSaved in {folder}.\n"
    report = saved_report(folder)
    assert report.tokens == 4 * 32
    assert len(report.layers) == 4 * 6
    assert report.config == haq.QuantizationConfig()


def test_quantize_makes_what_python_makes(text: Path, int8: Path, tmp_path: Path) -> None:
    batches = haq.calibration_batches(
        AutoTokenizer.from_pretrained(SOURCE), str(text), num_samples=4, sequence_length=32
    )
    haq.quantize_checkpoint(SOURCE, tmp_path / "int8", batches, progress=False)
    names = sorted(path.name for path in int8.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "int8").iterdir())
    assert "tokenizer.json" in names
    for name in names:
        assert (int8 / name).read_bytes() == (tmp_path / "int8" / name).read_bytes(), name


def test_quantize_prints_one_json_document(text: Path, tmp_path: Path) -> None:
    result = quantize(text, tmp_path / "int8", "--json", "--smoothing", "none")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    report = QuantizationReport.from_dict(json.loads(result.stdout))
    assert report == saved_report(tmp_path / "int8")
    assert report.config.smoothing == "none"


class Call(dict[str, Any]):
    """What the command line calls the library with, and what that answers."""

    def __call__(self, source: object, output: object, *rest: object, **options: object) -> object:
        batches, config = rest
        self.update(source=source, output=output, batches=batches, config=config, **options)
        return self.answer()

    def answer(self) -> object:
        return QuantizationReport("Toy", haq.QuantizationConfig(), 0, 0)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    made = Call()
    monkeypatch.setattr(cli, "quantize_checkpoint", made)
    return made


def test_quantize_hands_its_options_on(call: Call, text: Path, tmp_path: Path) -> None:
    options = ("--exclude", "*.fc1", "--exclude", "*.fc2", "--smoothing", "fixed", "--no-resume")
    assert quantize(text, tmp_path, *options, "--rounding", "nearest").exit_code == 0
    assert call["source"] == str(SOURCE)
    assert call["output"] == tmp_path
    assert call["config"] == haq.QuantizationConfig(
        smoothing="fixed", rounding="nearest", exclude=("lm_head", "*.fc1", "*.fc2")
    )
    assert call["resume"] is False
    assert call["device"] == "cpu"
    assert [batch.shape for batch in call["batches"]] == [(1, 32)] * 4


def test_quantize_goes_on_by_default(call: Call, text: Path, tmp_path: Path) -> None:
    assert quantize(text, tmp_path).exit_code == 0
    assert call["resume"] is True
    assert call["config"] == haq.QuantizationConfig()


def test_the_seed_chooses_the_windows(call: Call, text: Path, tmp_path: Path) -> None:
    def windows(seed: int) -> torch.Tensor:
        assert quantize(text, tmp_path, "--seed", seed).exit_code == 0
        return torch.cat(call["batches"])

    assert torch.equal(windows(1), windows(1))
    assert not torch.equal(windows(1), windows(2))


def test_windows_are_as_long_as_the_model_has_positions(
    call: Call, text: Path, tmp_path: Path
) -> None:
    text_of_all = ("--calibration", text, "--num-samples", 1)
    done("quantize", SOURCE, tmp_path, *text_of_all)
    assert call["batches"][0].shape == (1, 512)


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_an_int8_checkpoint(int8: Path) -> None:
    out = done("inspect", int8)
    assert out.startswith(f"{saved_report(int8)}\n\n")
    lines = out.splitlines()
    assert lines[-1] == "OPTForCausalLM, compressed-tensors int-quantized."
    assert re.search(r"^I8 +24 tensors +3\.1 MB$", out, re.MULTILINE)


def test_inspect_an_int8_checkpoint_as_json(int8: Path) -> None:
    found = json.loads(done("inspect", int8, "--json"))
    assert found["architecture"] == "OPTForCausalLM"
    assert found["method"] == "compressed-tensors int-quantized"
    assert found["tensors"]["I8"] == [24, 4 * (4 * 256 * 256 + 2 * 256 * 1024)]
    assert QuantizationReport.from_dict(found["report"]) == saved_report(int8)


def test_inspect_a_float_checkpoint() -> None:
    out = done("inspect", SOURCE)
    assert re.fullmatch(r"F16 +68 tensors +7\.6 MB\nOPTForCausalLM, not quantized\.\n", out), out
    found = json.loads(done("inspect", SOURCE, "--json"))
    assert found == {
        "architecture": "OPTForCausalLM",
        "method": "not quantized",
        "tensors": {"F16": [68, 7630848]},
        "report": None,
    }


def test_inspect_does_not_load_a_model(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cli, "from_pretrained")
    monkeypatch.delattr(cli, "AutoModelForCausalLM")
    done("inspect", int8)


# --- evaluate -------------------------------------------------------------------------------------

READ = ("--sequence-length", 64, "--max-tokens", 320)


def tokens_of(text: Path) -> torch.Tensor:
    return haq.evaluation_tokens(AutoTokenizer.from_pretrained(SOURCE), str(text))[:, :320]


def test_evaluate_prints_the_perplexity_that_python_gives(int8: Path, text: Path) -> None:
    value = haq.perplexity(haq.from_pretrained(int8), tokens_of(text), sequence_length=64)
    assert done("evaluate", int8, "--text", text, *READ) == f"perplexity {value:.4f}\n"
    out = done("evaluate", int8, "--text", text, *READ, "--json")
    assert json.loads(out) == {"perplexity": value}


def test_evaluate_a_float_model(text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype="auto")
    value = haq.perplexity(model, tokens_of(text), sequence_length=64)
    found = json.loads(done("evaluate", SOURCE, "--text", text, *READ, "--json"))
    assert found == {"perplexity": value}


def test_evaluate_against_a_reference(int8: Path, text: Path) -> None:
    result = haq.compare(
        AutoModelForCausalLM.from_pretrained(SOURCE, dtype="auto"),
        haq.from_pretrained(int8),
        tokens_of(text),
        sequence_length=64,
    )
    arguments = ("evaluate", int8, "--text", text, "--reference", SOURCE, *READ)
    assert done(*arguments) == f"{result}\n"
    values = json.loads(done(*arguments, "--json"))
    assert values == json.loads(json.dumps(dataclasses.asdict(result)))


# --- generate -------------------------------------------------------------------------------------

PROMPT = "def add_7(first, second):"


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_generate_writes_what_python_writes(kind: str, int8: Path) -> None:
    folder = int8 if kind == "int8" else SOURCE
    model = (
        haq.from_pretrained(int8)
        if kind == "int8"
        else AutoModelForCausalLM.from_pretrained(SOURCE, dtype="auto")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(written[0], skip_special_tokens=True)
    assert expected.startswith(PROMPT)
    assert len(expected) > len(PROMPT)
    assert done("generate", folder, PROMPT, "--max-new-tokens", 12) == f"{expected}\n"


def test_generate_samples_by_the_seed(int8: Path) -> None:
    def sample(seed: int) -> str:
        return done("generate", int8, PROMPT, "--sample", "--seed", seed, "--max-new-tokens", 20)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


# --- Help -----------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_all_of_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = plain(done(command, "--help"))
    for argument in COMMANDS[command]:
        assert argument.lower() in out.lower(), argument


def test_the_help_lists_the_commands() -> None:
    out = plain(done("--help"))
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", out)


def test_there_are_no_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command, arguments in COMMANDS.items():
        options = set(re.findall(r"--[a-z-]+", plain(done(command, "--help"))))
        assert options - {a for a in arguments if a.startswith("--")} == {"--help"}


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["somebody/no-such-model", "/no/such/directory"])
def test_a_source_that_is_not_there(source: str, text: Path, tmp_path: Path) -> None:
    refused("quantize", source, tmp_path / "int8", "--calibration", text)
    refused("evaluate", source, "--text", text)
    refused("generate", source, "hello")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "config.json" in refused("inspect", tmp_path / "none")


def test_an_output_that_is_not_empty(text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    size = ("--num-samples", 4, "--sequence-length", 32)
    message = refused("quantize", SOURCE, tmp_path, "--calibration", text, *size)
    assert f"`{tmp_path}` must not exist, or be an empty directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_options_that_do_not_exist(text: Path, tmp_path: Path) -> None:
    for option in ("smoothing", "rounding"):
        message = refused("quantize", SOURCE, tmp_path / "int8", f"--{option}", "magic")
        assert message.startswith(f"haq: `{option}` must be one of ")
        assert message.endswith("got 'magic'.")
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_and_none(text: Path, tmp_path: Path) -> None:
    arguments = ("quantize", SOURCE, tmp_path / "int8", "--calibration")
    assert "windows of 512" in refused(*arguments, text)
    assert "none.txt" in refused(*arguments, tmp_path / "none.txt")
    assert "wikitext" in refused("evaluate", SOURCE, "--text", "wikitext3")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    shutil.copytree(SOURCE, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "model.safetensors", 1_000_000)
    return tmp_path / "damaged"


def test_a_damaged_source(damaged: Path, text: Path, tmp_path: Path) -> None:
    result = quantize(text, tmp_path / "int8")
    assert result.exit_code == 0
    size = ("--num-samples", 4, "--sequence-length", 32)
    message = refused("quantize", damaged, tmp_path / "other", "--calibration", text, *size)
    assert "model.safetensors` is no complete safetensors file" in message
    assert "model.safetensors` is no complete safetensors file" in refused("inspect", damaged)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_damaged_float_model(command: str, damaged: Path, text: Path) -> None:
    rest = ("--text", text) if command == "evaluate" else ("hello",)
    refused(command, damaged, *rest)


@pytest.mark.parametrize("command", ["inspect", "evaluate", "generate"])
def test_a_damaged_int8_model(command: str, int8: Path, text: Path, tmp_path: Path) -> None:
    rest = {"inspect": (), "evaluate": ("--text", text), "generate": ("hello",)}[command]
    folder = tmp_path / "int8"
    shutil.copytree(int8, folder)
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, 1000)
    assert f"`{file}` is no complete safetensors file" in refused(command, folder, *rest)
    file.unlink()
    assert f"`{file}` is missing" in refused(command, folder, *rest)


def test_a_damaged_report(int8: Path, tmp_path: Path) -> None:
    shutil.copytree(int8, tmp_path / "int8")
    (tmp_path / "int8" / "haq.json").write_text("{")
    assert "haq.json` is damaged" in refused("inspect", tmp_path / "int8")


def test_a_device_that_is_not_there(int8: Path) -> None:
    refused("generate", int8, "hello", "--device", "nonsense")
    refused("generate", SOURCE, "hello", "--device", "nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["int8", "float"])
def test_a_gpu_that_is_not_there(kind: str, int8: Path) -> None:
    message = refused("generate", int8 if kind == "int8" else SOURCE, "hello", "--device", "cuda")
    assert "CUDA" in message


def test_a_quantized_source(int8: Path, text: Path, tmp_path: Path) -> None:
    size = ("--num-samples", 4, "--sequence-length", 32)
    message = refused("quantize", int8, tmp_path / "int8", "--calibration", text, *size)
    assert "Take the original checkpoint" in message


def test_a_mistake_of_haq_itself_shows_where_it_is(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: Call) -> object:
        raise KeyError("oops")

    monkeypatch.setattr(Call, "answer", answer)
    result = quantize(text, tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("note", [None, "haq: 3 blocks are done and kept."])
def test_an_interrupt(
    note: str | None, call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: Call) -> object:
        error = KeyboardInterrupt()
        if note is not None:
            error.add_note(note)
        raise error

    monkeypatch.setattr(Call, "answer", answer)
    result = quantize(text, tmp_path)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == f"{note or 'haq: interrupted.'}\n"


def test_the_notes_of_an_error_are_printed(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: Call) -> object:
        error = RuntimeError("NaN")
        error.add_note("haq: 3 blocks are done and kept.")
        raise error

    monkeypatch.setattr(Call, "answer", answer)
    result = quantize(text, tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "haq: NaN\nhaq: 3 blocks are done and kept.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("dance",),
        ("quantize",),
        ("quantize", "a"),
        ("generate", "a"),
        ("inspect", "a", "b"),
        ("inspect", "a", "--loud"),
        ("quantize", "a", "b", "--num-samples", "many"),
    ],
)
def test_what_is_not_understood(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage" in plain(result.stderr)


# --- As a process ---------------------------------------------------------------------------------


def test_exit_code_0() -> None:
    result = as_process("inspect", SOURCE, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["architecture"] == "OPTForCausalLM"


def test_exit_code_1(tmp_path: Path) -> None:
    result = as_process("inspect", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("haq: ")
    assert "Traceback" not in result.stderr


def test_exit_code_2() -> None:
    result = as_process("dance")
    assert (result.returncode, result.stdout) == (2, "")
    assert "dance" in result.stderr

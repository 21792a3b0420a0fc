"""The command line: results on standard output, the rest on standard error, and exit codes."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as theirs
from typer.testing import CliRunner

import haq
from haq.checkpoint.files import TensorFiles
from haq.cli import models, tasks, terminal
from haq.cli.commands import app
from haq.quantization.report import QuantizationReport

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "examples" / "tiny_models" / "opt-python"

COMMANDS = {
    "quantize": [
        *("SOURCE", "OUTPUT", "--calibration", "--num-samples", "--sequence-length", "--seed"),
        *(
            "--exclude",
            "--head",
            "--smoothing",
            "--smoothing-strength",
            "--rounding",
            "--asymmetric-inputs",
        ),
        *("--no-asymmetric-inputs", "--device", "--resume", "--no-resume", "--json"),
    ],
    "inspect": ["MODEL", "--json"],
    "evaluate": [
        *("MODEL", "--text", "--reference", "--sequence-length", "--max-tokens", "--device"),
        "--json",
    ],
    "generate": [
        *("MODEL", "PROMPT", "--max-new-tokens", "--chat", "--sample", "--temperature", "--top-p"),
        *("--seed", "--device", "--gpu-memory", "--statistics", "--json"),
    ],
    "profile": [
        *("MODEL", "OUTPUT", "--text", "--num-samples", "--sequence-length", "--seed", "--device"),
        "--json",
    ],
    "backends": ["--json"],
}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    assert result.stderr.startswith("haq: ")
    return str(result.stderr).removesuffix("\n")


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


def test_quantize_says_what_was_done_and_where_it_is(made: tuple[Path, Any]) -> None:
    folder, result = made
    report = saved_report(folder)
    worst = sorted(report.layers, key=lambda layer: layer.error_after)[:-4:-1]
    assert result.stdout.splitlines() == [
        *report.summary().splitlines(),
        "Largest relative errors:",
        *(f"  {layer.error_after:.1e}  {layer.name}" for layer in worst),
        "",
        f"Saved in {folder}, 4.5 MB. Every layer: haq inspect {folder}",
    ]
    assert result.stderr == ""
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


def test_a_model_without_safetensors_is_loaded_as_a_whole(
    text: Path, int8: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(SOURCE, old, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype="auto")
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    size = ("--num-samples", 4, "--sequence-length", 32, "--calibration", text)
    out = done("quantize", old, tmp_path / "int8", *size)
    assert out.startswith(saved_report(int8).summary())
    expected, found = TensorFiles(int8), TensorFiles(tmp_path / "int8")
    assert expected.headers.keys() == found.headers.keys()
    for name in expected.headers:
        assert torch.equal(expected.read(name), found.read(name)), name


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
    monkeypatch.setattr(tasks, "quantize_checkpoint", made)
    # What would be in the files.
    monkeypatch.setattr(tasks, "TensorFiles", lambda _: types.SimpleNamespace(headers={}))
    return made


def test_quantize_hands_its_options_on(call: Call, text: Path, tmp_path: Path) -> None:
    options = ("--exclude", "*.fc1", "--exclude", "*.fc2", "--smoothing", "fixed", "--no-resume")
    options += ("--smoothing-strength", "0.75", "--rounding", "nearest", "--no-asymmetric-inputs")
    assert quantize(text, tmp_path, *options).exit_code == 0
    assert call["source"] == str(SOURCE)
    assert call["output"] == tmp_path
    assert call["config"] == haq.QuantizationConfig(
        smoothing="fixed",
        smoothing_strength=0.75,
        rounding="nearest",
        asymmetric_inputs=False,
        exclude=("lm_head", "*.fc1", "*.fc2"),
    )
    assert call["resume"] is False
    assert call["device"] == "cpu"
    assert [batch.shape for batch in call["batches"]] == [(1, 32)] * 4


def test_quantize_the_head_as_well(call: Call, text: Path, tmp_path: Path) -> None:
    assert quantize(text, tmp_path, "--head", "--exclude", "*.fc1").exit_code == 0
    assert call["config"].exclude == ("*.fc1",)


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
    assert lines[-1] == "OPTForCausalLM, compressed-tensors int-quantized, 4.5 MB."
    assert re.search(r"^I8 +24 tensors +3\.1 MB$", out, re.MULTILINE)


def test_inspect_an_int8_checkpoint_as_json(int8: Path) -> None:
    found = json.loads(done("inspect", int8, "--json"))
    assert found["architecture"] == "OPTForCausalLM"
    assert found["method"] == "compressed-tensors int-quantized"
    assert found["tensors"]["I8"] == [24, 4 * (4 * 256 * 256 + 2 * 256 * 1024)]
    assert QuantizationReport.from_dict(found["report"]) == saved_report(int8)


def test_inspect_a_float_checkpoint() -> None:
    out = done("inspect", SOURCE)
    assert re.fullmatch(
        r"F16 +68 tensors +7\.6 MB\nOPTForCausalLM, not quantized, 7\.6 MB\.\n", out
    ), out
    found = json.loads(done("inspect", SOURCE, "--json"))
    assert found == {
        "architecture": "OPTForCausalLM",
        "method": "not quantized",
        "tensors": {"F16": [68, 7630848]},
        "report": None,
    }


def test_inspect_does_not_load_a_model(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(models, "from_pretrained")
    monkeypatch.delattr(models, "AutoModelForCausalLM")
    done("inspect", int8)


# --- evaluate -------------------------------------------------------------------------------------

READ = ("--sequence-length", 64, "--max-tokens", 320)


def tokens_of(text: Path) -> torch.Tensor:
    return haq.evaluation_tokens(AutoTokenizer.from_pretrained(SOURCE), str(text))[:, :320]


def test_evaluate_prints_the_perplexity_that_python_gives(int8: Path, text: Path) -> None:
    value = haq.perplexity(haq.from_pretrained(int8), tokens_of(text), sequence_length=64)
    expected = f"perplexity {value:.4f} on 320 tokens in windows of 64\n"
    assert done("evaluate", int8, "--text", text, *READ) == expected
    out = done("evaluate", int8, "--text", text, *READ, "--json")
    assert json.loads(out) == {"perplexity": value, "tokens": 320, "sequence_length": 64}


def test_evaluate_a_float_model(text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype="auto")
    value = haq.perplexity(model, tokens_of(text), sequence_length=64)
    found = json.loads(done("evaluate", SOURCE, "--text", text, *READ, "--json"))
    assert found["perplexity"] == value


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
    assert values == {
        "perplexity": result.perplexity,
        "perplexity_reference": result.perplexity_reference,
        "sequence_length": 64,
        **json.loads(json.dumps(dataclasses.asdict(result))),
    }


def test_what_json_has_no_number_for_is_null(int8: Path, text: Path) -> None:
    """One window has no standard error."""
    options = ("--reference", SOURCE, "--sequence-length", 64, "--max-tokens", 64, "--json")
    values = json.loads(
        done("evaluate", int8, "--text", text, *options), parse_constant=pytest.fail
    )
    assert values["windows"] == 1
    assert values["kl"] > 0
    assert values["kl_stderr"] is None


# --- backends -------------------------------------------------------------------------------------


def test_backends() -> None:
    table = haq.backends()
    assert done("backends").splitlines()[0] == str(table).splitlines()[0]
    found = json.loads(done("backends", "--json"))
    assert [row["name"] for row in found] == [status.name for status in table]
    assert found[-1] | {"tokens": "", "reason": ""} == {
        "name": "reference",
        "device": "cpu",
        "available": True,
        "exact": True,
        "tokens": "",
        "reason": "",
    }


# --- Help -----------------------------------------------------------------------------------------


def help_of(command: str) -> str:
    """In words with one space between them, however the lines are broken."""
    return " ".join(done(command, "--help").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_all_of_it(command: str) -> None:
    out = help_of(command)
    for argument in COMMANDS[command]:
        assert argument.lower() in out.lower(), argument
    assert f"For example: haq {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_there_are_no_other_options(command: str) -> None:
    lines = re.findall(r"^  -.*", done(command, "--help"), re.MULTILINE)
    options = {option for line in lines for option in re.findall(r"(--[a-z-]+)(?: |$)", line[:60])}
    assert options == {a for a in COMMANDS[command] if a.startswith("--")} | {"--help"}


def test_the_help_lists_the_commands() -> None:
    out = done("--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*\.$", out, re.MULTILINE)
    assert "Exit codes: 0 done, 1 it failed" in out


def test_every_default_is_in_the_help() -> None:
    out = help_of("quantize")
    for option, default in {
        "calibration": "wikitext2",
        "num-samples": "128; x>=1",
        "sequence-length": "2048, or as many as the model has positions",
        "seed": "0",
        "smoothing": "search",
        "smoothing-strength": "0.5",
        "rounding": "hessian",
        "device": "cpu",
        "resume": "resume",
    }.items():
        assert re.search(rf" --{option} [^\[]*\[default: {default}\]", out), option


def test_help_is_there_at_once() -> None:
    """Without importing what takes seconds: torch, transformers, or even colours."""
    code = "import sys; from haq.cli import main; sys.argv = ['haq', 'quantize', '-h']; main()"
    loud = f"try:\n    {code}\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", loud], capture_output=True, text=True, check=True
    )
    assert "Usage: " in result.stdout
    imported = set(result.stderr.split())
    assert "typer" in imported
    assert not {"torch", "transformers", "numpy", "rich", "haq.public"} & imported


def test_the_version() -> None:
    assert done("--version") == f"haq {haq.__version__}\n"


# --- What goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["somebody/no-such-model", "/no/such/directory"])
def test_a_source_that_is_not_there(source: str, text: Path, tmp_path: Path) -> None:
    refused("quantize", source, tmp_path / "int8", "--calibration", text)
    refused("evaluate", source, "--text", text)
    refused("generate", source, "hello")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "must be a directory with a model" in refused("inspect", tmp_path / "none")
    assert f"`{tmp_path / 'config.json'}` is missing" in refused("inspect", tmp_path)


def test_an_output_that_is_not_empty(text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    size = ("--num-samples", 4, "--sequence-length", 32)
    message = refused("quantize", SOURCE, tmp_path, "--calibration", text, *size)
    assert f"`{tmp_path}` must not exist, or be an empty directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # That comes before anything is read or asked for.
    for source, calibration in ((SOURCE, "wikitext2"), ("somebody/no-such-model", text)):
        assert refused("quantize", source, tmp_path, "--calibration", calibration) == message


def test_an_output_that_is_what_the_same_command_made(
    int8: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("haq.checkpoint.stream.quantize_block")
    result = quantize(text, int8)
    assert result.exit_code == 0
    assert result.stdout.startswith(saved_report(int8).summary())
    other = ("--num-samples", 4, "--sequence-length", 64)
    message = refused("quantize", SOURCE, int8, "--calibration", text, *other)
    assert "must not exist, or be an empty directory" in message


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


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("quantize", SOURCE, "OUTPUT"), "--calibration"),
        (("evaluate", SOURCE), "--text"),
        (("evaluate", SOURCE, "--text", "c4"), "--text"),
        (("profile", SOURCE, "OUTPUT"), "--text"),
    ],
)
def test_a_text_of_the_hub_without_a_network(
    arguments: tuple[str, ...], option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*names: str, **options: object) -> object:
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    corpus = "c4" if "c4" in arguments else "wikitext2"
    assert refused(*arguments) == (
        f"haq: {corpus} could not be had from the Hugging Face hub (Couldn't reach "
        "'Salesforce/wikitext' on the Hub). Pass a text of your own instead, one like what the "
        f"model is for: {option} FILE.txt (or .json, .jsonl)."
    )
    assert list(tmp_path.iterdir()) == []


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
    for arguments in (
        ("generate", int8, "hello"),
        ("evaluate", int8),
        ("quantize", SOURCE, "output"),
        ("profile", int8, "output"),
    ):
        assert "must be one that torch can use" in refused(*arguments, "--device", "nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", [("--device", "cuda"), ("--gpu-memory", "1GiB")])
def test_a_gpu_that_is_not_there(option: tuple[str, str], int8: Path) -> None:
    assert "CUDA" in refused("generate", int8, "hello", *option)


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


@pytest.mark.parametrize(
    "error", [ImportError("This tokenizer needs `sentencepiece`."), MemoryError("16 GB")]
)
def test_what_a_user_can_do_about_is_told(
    error: Exception, call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: Call) -> object:
        raise error

    monkeypatch.setattr(Call, "answer", answer)
    result = quantize(text, tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"haq: {error}\n"


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
    assert "Usage" in result.stderr


# --- What is not asked for ------------------------------------------------------------------------


def test_libraries_are_quiet_and_as_loud_as_before_afterwards(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []

    def state() -> tuple[object, ...]:
        levels = (logging.getLogger(name).level for name in ("haq", "huggingface_hub"))
        bars, verbosity = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
        return (*levels, verbosity, bars)

    def answer(_: Call) -> object:
        warnings.warn("This function will be gone in 2031.", FutureWarning, stacklevel=1)
        states.append(state())
        return QuantizationReport("Toy", haq.QuantizationConfig(), 0, 0)

    monkeypatch.setattr(Call, "answer", answer)
    before = state()
    result = quantize(text, tmp_path)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert states == [(logging.WARNING, logging.ERROR, logging.ERROR, False)]
    assert state() == before


def test_they_are_as_loud_as_they_are_asked_to_be(
    call: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def answer(_: Call) -> object:
        seen.append(theirs.get_verbosity())
        return QuantizationReport("Toy", haq.QuantizationConfig(), 0, 0)

    monkeypatch.setattr(Call, "answer", answer)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    before = theirs.get_verbosity()
    assert quantize(text, tmp_path).exit_code == 0
    assert seen == [before]


# --- Tables ---------------------------------------------------------------------------------------

ROWS = [
    ("layer", "shape", "same", "error"),
    ("a.b", "8 x 16", "x", "1"),
    ("c", "16 x 8", "x", "20"),
]


@pytest.mark.parametrize(
    ("columns", "head", "gone"),
    [
        (None, "layer   shape  same  error", ""),
        (26, "layer   shape  same  error", ""),
        (25, "layer   shape  error", "same"),
        (19, "layer  error", "same, shape"),
        (3, "layer  error", "same, shape"),
    ],
)
def test_a_table_has_no_more_columns_than_fit(
    columns: int | None, head: str, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "width", lambda: columns)
    lines = terminal.table(ROWS, left=["layer", "same"], spare=["shape", "same"]).splitlines()
    assert lines[0] == head
    assert lines[1] == "-" * len(head)
    assert lines[2].split()[0] == "a.b"
    assert [len(line) for line in lines[2:4]] == [len(head)] * 2
    assert lines[4:] == (["", f"Too wide for this terminal, and left out: {gone}."] if gone else [])


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

"""Bars and messages: those of `transformers`, as loud and as visible as it is told to be.

What a person sees is looked at through a pseudo-terminal, in processes of their own.
"""

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from transformers.utils import logging as theirs

from haq.logs import get_logger
from tests.test_cli import SOURCE

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")

COLUMNS = 80

# A model of which every call with a bar takes next to no time.
USE = """
    import sys, torch
    from pathlib import Path
    import transformers
    from transformers import MixtralConfig, MixtralForCausalLM
    import haq

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    tokens = [torch.randint(64, (1, 32)) for _ in range(2)]
    {settings}
    options = {options}
    haq.RoutingStatistics.collect(model, tokens, **options)
    haq.perplexity(model, torch.cat(tokens, 1), sequence_length=32, **options)
    haq.compare(model, model, torch.cat(tokens, 1), sequence_length=32, **options)
    folder = Path(sys.argv[1])
    model.save_pretrained(folder / "float")
    haq.quantize_checkpoint(folder / "float", folder / "int8", tokens, **options)
    haq.quantize_model(model, tokens, **options)
    haq.save_pretrained(model, folder / "other")
    if {load}:
        haq.from_pretrained(folder / "other")
"""


def on_terminal(command: list[str], **environment: str) -> tuple[int, str]:
    """Exit code, and all that a person sees of a command on a terminal of 80 columns."""
    import fcntl
    import struct
    import termios

    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=its,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    os.close(its)
    seen = b"".join(_read(ours))
    os.close(ours)
    return process.wait(timeout=120), seen.decode().replace("\r\n", "\n")


def _read(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # How Linux says that the other end was closed.
            return
        if not piece:
            return
        yield piece


def used(
    folder: Path,
    settings: str = "",
    options: str = "{}",
    load: bool = True,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a person sees of every call with a bar."""
    code = textwrap.dedent(USE.format(settings=settings, options=options, load=load))
    code_and_folder = [sys.executable, "-c", code, str(folder)]
    status, seen = on_terminal(code_and_folder, **(environment or {}))
    assert status == 0, seen
    return seen


# --- Bars -----------------------------------------------------------------------------------------


def test_bars_on_a_terminal_show_what_is_done_and_the_time_left(tmp_path: Path) -> None:
    seen = used(tmp_path)
    for title, number, unit in (
        ("Routing", 2, "batch"),
        ("perplexity", 2, "window"),
        ("compare", 2, "window"),
        ("Quantizing", 2, "block"),
        ("Loading", 33, "module"),
    ):
        lines = [line for line in seen.replace("\n", "\r").split("\r") if line.startswith(title)]
        assert lines, (title, seen)
        assert f"0/{number} [00:00<?, ?{unit}/s]" in lines[0]
        assert f"{title}: 100%" in lines[-1]
        assert f"{number}/{number} [00:" in lines[-1]
        assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize(
    ("settings", "options", "load", "environment"),
    [
        ("transformers.logging.disable_progress_bar()", "{}", True, {}),
        ("", "{}", True, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}),
        # Loading has no such argument, as in transformers.
        ("", "{'progress': False}", False, {}),
    ],
    ids=["disable_progress_bar", "environment", "progress=False"],
)
def test_bars_are_switched_off(
    settings: str, options: str, load: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    seen = used(tmp_path, settings, options, load, environment)
    # transformers' own bar for writing files is not in question.
    ours = [line for line in seen.splitlines() if "Writing model shards" not in line]
    assert "".join(ours).strip() == ""


def test_there_are_no_bars_where_standard_error_is_no_terminal(tmp_path: Path) -> None:
    code = textwrap.dedent(USE.format(settings="", options="{}", load=True))
    script = tmp_path / "script.py"
    script.write_text(code)
    command = f"{sys.executable} {script} {tmp_path} 2> {tmp_path / 'errors'}"
    assert on_terminal(["sh", "-c", command]) == (0, "")
    errors = (tmp_path / "errors").read_text()
    for title in ("Routing", "perplexity", "compare", "Quantizing", "Loading:"):
        assert title not in errors


# --- Messages -------------------------------------------------------------------------------------


@pytest.fixture
def verbosity() -> Iterator[None]:
    before = theirs.get_verbosity()
    yield
    theirs.set_verbosity(before)
    logging.getLogger("haq").setLevel(logging.NOTSET)


MESSAGES = """
    import logging, transformers
    from haq.logs import get_logger
    logger = get_logger("haq.checkpoint.fill")
    {settings}
    logger.debug("debug")
    logger.info("info")
    logger.warning("warning")
    logger.error("error")
"""


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        ("", {}, ["warning", "error"]),
        ("transformers.logging.set_verbosity_error()", {}, ["error"]),
        ("transformers.logging.set_verbosity_info()", {}, ["info", "warning", "error"]),
        ("", {"TRANSFORMERS_VERBOSITY": "error"}, ["error"]),
        ("", {"TRANSFORMERS_VERBOSITY": "debug"}, ["debug", "info", "warning", "error"]),
        ("logging.getLogger('transformers').handlers.clear()", {}, ["warning", "error"]),
        ("logging.getLogger('haq').setLevel('ERROR')", {}, ["error"]),
        ("logging.getLogger('haq.checkpoint').setLevel('INFO')", {}, ["info", "warning", "error"]),
    ],
)
def test_what_a_user_sees(settings: str, environment: dict[str, str], expected: list[str]) -> None:
    code = textwrap.dedent(MESSAGES.format(settings=settings))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == ""
    # Those of transformers itself are not in question.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("[transformers]")]
    assert lines == [f"[haq] {message}" for message in expected]


def test_a_program_with_logging_of_its_own_gets_them_once() -> None:
    settings = "logging.basicConfig(format='%(levelname)s %(name)s: %(message)s', force=True)"
    code = textwrap.dedent(MESSAGES.format(settings=settings))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == (
        "WARNING haq.checkpoint.fill: warning\nERROR haq.checkpoint.fill: error\n"
    )


def test_a_verbosity_that_changes_later_counts(verbosity: None) -> None:
    logger = get_logger("haq.somewhere")
    for level in (logging.ERROR, logging.INFO, logging.WARNING):
        theirs.set_verbosity(level)
        assert logger.isEnabledFor(level)
        assert not logger.isEnabledFor(level - 10)


def test_a_level_of_its_own_comes_first(verbosity: None) -> None:
    logger = get_logger("haq.somewhere")
    logging.getLogger("haq").setLevel(logging.INFO)
    theirs.set_verbosity_error()
    assert logger.isEnabledFor(logging.INFO)
    assert not logging.getLogger("transformers.models").isEnabledFor(logging.WARNING)


def test_tests_of_programs_catch_them(caplog: pytest.LogCaptureFixture) -> None:
    get_logger("haq.somewhere").warning("One of %d.", 2)
    assert [(r.name, r.getMessage()) for r in caplog.records] == [("haq.somewhere", "One of 2.")]


def test_every_module_that_logs_does_it_by_this() -> None:
    import haq

    for file in Path(haq.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert "logging.get_logger(" not in text or file.name == "logs.py", file
        if "logging.getLogger(__name__)" in text:
            pytest.fail(f"{file} has a logger that does not follow transformers")


# --- The command line -----------------------------------------------------------------------------


def haq(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "haq.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def add(first, second):\n    return first + second\n\n" * 400)
    return file


@pytest.mark.slow
def test_a_person_who_quantizes_sees_a_bar_and_a_summary(text: Path, tmp_path: Path) -> None:
    size = ("--calibration", text, "--num-samples", 2, "--sequence-length", 32)
    status, seen = on_terminal(haq("quantize", SOURCE, tmp_path / "int8", *size))
    assert status == 0, seen
    bar, _, rest = seen.partition("\nOPTForCausalLM: 24 layers")
    assert "Quantizing: 100%" in bar
    assert "4/4 [00:" in bar
    assert "Largest relative errors:\n" in rest
    assert "Traceback" not in seen

    status, seen = on_terminal(haq("inspect", tmp_path / "int8"))
    assert status == 0
    table, _, rest = seen.partition("\n\nToo wide for this terminal, and left out: ")
    assert len(table.splitlines()) == 2 + 24
    assert max(map(len, table.splitlines())) <= COLUMNS
    assert table.splitlines()[0].split()[-2:] == ["before", "after"]
    assert "OPTForCausalLM, compressed-tensors int-quantized, 4.5 MB.\n" in rest

    generated = haq("generate", tmp_path / "int8", "def add", "--max-new-tokens", 5)
    status, seen = on_terminal(generated)
    assert status == 0
    assert "\ndef add" in seen
    assert seen.rpartition("\n[haq] 5 tokens in ")[1]


@pytest.mark.slow
def test_an_interrupt_is_no_traceback(text: Path, tmp_path: Path) -> None:
    """Control-C while haq quantizes, and then the same command to the end."""
    size = ("--calibration", text, "--num-samples", 16, "--sequence-length", 256)
    command = haq("quantize", SOURCE, tmp_path / "int8", *size)
    stopping = textwrap.dedent("""
        import signal, sys
        # Where the tests run in the background of a shell, it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import haq.checkpoint.stream as stream
        from haq.cli import main
        quantize_block = stream.quantize_block
        blocks = []
        def second(*args, **options):
            if blocks:
                signal.raise_signal(signal.SIGINT)
            blocks.append(1)
            return quantize_block(*args, **options)
        stream.quantize_block = second
        sys.argv = ["haq", *sys.argv[1:]]
        main()
    """)
    status, seen = on_terminal([sys.executable, "-c", stopping, *command[3:]])
    assert status == 130, seen
    assert "Traceback" not in seen
    last = seen.splitlines()[-1]
    assert last.startswith("haq: 1 blocks are done and kept in ")
    assert "The same call goes on after them." in last
    status, seen = on_terminal(command)
    assert status == 0, seen
    assert seen.startswith("[haq] Going on after the 1 blocks done in ")
    assert "Quantizing:  25%" in seen


def test_a_pipe_has_results_alone(text: Path) -> None:
    options = ("--text", text, "--max-tokens", 64, "--sequence-length", 32, "--reference", SOURCE)
    result = subprocess.run(haq("evaluate", SOURCE, *options), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("perplexity ")


def test_a_reader_that_has_had_enough(tmp_path: Path) -> None:
    ours, its = os.pipe()
    os.close(ours)
    with os.fdopen(its, "w") as closed:
        result = subprocess.run(
            haq("inspect", SOURCE), stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (1, "")

"""What ``import haq`` costs and does: next to nothing; and that its names are all there anyway."""

import ast
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import haq

PACKAGE = Path(haq.__file__).parent


def python(code: str, *options: str) -> str:
    """What a fresh process prints."""
    result = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


# Notes everything that a process must not do while it imports, and lets it go on.
WATCH = """
    import sys
    sins = []

    def audit(event, args):
        if event.startswith("socket.") and event != "socket.gethostname":
            sins.append((event, str(args)))
        if event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "subprocess.Popen"):
            sins.append((event, str(args)))
        if event == "open":
            path, mode, flags = args
            # Descriptors and what Python itself keeps compiled are nobody's files.
            if isinstance(path, (str, bytes)) and "__pycache__" not in str(path):
                writes = mode is not None and set(mode) & set("wax+") or flags & 0b11
                if writes and not str(path).startswith(("/dev/", "/proc/")):
                    sins.append((event, str(args)))

    sys.addaudithook(audit)
"""

HEAVY = [
    *("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate", "datasets"),
    *("pandas", "pyarrow", "matplotlib", "typer", "rich", "triton", "sklearn", "scipy", "tqdm"),
    *("fastapi", "compressed_tensors", "tokenizers", "haq.public", "haq.nn", "haq.checkpoint"),
]
# Beyond what transformers needs itself, which from release to release is another set.
HEAVY_IN_USE = [
    *("datasets", "pandas", "pyarrow", "matplotlib", "typer", "triton", "sklearn", "scipy"),
    *("fastapi", "compressed_tensors", "IPython", "haq.cli", "haq.plotting"),
]


def test_importing_needs_and_does_nothing() -> None:
    """No module that takes time, no network, no GPU, no file written, no warning, no output."""
    code = f"""
    {WATCH}
    import haq
    assert not sins, sins
    print([name for name in {HEAVY} if name in sys.modules])
    """
    assert python(code, "-W", "error") == "[]\n"


def test_using_it_needs_what_transformers_needs() -> None:
    """The first public name brings the rest of haq, and still nothing that few calls need."""
    code = f"""
    import sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, generation
    before = set(sys.modules)
    {WATCH}
    import haq
    haq.quantize_model
    assert not sins, sins
    assert not torch.cuda.is_initialized()
    new = set(sys.modules) - before
    assert "haq.quantization.pipeline" in new
    print([name for name in {HEAVY_IN_USE} if name in new])
    """
    assert python(code) == "[]\n"


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    code = f"""
    {WATCH}
    import os, socket
    open({str(tmp_path / "written")!r}, "w").close()
    os.close(os.open({str(tmp_path / "other")!r}, os.O_RDWR | os.O_CREAT))
    os.mkdir({str(tmp_path / "made")!r})
    socket.socket().close()
    open({str(tmp_path / "written")!r}).close()
    print([event for event, _ in sins])
    """
    assert python(code) == "['open', 'open', 'os.mkdir', 'socket.__new__']\n"


# --- The names ------------------------------------------------------------------------------------


def test_the_names_are_those_that_are_imported() -> None:
    """Once in a list, for readers and type checkers, and once as imports: the same ones."""
    tree = ast.parse((PACKAGE / "public.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    assert sorted(names) == haq.__all__
    assert sorted(names, key=lambda name: (name[0].islower(), name)) == haq.__all__


def test_all_of_them_can_be_had_in_every_way() -> None:
    """In a process in which nothing has been used yet."""
    data = pickle.dumps((haq.QuantizationConfig(damping=0.1), haq.quantize_model))
    code = f"""
    import pickle, sys
    import haq
    assert not hasattr(haq, "__wrapped__")
    assert "haq.public" not in sys.modules, "Python's own names bring everything"

    listed = dir(haq)
    config, function = pickle.loads({data!r})
    assert config.damping == 0.1
    assert function is haq.quantize_model
    assert {{*haq.__all__, "__version__"}} <= set(listed)
    from haq import *
    print([name for name in haq.__all__ if globals().get(name) is not getattr(haq, name)])
    """
    assert python(code) == "[]\n"


def test_a_submodule_comes_alone() -> None:
    code = "import sys; from haq.config import OffloadConfig; print('haq.public' in sys.modules)"
    assert python(code) == "False\n"


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match=r"^module 'haq' has no attribute 'quantise'$"):
        _ = haq.quantise
    assert not hasattr(haq, "_private")
    with pytest.raises(ImportError, match="cannot import name 'quantise' from 'haq'"):
        exec("from haq import quantise")


@pytest.mark.slow
def test_a_type_checker_knows_the_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    uses, config = tmp_path / "uses.py", tmp_path / "mypy.ini"
    uses.write_text(
        "import haq\n"
        "from haq import QuantizationConfig\n"
        "reveal_type(haq.perplexity)\n"
        "reveal_type(QuantizationConfig(damping=0.1).damping)\n"
        "haq.quantise\n"
    )
    # Without reading all of torch, which takes a minute.
    skipped = "".join(f"[mypy-{n}.*]\nfollow_imports = skip\n" for n in ("torch", "transformers"))
    config.write_text(f"[mypy]\nstrict = True\n{skipped}")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", "cache"]
    result = subprocess.run(
        [*command, str(uses)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("uses.py")]
    assert len(lines) == 3, result.stdout
    assert "sequence_length: int =, progress: bool =) -> float" in lines[0]
    assert lines[1].endswith('Revealed type is "float"')
    assert lines[2].endswith('Module has no attribute "quantise"  [attr-defined]')


# --- The registry of transformers -----------------------------------------------------------------

REGISTERED = """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    print(AUTO_QUANTIZER_MAPPING["compressed-tensors"].__name__)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import haq; from transformers import AutoModelForCausalLM",
        "import transformers.quantizers.auto; import haq",
        "from haq import quantize_model",
    ],
)
def test_the_quantizer_is_registered_in_any_order(first: str) -> None:
    assert python(f"\n    {first}{REGISTERED}") == "CompressedTensorsOrHaq\n"


def test_the_module_that_was_waited_for_is_like_any_other() -> None:
    code = """
    import haq, inspect, sys
    from transformers.quantizers import auto
    print(type(auto.__loader__).__name__, auto.__spec__.loader is auto.__loader__)
    print("def register_quantizer" in inspect.getsource(auto), "haq.public" in sys.modules)
    """
    assert python(code) == "SourceFileLoader True\nTrue False\n"


def test_a_module_that_is_not_there_is_missed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from haq.arrivals import when_imported

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    called: list[str] = []
    when_imported("no_such_module_of_haq", lambda: called.append("called"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_haq"):
        __import__("no_such_module_of_haq")
    assert called == []


def test_a_module_that_fails_at_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from haq.arrivals import when_imported

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_of_haq.py").write_text("import os\nassert 'HAQ_LATE' in os.environ\n")
    called: list[str] = []
    when_imported("late_of_haq", lambda: called.append(sys.modules["late_of_haq"].os.name))
    with pytest.raises(AssertionError):
        __import__("late_of_haq")
    assert called == []
    monkeypatch.setenv("HAQ_LATE", "1")
    __import__("late_of_haq")
    monkeypatch.delitem(sys.modules, "late_of_haq")
    assert len(called) == 1

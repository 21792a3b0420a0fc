"""The project itself: its import order, its version, and what importing it does."""

import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run(*command, **options):
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, **options
    )


def test_the_rooms_import_in_their_order():
    result = run(Path(sys.executable).with_name("lint-imports"), "--no-cache")
    assert result.returncode == 0, result.stdout


def test_the_version_is_that_of_the_package():
    import haq

    assert haq.__version__ == version("haq")


# Runs in a process of its own: in this one, much is imported already.
_IMPORT = """
    import builtins, io, socket, sys
    import torch, transformers

    def refuse(*args, **options):
        raise AssertionError(f"import haq: {args}")

    socket.socket.connect = socket.getaddrinfo = refuse
    torch.cuda.init = torch._C._cuda_init = refuse
    real_open = builtins.open

    def reading(file, mode="r", *args, **options):
        assert set(mode) <= set("rbt"), f"import haq writes {file}"
        return real_open(file, mode, *args, **options)

    builtins.open = io.open = reading
    sys.dont_write_bytecode = True
    import haq
    assert not torch.cuda.is_initialized()
    # A second of importing that few need.
    assert not {"datasets", "matplotlib"} & set(sys.modules)
    print("quiet")
"""


def test_importing_does_nothing():
    """No network, no GPU started, no file written, no warning, nothing printed."""
    result = run(sys.executable, "-W", "error:::haq", "-c", textwrap.dedent(_IMPORT))
    assert (result.stdout, result.stderr) == ("quiet\n", "")

"""Runs notebooks, each in a kernel of its own, and writes them with their outputs.

    python tests/run_notebook.py examples/quantize.ipynb examples/offload.ipynb

That is for after a change to one of them, or to what they show. The tests run it, too.
"""

import argparse
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

# Nothing about the machine.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, help="where it starts; by default where it lies")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        run(path, arguments.folder or path.parent)


def run(path: Path, folder: Path) -> None:
    """Run one by the Python that runs this. If a cell fails, nothing is written."""
    notebook = nbformat.read(path, as_version=4)
    # No kernels that somebody has installed: the one that is left belongs to this environment.
    specs = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs),
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder.resolve())}},
    )
    client.execute()
    notebook.metadata = METADATA
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()

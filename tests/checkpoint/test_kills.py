"""`quantize_checkpoint`, killed at any moment and called again: nothing is lost, nothing left."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architectures import MIXTURES

KILLS = 50

# Imports once and forks: a kill has to hit the work, not the import of torch.
_SERVER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import haq

source, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
calibration = [torch.randint(3, 96, (2, 32), generator=generator) for _ in range(3)]

def start(output):
    child = os.fork()
    if child == 0:
        haq.quantize_checkpoint(source, output, calibration, progress=False)
        os._exit(0)
    return child

begun = time.perf_counter()
assert os.waitpid(start(f"{folder}/whole"), 0)[1] == 0
seconds = time.perf_counter() - begun
random.seed(0)
hit = 0
for number in range(kills):
    output = f"{folder}/{number}"
    child = start(output)
    time.sleep(random.uniform(0, 1.1 * seconds))
    os.kill(child, signal.SIGKILL)
    hit += os.waitpid(child, 0)[1] != 0
    assert os.waitpid(start(output), 0)[1] == 0, number
print(hit)
"""


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
    }


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    MIXTURES["mixtral"]().save_pretrained(tmp_path / "source")
    folder = tmp_path / "out"
    folder.mkdir()
    server = [sys.executable, "-c", _SERVER, tmp_path / "source", folder, str(KILLS)]
    result = subprocess.run(server, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > KILLS / 2, "most must be killed before they are done"
    expected = hashes(folder / "whole")
    assert sorted(p.name for p in folder.iterdir()) == sorted([*map(str, range(KILLS)), "whole"])
    assert all(hashes(folder / str(number)) == expected for number in range(KILLS))

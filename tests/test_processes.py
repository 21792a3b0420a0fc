"""Several processes come to what one comes to."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed

import haq
from haq.checkpoint.files import TensorFiles
from haq.model.routing import RoutedInputs
from haq.processes import ALONE, Processes
from haq.quantization.hessian import SecondMoment
from haq.quantization.scales import ChannelStatistics
from tests.architectures import ARCHITECTURES, MIXTURES, token_ids
from tests.quantization.moments import mean_of

REPOSITORY = Path(__file__).parents[1]

# --- Who has what ---------------------------------------------------------------------------------


@given(count=st.integers(1, 40), number=st.integers(0, 200))
def test_every_item_belongs_to_one_process_and_in_order(count: int, number: int) -> None:
    items = list(range(number))
    shares = [Processes(rank, count).share(items) for rank in range(count)]
    assert [item for share in shares for item in share] == items
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_with_a_batch_for_each_none_is_without() -> None:
    for count in range(1, 20):
        for number in range(count, 60):
            assert all(Processes(rank, count).share(range(number)) for rank in range(count))


def test_alone_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "barrier"):
        monkeypatch.delattr(distributed, name)
    tensor = torch.tensor([1.0, 2.0])
    assert ALONE.sum_(tensor) is tensor
    assert ALONE.max_(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert ALONE.counts(7, torch.device("cpu")) == [7]
    assert ALONE.share("abc") == "abc"
    assert ALONE.first
    ALONE.wait()


def test_without_a_launcher_there_is_one() -> None:
    assert not distributed.is_initialized()
    assert Processes.of_torch() == ALONE == Processes()


def test_the_first_is_one() -> None:
    assert [Processes(rank, 3).first for rank in range(3)] == [True, False, False]


# --- Sums, with the other process made up ---------------------------------------------------------


class Two:
    """Two processes in one: each runs up to its next sum, then both go on.

    A sum is asked for by one after the other, so the work of the first is done twice: once to
    learn what it gives, once with what the second gives.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._given: list[list[Tensor]] = [[], []]
        self._rank = self._next = 0
        monkeypatch.setattr(distributed, "all_reduce", self._all_reduce)

    def run(self, work: Callable[[Processes], Any]) -> list[Any]:
        """What ``work`` gives in each: it is repeated until both know all of the other."""
        before, results = -1, []
        while sum(map(len, self._given)) > before:
            before = sum(map(len, self._given))
            results = []
            for self._rank in range(2):
                self._next = 0
                results.append(work(Processes(self._rank, 2)))
        return results

    def _all_reduce(self, tensor: Tensor, op: Any = distributed.ReduceOp.SUM) -> None:
        number, own, other = self._next, self._given[self._rank], self._given[1 - self._rank]
        self._next += 1
        del own[number:]
        own.append(tensor.clone())
        if number < len(other) and other[number].shape == tensor.shape:
            if op == distributed.ReduceOp.MAX:
                tensor.copy_(torch.maximum(tensor, other[number]))
            else:
                tensor.add_(other[number])


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Two:
    return Two(monkeypatch)


BATCHES = [torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)) for rows in range(7)]
BATCHES = BATCHES[1:]


def test_the_numbers_of_all_by_rank(two: Two) -> None:
    device = torch.device("cpu")
    assert two.run(lambda p: p.counts(10 + p.rank, device)) == [[10, 11], [10, 11]]


@pytest.mark.parametrize("kind", [ChannelStatistics, SecondMoment])
def test_statistics_of_shares_are_those_of_all(kind: Any, two: Two) -> None:
    def work(processes: Processes) -> Any:
        seen = kind(6)
        for batch in processes.share(BATCHES):
            seen.update(batch)
        seen.sum_over(processes)
        return seen

    alone = work(ALONE)
    first, second = two.run(work)
    assert first.tokens == second.tokens == alone.tokens == sum(map(len, BATCHES))
    if kind is SecondMoment:
        assert torch.equal(mean_of(first), mean_of(second))
        torch.testing.assert_close(mean_of(first), mean_of(alone))
        rows = torch.cat(BATCHES).double()
        exact = (rows.T @ rows / len(rows)).float()
        torch.testing.assert_close(mean_of(first), exact)
    else:
        assert torch.equal(first.p4, second.p4)
        assert torch.equal(first.maximum, second.maximum)
        assert torch.equal(first.maximum, alone.maximum)
        torch.testing.assert_close(first.p4, alone.p4)


def routed(processes: Processes, experts: int = 4) -> RoutedInputs:
    inputs = RoutedInputs(experts, processes=processes)
    numbers = range(len(BATCHES))
    for number in processes.share(numbers):
        hidden = BATCHES[number]
        index = torch.arange(2 * len(hidden)).reshape(-1, 2) * (number + 1) % (experts - 1)
        inputs.watch((hidden, index), torch.ones(len(hidden), dtype=torch.bool))
    return inputs


def test_routing_of_shares_is_that_of_all(two: Two) -> None:
    alone = routed(ALONE).tokens_per_expert()
    assert two.run(lambda p: routed(p).tokens_per_expert()) == [alone, alone]
    assert alone[3] == 0


@pytest.mark.parametrize("limit", [1, 2, 5, 12, 100])
def test_the_sample_of_shares_is_that_of_all(limit: int, two: Two) -> None:
    def work(processes: Processes) -> list[Tensor]:
        inputs = routed(processes)
        return [inputs.of_any(limit), *(inputs.some_of(expert, limit) for expert in range(4))]

    alone = work(ALONE)
    for found in two.run(work):
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other)


# --- Real ones ------------------------------------------------------------------------------------

BATCH_SEEDS = range(5)

WORKER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import haq
from haq.checkpoint import progress, stream
from haq.processes import Processes
from tests.architectures import token_ids

source, output, seeds, stop = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])

def stopping(module, name, number):
    original, calls = getattr(module, name), []
    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(module, name, stopped)

if stop:
    modules = {"stream": stream, "progress": progress}
    stopping(modules[stop[0]], stop[1], stop[2])
batches = [token_ids(2, 48, seed=seed) for seed in range(seeds)]
try:
    report = haq.quantize_checkpoint(source, output, batches, progress=False)
except ValueError as error:
    print("ValueError:", error)
    sys.exit(3)
print(json.dumps(report.to_dict(), sort_keys=True))
torch.distributed.destroy_process_group()
"""

Stop = tuple[str, str, int] | None


def start(source: Path, output: Path, seeds: int, stop: Stop = None) -> list[tuple[int, str, str]]:
    """Two processes, as a launcher starts them: exit code, standard output and error of each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    started = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-c", WORKER, source, output, str(seeds), json.dumps(stop)]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        texts = [process.communicate(timeout=180) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(started, texts, strict=True)]


def reports(results: Sequence[tuple[int, str, str]]) -> list[Any]:
    for code, _, errors in results:
        assert code == 0, errors
    return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


def assert_no_leftovers(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("opt", "mixtral"):
        (ARCHITECTURES | MIXTURES)[name]().save_pretrained(folder / name)
    return {name: folder / name for name in ("opt", "mixtral")}


@pytest.fixture(scope="module")
def of_two(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Any]]]:
    """What two processes that nothing stopped made of each source, and their reports."""
    made = {}
    for name, source in sources.items():
        folder = tmp_path_factory.mktemp(f"two-{name}")
        made[name] = folder / "int8", reports(start(source, folder / "int8", len(BATCH_SEEDS)))
        assert_no_leftovers(folder, "int8")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_two_processes_come_to_what_one_comes_to(
    name: str, sources: dict[str, Path], of_two: dict[str, tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = [token_ids(2, 48, seed=seed) for seed in BATCH_SEEDS]
        report = haq.quantize_checkpoint(sources[name], tmp_path / "one", batches, progress=False)
    finally:
        torch.set_num_threads(threads)
    folder, (first, second) = of_two[name]
    assert first == second

    one, two = TensorFiles(tmp_path / "one"), TensorFiles(folder)
    assert {n: (h.dtype, h.shape, h.file.name) for n, h in one.headers.items()} == {
        n: (h.dtype, h.shape, h.file.name) for n, h in two.headers.items()
    }
    equal = total = 0
    for tensor in one.headers:
        ours, theirs = one.read(tensor), two.read(tensor)
        if ours.dtype == torch.int8:
            equal, total = equal + int((ours == theirs).sum()), total + ours.numel()
        else:
            largest = float(ours.abs().max())
            assert float((ours - theirs).abs().max()) <= 1e-3 * largest, tensor
    assert equal / total >= 0.99, f"{equal} of {total}"

    alone = json.loads(json.dumps(report.to_dict()))
    assert first["tokens"] == 5 * 2 * 48
    for ours, theirs in zip(alone["blocks"], first["blocks"], strict=True):
        exact = ("name", "tokens", "smoothing", "rounding", "asymmetric", "note", "expert")
        for layer, other in zip(ours["layers"], theirs["layers"], strict=True):
            assert {k: layer[k] for k in exact} == {k: other[k] for k in exact}
            for error in ("error_before", "error_after"):
                assert other[error] == pytest.approx(layer[error], rel=0.05, abs=1e-9)
        for router, other in zip(ours["routing"], theirs["routing"], strict=True):
            assert {k: router[k] for k in ("name", "tokens", "starved")} == {
                k: other[k] for k in ("name", "tokens", "starved")
            }
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "one").iterdir())
    assert (folder / "config.json").read_bytes() == (tmp_path / "one/config.json").read_bytes()
    ids = token_ids(1, 12)
    with torch.no_grad():
        logits = [haq.from_pretrained(f)(ids).logits for f in (tmp_path / "one", folder)]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stop"),
    [
        # In the second block, after the first was noted.
        ("mixtral", ("stream", "quantize_block", 2)),
        # While what enters the second block is written: two or three batches of the embeddings,
        # then these.
        ("opt", ("progress", "_write_hidden", 4)),
        # When all is written.
        ("opt", ("stream", "check_finite", 2)),
    ],
)
def test_two_processes_that_were_killed_go_on_to_the_same_bytes(
    name: str,
    stop: Stop,
    sources: dict[str, Path],
    of_two: dict[str, tuple[Path, list[Any]]],
    tmp_path: Path,
) -> None:
    killed = start(sources[name], tmp_path / "int8", len(BATCH_SEEDS), stop)
    assert -signal.SIGKILL in [code for code, _, _ in killed]
    assert all(code != 0 for code, _, _ in killed)
    assert_no_leftovers(tmp_path, "int8.incomplete")
    again = reports(start(sources[name], tmp_path / "int8", len(BATCH_SEEDS)))
    assert_no_leftovers(tmp_path, "int8")
    folder, expected = of_two[name]
    assert again == expected
    assert_no_leftovers(tmp_path / "int8", *(path.name for path in folder.iterdir()))
    for path in folder.iterdir():
        assert (tmp_path / "int8" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_finished_job_is_known_again_by_both(
    sources: dict[str, Path], of_two: dict[str, tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    folder, expected = of_two["opt"]
    shutil.copytree(folder, tmp_path / "int8")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "int8").iterdir()}
    assert reports(start(sources["opt"], tmp_path / "int8", len(BATCH_SEEDS))) == expected
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "int8").iterdir()}
    assert before == after
    assert_no_leftovers(tmp_path, "int8")


@pytest.mark.slow
def test_more_processes_than_batches_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    for code, out, _ in start(sources["opt"], tmp_path / "int8", 1):
        assert code == 3
        assert "ValueError: `calibration` must have a batch for each of 2 processes, got 1." in out
    assert_no_leftovers(tmp_path)

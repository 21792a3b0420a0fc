"""`haq profile`, and `haq generate --gpu-memory`: a mixture of experts in two tiers of memory."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import haq
from tests.test_cli import REPOSITORY, done, run

MIXTURE = REPOSITORY / "examples/tiny_models/mixtral-python"
DENSE = REPOSITORY / "examples/tiny_models/opt-python"
PROMPT = "def read(self, name):"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(
        "\n\n".join(f"def name_{i}(self):\n    return self.value[{i}]" for i in range(400))
    )
    return file


@pytest.fixture(scope="module")
def profiled(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `haq profile` wrote, and what it printed."""
    file = tmp_path_factory.mktemp("profile") / "routing.npz"
    options = ["--text", text, "--num-samples", 4, "--sequence-length", 64]
    return file, done("profile", MIXTURE, file, *options)


def test_profile_writes_what_python_collects(profiled: tuple[Path, str], text: Path) -> None:
    file, printed = profiled
    model = AutoModelForCausalLM.from_pretrained(MIXTURE, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(MIXTURE)
    batches = haq.calibration_batches(tokenizer, text, num_samples=4, sequence_length=64)
    expected = haq.RoutingStatistics.collect(model, batches)
    found = haq.RoutingStatistics.load(file)
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.transitions, expected.transitions)
    assert found.tokens == 256
    assert f"256 tokens. Saved in {file}." in printed
    shares = [float(share) for share in re.findall(r"take ([\d.]+) % of choices", printed)]
    halves = np.sort(expected.counts, 1)[:, 4:].sum(1) / expected.counts.sum(1)
    np.testing.assert_allclose(shares, 100 * halves, atol=0.06)


def test_profile_prints_json(text: Path, tmp_path: Path) -> None:
    options = ["--text", text, "--num-samples", 2, "--sequence-length", 32, "--json"]
    values = json.loads(done("profile", MIXTURE, tmp_path / "routing.npz", *options))
    assert values["layers"] == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    assert values["tokens"] == 64
    assert np.sum(values["counts"], 1).tolist() == [128] * 4


def test_a_dense_model_has_no_routing(text: Path, tmp_path: Path) -> None:
    result = run("profile", DENSE, tmp_path / "routing.npz", "--text", text, "--num-samples", 2)
    assert result.exit_code == 1
    assert "must be a mixture of experts" in result.stderr
    assert not list(tmp_path.iterdir())


def test_generate_in_two_tiers_writes_what_the_model_writes(profiled: tuple[Path, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(MIXTURE, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(MIXTURE)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    config = haq.OffloadConfig(max_length=inputs["input_ids"].shape[1] + 12)
    budget = haq.ExpertOffloader(model, device="cpu", config=config).budget
    half = budget.needed + 16 * budget.spare // 2
    options = ["--max-new-tokens", 12, "--gpu-memory", half, "--device", "cpu"]
    options += ["--statistics", profiled[0]]
    result = run("generate", MIXTURE, PROMPT, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n"
    # The report is not part of the text, and of its lines those that are for people.
    assert re.match(r"\n[\d.]+ % of choices on the GPU; .*\n.* copied; prefetches: ", result.stderr)
    assert "mlp.experts" not in result.stderr
    values = json.loads(done("generate", MIXTURE, PROMPT, *options, "--json"))
    assert values["text"] + "\n" == result.stdout
    assert sum(values["offload"]["resident"]) == 16
    assert values["offload"]["layers"] == [f"model.layers.{i}.mlp.experts" for i in range(4)]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MIXTURE, ["--gpu-memory", "1MiB"], "`gpu_memory` must be at least"),
        (MIXTURE, ["--gpu-memory", "much"], "`gpu_memory` must be a size"),
        (DENSE, ["--gpu-memory", "1GiB"], "must be a mixture of experts"),
        (MIXTURE, ["--gpu-memory", "1GiB", "--statistics", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_cannot_work_is_said(model: Path, options: list[str], message: str) -> None:
    result = run("generate", model, PROMPT, "--device", "cpu", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr

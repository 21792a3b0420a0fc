"""The example scripts do what they say, on the small models of this repository."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import haq

EXAMPLES = Path(__file__).parents[1] / "examples"
MIXTURE = EXAMPLES / "tiny_models/mixtral-python"
PROMPT = "def read(self, name):"

# --- serve_openai.py ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    for package in ("fastapi", "httpx", "uvicorn"):
        pytest.importorskip(package)
    sys.path.insert(0, str(EXAMPLES))
    try:
        import serve_openai
    finally:
        sys.path.remove(str(EXAMPLES))
    yield serve_openai
    del sys.modules["serve_openai"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MIXTURE)


@pytest.fixture(scope="module")
def server(example: Any, tokenizer: Any) -> Iterator[Any]:
    """Around a model whose experts are in both tiers."""
    model = AutoModelForCausalLM.from_pretrained(MIXTURE, dtype=torch.float32)
    config = haq.OffloadConfig(max_length=256)
    budget = haq.ExpertOffloader(model, device="cpu", config=config).budget
    half = budget.needed + 16 * budget.spare // 2
    with haq.ExpertOffloader(model, device="cpu", gpu_memory=half, config=config) as offloader:
        assert sum(map(len, offloader.placement.resident)) == 16
        yield example.Server("mixtral-python", offloader, tokenizer)


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    with TestClient(server.app(), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def chatting(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tokenizer has a chat template; what one question of a user becomes."""
    template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}def"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return "# user: read a name\ndef"


QUESTION = {"messages": [{"role": "user", "content": "read a name"}], "temperature": 0}


def written(tokenizer: Any, prompt: str, count: int, **options: Any) -> str:
    """What the model writes that was never offloaded."""
    model = AutoModelForCausalLM.from_pretrained(MIXTURE, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(7)
    tokens = model.generate(**inputs, max_new_tokens=count, **({"do_sample": False} | options))
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def complete(client: Any, **asked: Any) -> dict[str, Any]:
    given = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    reply = client.post("/v1/completions", json=given | asked)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def chunks(client: Any, path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What comes as server-sent events, without the last, which says that it is the last."""
    with client.stream("POST", path, json=asked | {"stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_models(client: Any) -> None:
    reply = client.get("/v1/models").json()
    assert reply["object"] == "list"
    assert [model["id"] for model in reply["data"]] == ["mixtral-python"]


def test_a_completion_is_what_the_model_writes(client: Any, tokenizer: Any) -> None:
    reply = complete(client, model="mixtral-python")
    given = len(tokenizer(PROMPT)["input_ids"])
    assert reply["object"] == "text_completion"
    assert reply["model"] == "mixtral-python"
    assert reply["usage"] == {
        "prompt_tokens": given,
        "completion_tokens": 24,
        "total_tokens": given + 24,
    }
    (choice,) = reply["choices"]
    assert choice["text"] == written(tokenizer, PROMPT, 24)
    assert choice["finish_reason"] == "length"


def test_the_pieces_of_a_stream_are_the_completion(client: Any) -> None:
    expected = complete(client)
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    asked |= {"stream_options": {"include_usage": True}}
    *pieces, last, usage = chunks(client, "/v1/completions", asked)
    assert len(pieces) > 5
    assert "".join(p["choices"][0]["text"] for p in pieces) == expected["choices"][0]["text"]
    assert {p["choices"][0]["finish_reason"] for p in pieces} == {None}
    assert last["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]) == ([], expected["usage"])
    assert len({p["id"] for p in (*pieces, last, usage)}) == 1
    assert {p["object"] for p in (*pieces, last, usage)} == {"text_completion"}


def test_a_chat_is_a_completion_of_its_template(client: Any, tokenizer: Any, chatting: str) -> None:
    reply = client.post("/v1/chat/completions", json=QUESTION | {"max_tokens": 24}).json()
    expected = written(tokenizer, chatting, 24)
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    assert choice["finish_reason"] == "length"

    asked = QUESTION | {"max_completion_tokens": 24}
    first, *pieces, last = chunks(client, "/v1/chat/completions", asked)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == expected
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert {p["object"] for p in (first, *pieces, last)} == {"chat.completion.chunk"}


def test_sampling_by_the_seed(client: Any, tokenizer: Any) -> None:
    asked = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    texts = [complete(client, **asked)["choices"][0]["text"] for _ in range(2)]
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0}
    assert texts == [written(tokenizer, PROMPT, 24, **options)] * 2
    assert complete(client, **asked | {"seed": 8})["choices"][0]["text"] != texts[0]


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_it_stops_at_a_string(client: Any, as_list: bool, stream: bool) -> None:
    whole = complete(client)["choices"][0]["text"]
    stop = whole[10:14]
    # One that begins like a piece of the text and goes on otherwise never stops anything.
    stops = [stop, f"{whole[3:6]}\x00"] if as_list else stop
    asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24, "stop": stops}
    if stream:
        *pieces, last = chunks(client, "/v1/completions", asked)
        text = "".join(p["choices"][0]["text"] for p in pieces)
        reason = last["choices"][0]["finish_reason"]
    else:
        reply = complete(client, stop=stops)
        assert reply["usage"]["completion_tokens"] < 24
        text, reason = (reply["choices"][0][key] for key in ("text", "finish_reason"))
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


class Pieces(list[str]):
    """Stands for a streamer."""

    def end(self) -> None:
        """There is nothing to be told."""


@pytest.mark.parametrize(
    ("pieces", "expected", "reason"),
    [
        (["ab", "cd", "ef"], ["a"], "stop"),
        (["ab", "cd", "xf"], ["a", "bcdxf"], "length"),
        (["ab", "c"], ["a", "bc"], "length"),
        (["bcde"], [], "stop"),
    ],
)
def test_a_string_that_comes_in_pieces(
    pieces: list[str], expected: list[str], reason: str, example: Any, server: Any
) -> None:
    """No part of a string it stops at is sent before it is known not to be one."""
    answer = answer_of(example, server, 10, stop="bcde")
    answer.stopped.set()  # The model has no part in this.
    answer.streamer = Pieces(pieces)
    assert [piece for piece in answer.pieces() if piece] == expected
    assert answer.finish_reason == reason


def test_it_says_that_the_model_has_ended(
    client: Any, server: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = complete(client)["choices"][0]["text"]
    end = tokenizer(whole)["input_ids"][5]
    monkeypatch.setattr(server.offloader.model.generation_config, "eos_token_id", end)
    reply = complete(client)
    assert reply["usage"]["completion_tokens"] <= 6
    assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "asked", "status", "message"),
    [
        ("completions", {}, 400, "`prompt`: Field required"),
        ("completions", {"prompt": ""}, 400, "must be 1 to 256 tokens, got 0 and 16"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "`max_tokens`: "),
        ("completions", {"prompt": "a", "max_tokens": 300}, 400, "must be 1 to 256 tokens, got 1"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "`temperature`: "),
        ("completions", {"prompt": "a", "top_p": 0}, 400, "`top_p`: "),
        ("completions", {"prompt": "a", "tools": []}, 400, "`tools`: Extra inputs are not"),
        ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "There is mixtral-python here"),
        ("completions", "no object", 400, "valid dictionary"),
        ("chat/completions", QUESTION, 400, "has no chat template. Use /v1/completions."),
        ("chat/completions", {"messages": "hello"}, 400, "`messages`: "),
        ("embeddings", {"input": "a"}, 404, "Not Found"),
    ],
)
def test_bad_input_is_refused_in_the_form_of_openai(
    client: Any, path: str, asked: Any, status: int, message: str
) -> None:
    reply = client.post(f"/v1/{path}", json=asked)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == (message.split("`")[1] if message.startswith("`") else error["param"])


def test_what_fails_inside_is_said(
    client: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.offloader.model, "generate", fails)
    reply = client.post("/v1/completions", json={"prompt": "a"})
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "RuntimeError: out of memory"
    assert reply.json()["error"]["type"] == "server_error"
    monkeypatch.undo()
    complete(client)


def test_the_report(client: Any, server: Any) -> None:
    server.offloader.reset()
    complete(client)
    report = client.get("/report").json()
    assert sum(report["resident"]) == 16
    assert 0 < report["hit_rate"] < 1
    assert report["counts"][0]["tokens"] >= 24


def test_one_answer_at_a_time(client: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several clients at once get what each would get alone, one after the other."""
    prompts = [PROMPT, "class Reader:", "import os"]
    alone = [complete(client, prompt=prompt)["choices"] for prompt in prompts]
    found: dict[str, Any] = {}
    generate, at_work, most = server.offloader.model.generate, [], []

    def noted(*args: Any, **options: Any) -> Any:
        at_work.append(1)
        most.append(len(at_work))
        try:
            return generate(*args, **options)
        finally:
            at_work.pop()

    monkeypatch.setattr(server.offloader.model, "generate", noted)

    def ask(prompt: str) -> None:
        found[prompt] = complete(client, prompt=prompt)["choices"]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == alone
    assert most == [1, 1, 1]


def answer_of(example: Any, server: Any, limit: int, **asking: Any) -> Any:
    asked = example.Completion(prompt=PROMPT, temperature=0, **asking)
    ids = server.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return example.Answer(server, ids, asked, limit)


def test_nobody_reads_on_and_the_model_stops(example: Any, server: Any, client: Any) -> None:
    answer = answer_of(example, server, 200)

    async def read_two() -> None:
        pieces = answer.arriving()
        for _ in range(2):
            await anext(pieces)
        await pieces.aclose()

    asyncio.run(read_two())
    complete(client, max_tokens=1)  # Its turn is over.
    assert 2 <= answer.tokens < 100


def test_who_went_away_while_waiting_gets_no_turn(example: Any, server: Any) -> None:
    answer = answer_of(example, server, 200)
    answer.stopped.set()
    assert "".join(answer.pieces()) == ""
    assert answer.tokens == 0


@pytest.mark.slow
def test_a_client_that_closes_the_connection(example: Any, server: Any, monkeypatch: Any) -> None:
    """Over a real socket, with a real server."""
    import httpx
    import uvicorn

    answers = []
    made = example.Answer

    def noted(*args: Any) -> Any:
        answers.append(made(*args))
        return answers[-1]

    monkeypatch.setattr(example, "Answer", noted)
    running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1/completions"
        asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 230, "stream": True}
        with httpx.stream("POST", url, json=asked) as reply:
            next(reply.iter_lines())
        short = httpx.post(url, json={"prompt": PROMPT, "max_tokens": 1, "temperature": 0})
        assert short.json()["usage"]["completion_tokens"] == 1
    finally:
        running.should_exit = True
        thread.join()
    assert len(answers) == 2
    assert 0 < answers[0].tokens < 200


# --- reproduce_paper.py ---------------------------------------------------------------------------


def reproduce(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, EXAMPLES / "reproduce_paper.py", "--dry-run", "--out", folder, *options],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SHORT = ("--models", "tiny_models/opt-python", "--methods", "float", "fixed")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where a short dry run left its results, and the lines of its table."""
    folder = tmp_path_factory.mktemp("paper")
    done = reproduce(folder, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "tiny_models/opt-python needs: float 0.02 GB, fixed 0.01 GB; " in done.stdout
    return folder, done.stdout.partition("\n\n")[2].splitlines()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "results.json").read_text())["rows"])


def test_the_paper_as_a_table(reproduced: tuple[Path, list[str]]) -> None:
    folder, table = reproduced
    head, rule, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert head == [
        *("model", "text", "float", "nearest", "fixed", "haq", "published float", "paper"),
    ]
    assert rule == ["---"] * 2 + ["---:"] * 6
    floating, fixed = rows_of(folder)
    assert row[:2] == ["tiny_models/opt-python", "python"]
    assert row[2:] == [f"{floating['perplexity']:.3f}", "", f"{fixed['perplexity']:.3f}", *[""] * 3]
    assert (floating["tokens"], fixed["tokens"]) == (8192, 8192)
    # An int8 model takes its place, and is not there any more.
    assert floating["weights_gb"] > 2 * fixed["weights_gb"]
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_the_perplexity_is_that_of_another_program(
    reproduced: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny_models.corpus import standard_library
    from tiny_models.measure import perplexity

    folder = EXAMPLES / "tiny_models/opt-python"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "\n\n".join(standard_library("held_out"))
    ids = AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"][:8192]
    floating, fixed = (row["perplexity"] for row in rows_of(reproduced[0]))
    assert floating == pytest.approx(perplexity(model, torch.tensor(ids)), rel=1e-5)
    assert floating != fixed
    assert fixed == pytest.approx(floating, rel=0.01)


def test_it_goes_on_with_what_is_missing(
    reproduced: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, table = reproduced
    content = json.loads((folder / "results.json").read_text())
    # As if it had been stopped in the second row; the first has a value that nobody measures.
    content["rows"] = [content["rows"][0] | {"perplexity": 12345.0}]
    (tmp_path / "results.json").write_text(json.dumps(content))
    done = reproduce(tmp_path, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "float, python:" not in done.stdout
    first, second = rows_of(tmp_path)
    assert first == content["rows"][0]
    expected = rows_of(folder)[1]
    assert {**second, "evaluation_seconds": 0} == {**expected, "evaluation_seconds": 0}
    assert done.stdout.splitlines()[-1] == table[-1].replace(table[-1].split("|")[3], " 12345.000 ")


def test_what_is_done_is_not_made_again(
    reproduced: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import reproduce_paper

    content = json.loads((reproduced[0] / "results.json").read_text())
    content["rows"] = content["rows"][1:]
    (tmp_path / "results.json").write_text(json.dumps(content))
    monkeypatch.delattr(reproduce_paper.Work, "_quantize")
    monkeypatch.setattr("sys.argv", ["", "--dry-run", "--out", str(tmp_path), *SHORT])
    reproduce_paper.main()
    assert capsys.readouterr().out.endswith("\n".join(reproduced[1]) + "\n")
    monkeypatch.delattr(reproduce_paper, "Work")
    reproduce_paper.main()


def test_what_does_not_fit_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import reproduce_paper

    monkeypatch.setattr(reproduce_paper, "available", lambda device: 1.0)
    monkeypatch.setattr(reproduce_paper.Work, "needs", lambda *_: 93.4)
    monkeypatch.setattr("sys.argv", ["", "--dry-run", "--out", str(tmp_path), *SHORT])
    reproduce_paper.main()
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split("|")[3:7] == [" needs 93 GB ", "  ", " needs 93 GB ", "  "]
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"settings": {"samples": 17}, "rows": []}')
    done = reproduce(tmp_path, *SHORT)
    assert done.returncode == 1
    assert "has results of other settings: pass another --out." in done.stderr
    assert rows_of(tmp_path) == []


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path: Path) -> None:
    started = time.perf_counter()
    done = reproduce(tmp_path)
    assert done.returncode == 0, done.stderr
    print(f"{time.perf_counter() - started:.0f} s")
    table = done.stdout.partition("\n\n")[2].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == [
        "tiny_models/opt-python",
        "tiny_models/mixtral-python",
    ]
    for line in table:
        floating, *int8 = (float(cell) for cell in line.split("|")[3:7])
        assert int8 == [pytest.approx(floating, rel=0.01)] * 3
    assert len(rows_of(tmp_path)) == 8


# --- quickstart.py --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quickstart() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", "--tokens", "2048"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    opt, mixtral = done.stdout.split("=== mixtral-python ===")
    for text, layers in ((opt, "24 layers with 3,145,728"), (mixtral, "80 layers with 6,291,456")):
        assert f"{layers} weights are int8, calibrated on 16,384 tokens." in text
        assert "KL(reference || model)" in text
        assert "\nfloat32 writes:\ndef" in text
        assert "\nint8, saved and loaded, writes:\ndef" in text
    assert re.search("^reference +cpu", mixtral, re.MULTILINE)

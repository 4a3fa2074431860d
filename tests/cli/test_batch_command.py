"""`chiron batch` against a server with simulated engines, whose tokens a test can tell; and what is left
of a batch when the server is killed."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from chiron_engine.commands.batch_file import BatchFileError, read_lines
from chiron_engine.commands.fleet_batch import state_directory
from chiron_engine.commands.simulated_engine import VOCABULARY_WITHOUT_TOKENIZER as VOCABULARY
from chiron_engine.core.simulated_tokens import SimulatedTokens
from tests.cli.chiron_process import CHIRON, SMALL, Server, chiron
from tests.cli.test_simulated_engine import PROFILE, address_in

ENGINE = ["serve", "anything", "--executor", "simulated", "--profile", PROFILE]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def server(directory: Path, port: str, *more: str) -> Server:
    return Server([*ENGINE, "--grpc-port", port, "--state-dir", str(directory), *more])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("state"), "0") as running:
        yield address_in(running.wait_ready())


def batch_lines(count: int, tokens: int) -> str:
    """The prompt of line n is [5, n] and its seed n."""
    fields = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    lines = ({"custom_id": f"line-{n}", "token_ids": [5, n], "seed": n, **fields} for n in range(count))
    return "".join(json.dumps(line) + "\n" for line in lines)


def expected(number: int, count: int) -> list[int]:
    return SimulatedTokens(VOCABULARY, VOCABULARY - 1, 1).output([5, number], number, count)


def check_results(text: str, count: int, tokens: int) -> None:
    results = [json.loads(line) for line in text.splitlines()]
    assert [result["custom_id"] for result in results] == [f"line-{n}" for n in range(count)]
    for number, result in enumerate(results):
        assert result["state"] == "done", result
        assert result["token_ids"] == expected(number, tokens)
        assert result["finish_reason"] == "length"


def batch(*arguments: str, at: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return chiron("batch", *arguments, "--server", at, stdin=stdin, timeout=60)


def json_of(result: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert result.returncode == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_submit_show_list_fetch_cancel(address: str, tmp_path: Path) -> None:
    submitted = batch(
        "submit", "-", "--name", "first", "--metadata", "a=b", at=address, stdin=batch_lines(40, 9)
    )
    assert submitted.returncode == 0, submitted.stderr
    batch_id = submitted.stdout.strip()
    file = tmp_path / "results.jsonl"
    fetched = batch("fetch", batch_id, "--wait", "--output", str(file), at=address)
    assert (fetched.returncode, fetched.stdout) == (0, "")
    check_results(file.read_text(), 40, 9)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    shown = json_of(batch("show", batch_id, "--json", at=address))
    assert (shown["status"], shown["name"], shown["metadata"]) == ("completed", "first", {"a": "b"})
    assert "40 done" in batch("show", batch_id, at=address).stdout
    assert batch_id in batch("list", at=address).stdout

    slow = json_of(batch("submit", "-", "--json", at=address, stdin=batch_lines(3, 50_000)))
    assert json_of(batch("list", "--limit", "1", "--json", at=address))["batch_id"] == slow["batch_id"]
    cancelled = json_of(batch("cancel", str(slow["batch_id"]), "--json", at=address))
    assert cancelled["status"] in ("cancelling", "cancelled")
    end = batch("fetch", str(slow["batch_id"]), "--wait", at=address)
    assert end.returncode == 1
    states = [
        (result["state"], result["error"]["code"]) for result in map(json.loads, end.stdout.splitlines())
    ]
    assert states == [("cancelled", "batch_cancelled")] * 3


def test_the_same_id_again_stores_nothing_twice(address: str) -> None:
    arguments = ("submit", "-", "--id", "mine", "--json")
    first = json_of(batch(*arguments, at=address, stdin=batch_lines(5, 4)))
    again = json_of(batch(*arguments, at=address, stdin=batch_lines(5, 4)))
    assert (first["batch_id"], again["created"]) == ("mine", first["created"])
    other = batch(*arguments, at=address, stdin=batch_lines(6, 4))
    assert other.returncode == 1
    assert "other content" in other.stderr
    waited = batch("submit", "-", "--id", "mine", "--wait", at=address, stdin=batch_lines(5, 4))
    assert waited.returncode == 0
    check_results(waited.stdout, 5, 4)


def test_what_openai_clients_write_is_taken(tiny_llama: Path, tmp_path: Path) -> None:
    """Also: text in and out, and a stop string."""
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    body = {"model": str(tiny_llama), "max_completion_tokens": 30, "seed": 1, "ignore_eos": True, "n": 1}
    url = {"method": "POST", "url": "/v1/chat/completions"}
    whole = {"custom_id": "a", **url, "body": {**body, **chat}}
    arguments = ["serve", str(tiny_llama), *ENGINE[2:], "--state-dir", str(tmp_path), "--grpc-port", "0"]
    with Server([*arguments, "--max-num-seqs", "64"]) as running:
        at = address_in(running.wait_ready())
        first = json.loads(batch("submit", "-", "--wait", at=at, stdin=json.dumps(whole)).stdout)
        assert len(first["token_ids"]) == 30
        stop = first["text"][5:8]
        stopped = {"custom_id": "b", **url, "body": {**body, **chat, "stop": stop}}
        second = json.loads(batch("submit", "-", "--wait", at=at, stdin=json.dumps(stopped)).stdout)
    assert first["text"].startswith(second["text"] + stop)
    assert second["finish_reason"] == "stop"
    assert second["usage"]["completion_tokens"] == len(second["token_ids"]) < 30


def test_lines_follow_guides_each_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    """One that cannot be followed is its line's error."""
    schema = {"enum": ["yes", "no", 17]}
    chosen = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    asked = [
        {"regex": "[ab]{3}"},
        {"response_format": chosen},
        {"regex": "(("},
        {"json_schema": schema},
        {"grammar": 'start: "x"{4}', "response_format": {"type": "text"}},
        {"json_schema": {"type": "no such"}},
    ]
    lines = (
        {"custom_id": str(place), "prompt": "hello", "max_tokens": 20, "seed": place, **fields}
        for place, fields in enumerate(asked)
    )
    arguments = ["serve", str(tiny_llama), "--dtype", "float32", *SMALL, "--state-dir", str(tmp_path)]
    with Server([*arguments, "--grpc-port", "0"]) as running:
        at = address_in(running.wait_ready())
        submitted = batch("submit", "-", "--wait", at=at, stdin="\n".join(map(json.dumps, lines)))
    results = [json.loads(line) for line in submitted.stdout.splitlines()]
    assert [result["state"] for result in results] == ["done", "done", "failed", "done", "done", "failed"]
    assert re.fullmatch("[ab]{3}", results[0]["text"])
    assert {json.loads(results[place]["text"]) for place in (1, 3)} <= {"yes", "no", 17}
    assert results[4]["text"] == "xxxx"
    assert "regex cannot be followed" in results[2]["error"]["message"]
    assert "json_schema cannot be followed" in results[5]["error"]["message"]


BAD_LINES = [
    ("{", "line 1: no JSON"),
    ("[]", "must be a JSON object"),
    ('{"prompt": "a"}', "custom_id is null"),
    ('{"custom_id": "a"}', "has no prompt"),
    ('{"custom_id": "a", "prompt": "a", "messages": []}', "prompt and messages"),
    ('{"custom_id": "a", "prompt": "a", "logprobs": true}', 'unknown field "logprobs"'),
    ('{"custom_id": "a", "prompt": "a", "n": 2}', "n must be 1"),
    ('{"custom_id": "a", "prompt": "a", "max_tokens": "9"}', 'max_tokens is "9"; it must be a whole number'),
    ('{"custom_id": "a", "prompt": "a", "max_tokens": true}', "must be a whole number"),
    ('{"custom_id": "a", "prompt": [1, "b"]}', "a string or a list of token ids"),
    ('{"custom_id": "a", "token_ids": [-1]}', "line 1"),
    ('{"custom_id": "a", "body": {"prompt": "a"}, "url": "/v1/embeddings"}', "must be one of"),
    ('{"custom_id": "a", "body": {"prompt": "a"}, "seed": 1}', "belongs inside"),
    ('{"custom_id": "a", "messages": [{"role": "user"}]}', "messages[0]"),
    ('{"custom_id": "a", "prompt": "a", "logit_bias": {"x": 1}}', "an object of token ids and numbers"),
    ('{"custom_id": "a", "prompt": "a", "logit_bias": {"1": "x"}}', "an object of token ids and numbers"),
    ('{"custom_id": "a", "prompt": "a", "min_p": "x"}', "min_p is"),
    ('{"custom_id": "a", "prompt": "a", "regex": 5}', "regex is 5; it must be a string"),
    ('{"custom_id": "a", "prompt": "a", "json_schema": 5}', "json_schema is 5; it must be a JSON schema"),
    ('{"custom_id": "a", "prompt": "a", "regex": "a", "grammar": "b"}', "regex and grammar"),
    ('{"custom_id": "a", "prompt": "a", "response_format": "json"}', "response_format is"),
    ('{"custom_id": "a", "prompt": "a", "response_format": {"type": "xml"}}', "response_format.type is"),
    ('{"custom_id": "a", "prompt": "a", "response_format": {"type": []}}', "response_format.type is []"),
    ('{"custom_id": "a", "prompt": "a", "response_format": {"type": "json_schema"}}', "must be an object"),
    (
        '{"custom_id": "a", "prompt": "a", "regex": "a", "response_format": {"type": "json_object"}}',
        "json_schema and regex",
    ),
    (
        '{"custom_id": "a", "prompt": "a", "json_schema": {}, "response_format": {"type": "json_object"}}',
        "both response_format and json_schema",
    ),
    (
        '{"custom_id": "a", "prompt": "a", "response_format": {"type": "text", "more": 1}}',
        'unknown field "more"',
    ),
]


def test_every_parameter_of_a_line_reaches_the_request() -> None:
    values = {
        "min_p": 0.1,
        "min_tokens": 2,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
    }
    line = {"custom_id": "a", "prompt": "a", "logit_bias": {"15": -100, "3": 1.5}, **values}
    (read,) = read_lines([json.dumps(line)])
    asked = read.request.sampling
    assert {name: getattr(asked, name) for name in values} == values
    assert dict(asked.logit_bias) == {15: -100.0, 3: 1.5}


def test_guides_of_lines_reach_the_request() -> None:
    schema = {"type": "object"}
    formats = [
        ({"json_schema": schema}, "json_schema", json.dumps(schema)),
        ({"json_schema": json.dumps(schema)}, "json_schema", json.dumps(schema)),
        ({"regex": "a"}, "regex", "a"),
        ({"grammar": "start: /a/"}, "grammar", "start: /a/"),
        ({"response_format": {"type": "json_object"}}, "json_schema", json.dumps(schema)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
            "json_schema",
            json.dumps(schema),
        ),
        ({"response_format": {"type": "text"}}, None, ""),
    ]
    for fields, kind, text in formats:
        (read,) = read_lines([json.dumps({"custom_id": "a", "prompt": "a", **fields})])
        assert read.request.sampling.WhichOneof("guide") == kind
        assert kind is None or getattr(read.request.sampling, kind) == text


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=lambda value: value[:50])
def test_a_line_that_is_no_request_is_named(line: str, words: str) -> None:
    with pytest.raises(BatchFileError) as error:
        list(read_lines([line]))
    assert words in str(error.value)


def test_a_guide_nested_at_any_depth_is_taken_or_named() -> None:
    """C code reads a little deeper than it writes."""
    refused = set()
    for depth in range(800, 1010):
        nested = '{"not":' * depth + "{}" + "}" * depth
        try:
            list(read_lines([f'{{"custom_id": "a", "prompt": "a", "json_schema": {nested}}}']))
        except BatchFileError as error:
            refused.add(str(error).partition("maximum")[0])
    assert "line 1: is nested too deeply" in refused


def test_what_cannot_be_done_has_its_exit_code(address: str, tmp_path: Path) -> None:
    late = json.dumps({"custom_id": "a", "token_ids": [1], "max_tokens": 4, "deadline_s": -1})
    twice = json.dumps({"custom_id": "a", "token_ids": [1], "max_tokens": 4}) + "\n"
    cases: Sequence[tuple[int, str, Sequence[str], str]] = [
        (2, "custom_id", ("submit", "-"), "{}"),
        (2, "deadline_s is -1", ("submit", "-"), late),
        (2, "same custom_id", ("submit", "-"), 2 * twice),
        (2, "no lines", ("submit", "-"), ""),
        (2, "--wait", ("submit", "-", "--output", "x"), twice),
        (2, "KEY=VALUE", ("submit", "-", "--metadata", "a"), twice),
        (2, "/no/such", ("submit", "/no/such"), ""),
        (2, "completion_window_s", ("submit", "-", "--completion-window", "0s"), twice),
        (1, "no batch with the id", ("show", "nothing"), ""),
        (1, "no batch with the id", ("fetch", "nothing"), ""),
        (1, "no batch with the id", ("cancel", "nothing"), ""),
    ]
    for code, words, arguments, stdin in cases:
        result = batch(*arguments, at=address, stdin=stdin)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert words in result.stderr
        assert "Traceback" not in result.stderr
    nobody = batch("list", at="127.0.0.1:1")
    assert nobody.returncode == 1
    assert "no server answers" in nobody.stderr


def test_a_state_directory_has_one_server(tmp_path: Path) -> None:
    with server(tmp_path, "0") as first:
        first.wait_ready()
        with server(tmp_path, "0") as second:
            assert second.wait(30) == 2
            assert f"in use by process {first.process.pid}" in second.stderr
            assert "Traceback" not in second.stderr


def test_a_directory_that_cannot_be_used_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with server(tmp_path / "file" / "below", "0") as running:
        assert running.wait(30) == 2
        assert "--state-dir" in running.stderr


def test_a_damaged_store_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "batch.sqlite3").write_text("no database\n" * 100)
    with server(tmp_path, "0") as running:
        assert running.wait(30) == 1
        assert "no SQLite database" in running.stderr
        assert "Traceback" not in running.stderr
    assert (tmp_path / "batch.sqlite3").read_text().startswith("no database")


def test_ctrl_c_ends_the_waiting_and_not_the_batch(address: str) -> None:
    stdin = batch_lines(3, 20_000)
    assert batch("submit", "-", "--id", "long", at=address, stdin=stdin).returncode == 0
    command = [*CHIRON, "batch", "fetch", "long", "--wait", "--server", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        time.sleep(2.0)
        client.send_signal(signal.SIGINT)
        output, errors = client.communicate(timeout=10)
    assert (client.returncode, output) == (130, "")
    assert "Traceback" not in errors
    assert json_of(batch("show", "long", "--json", at=address))["status"] == "in_progress"
    batch("cancel", "long", at=address)


def test_killed_at_any_moment_it_goes_on_and_ends_each_line_once(tmp_path: Path) -> None:
    """Five times; each time on the same port and directory, while a client waits for the results."""
    randomness = random.Random(7)
    port, count, tokens = free_port(), 80, 200
    at = f"127.0.0.1:{port}"
    options = ("--max-num-seqs", "16")
    with server(tmp_path, port, *options) as running:
        running.wait_ready()
        submitted = batch("submit", "-", "--id", "b", at=at, stdin=batch_lines(count, tokens))
        assert submitted.returncode == 0, submitted.stderr
        client = subprocess.Popen(
            [*CHIRON, "batch", "fetch", "b", "--wait", "--server", at], stdout=subprocess.PIPE, text=True
        )
        running.process.kill()
        running.wait()
    unfinished = 0
    for _ in range(4):
        with server(tmp_path, port, *options) as running:
            running.wait_ready()
            time.sleep(randomness.uniform(0.0, 1.0))
            lines = json_of(batch("show", "b", "--json", at=at))["lines"]
            assert isinstance(lines, dict)
            unfinished += lines["done"] < count
            running.process.kill()
            running.wait()
    assert unfinished, "every kill came after the end; make the batch longer"
    with server(tmp_path, port, *options) as running:
        output, _ = client.communicate(timeout=120)
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
    assert client.returncode == 0
    check_results(output, count, tokens)


def test_the_page_shows_what_is_taken_and_printed(address: str) -> None:
    """The examples of docs/batch.md, and the fields of a result."""
    page = (Path(__file__).parents[2] / "docs" / "batch.md").read_text()
    examples = [line for line in page.splitlines() if line.startswith('{"custom_id"')]
    requests = [line for line in examples if '"state"' not in line]
    assert [line.custom_id for line in read_lines(requests)] == ["a", "b"]
    (done,) = (json.loads(line) for line in examples if '"done"' in line)
    stdin = json.dumps({"custom_id": "b", "prompt": [1, 2], "max_tokens": 2})
    printed = json.loads(batch("submit", "-", "--wait", at=address, stdin=stdin).stdout)
    assert list(printed) == list(done)
    assert list(printed["usage"]) == list(done["usage"])


def test_where_batches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with ExitStack() as resources:
        assert state_directory(Path("/given"), "m", 5, 0, resources) == Path("/given")
        assert (
            state_directory(None, "org/Model 1.gguf", 5, 5, resources) == tmp_path / "chiron/Model-1.gguf-5"
        )
        assert state_directory(None, "..", 5, 5, resources) == tmp_path / "chiron/model-5"
        temporary = state_directory(None, "m", 5, 0, resources)
        assert temporary.is_dir()
        monkeypatch.setenv("XDG_STATE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        kept = state_directory(None, "m", 5, 5, resources)
        assert kept == tmp_path / "home/.local/state/chiron/m-5"
    assert not temporary.exists()

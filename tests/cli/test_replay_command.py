"""`chiron replay` of what real processes recorded."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.v1 import inference_pb2, types_pb2
from tests.cli.chiron_process import SMALL, Server, chiron, wait_gone

SIMULATED = ["--executor", "simulated", "--profile", "h100/llama-3.1-8b/tp1/bf16"]


async def ask(client: InferenceClient, number: int) -> None:
    batch = number % 2 == 0
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1, 2, number]),
        sampling=sampling(max_tokens=40, seed=1, ignore_eos=True),
        slo=types_pb2.Slo(slo_class=types_pb2.SLO_CLASS_BATCH if batch else types_pb2.SLO_CLASS_INTERACTIVE),
    )
    chunks = await client.generate_all(request, timeout=60)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 40


async def ask_all(address: str) -> None:
    async with InferenceClient(address) as client:
        await asyncio.gather(*(ask(client, number) for number in range(8)))


def serve_until(folder: Path, number: signal.Signals) -> None:
    """A server that records, eight requests, and its end."""
    arguments = [
        *("serve", "tiny", *SIMULATED, "--grpc-port", "0", "--engines", "2", "--max-num-seqs", "2"),
        *("--event-log", str(folder / "events.jsonl"), "--record-steps", str(folder / "steps")),
    ]
    with Server(arguments) as server:
        address = next(word for word in server.wait_ready().split() if word.startswith("127.0.0.1:"))
        server.wait_for("engine 1 is ready")
        engines = server.engine_pids()
        asyncio.run(ask_all(address))
        server.wait_for("engine 1 is ready")
        server.signal(number)
        server.wait()
        for pid in engines:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert wait_gone(engines)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lives of a coordinator, the first ended by a kill."""
    folder = tmp_path_factory.mktemp("recorded")
    for number in (signal.SIGKILL, signal.SIGTERM):
        serve_until(folder, number)
    return folder


def test_two_lives_of_a_coordinator_replay(recorded: Path) -> None:
    run = chiron("replay", str(recorded / "events.jsonl"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "section 2: policy chiron, started 20" in run.stdout
    assert "RequestArrived 8" in run.stdout and "Route " in run.stdout
    assert run.stdout.endswith("no decision differs\n")


def test_what_engines_recorded_replays(recorded: Path) -> None:
    files = sorted(map(str, (recorded / "steps").iterdir()))
    assert len(files) == 4
    run = chiron("replay", "--json", *files)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(run.stdout)["files"]
    assert [result["file"] for result in results] == files
    assert sum(section["requests"] for result in results for section in result["sections"]) >= 8
    assert [result["difference"] for result in results] == [None] * 4


def test_a_decision_that_differs_is_shown(recorded: Path, tmp_path: Path) -> None:
    text = (recorded / "events.jsonl").read_text()
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(re.sub(r'\["Route",\[(\d+),(\d+),0\]\]', r'["Forget",[\1,\2]]', text, count=1))
    run = chiron("replay", str(wrong))
    assert run.returncode == 1
    shown = run.stdout.partition(" differs: ")[2].splitlines()
    assert shown[0].startswith("event ") and "RequestArrived(request=FleetRequest(" in shown[0]
    assert shown[1].startswith("  expected Forget(request_id=1")
    assert shown[2].startswith("  got      Route(request_id=1")
    assert shown[3] == "the lines before:" and 5 <= len(shown) <= 7
    as_json = chiron("replay", "--json", str(wrong))
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["files"][0]["difference"]["got"][0].startswith("Route(")


def test_an_engine_with_a_model_replays(tiny_llama: Path, tmp_path: Path) -> None:
    """Measured step times, real tokens, prompts that share blocks."""
    arguments = ["engine", str(tiny_llama), *SMALL, "--grpc-port", "0", "--record-steps", str(tmp_path)]
    with Server(arguments) as server:
        words = server.wait_ready().split()
        address = words[words.index("--server") + 1]
        limits = ["--max-tokens", "30", "--ignore-eos"]
        prompts = ["the same beginning, then " + end for end in ("one", "another", "a third")]
        asked = chiron("generate", "--server", address, *limits, *prompts)
        assert asked.returncode == 0, asked.stderr
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    (path,) = tmp_path.iterdir()
    run = chiron("replay", "--json", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    (section,) = json.loads(run.stdout)["files"][0]["sections"]
    assert section["tokens"] == 90


def test_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("buy milk\n")
    run = chiron("replay", str(tmp_path / "notes"))
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"chiron: {tmp_path}/notes, line 1: it is no JSON object\n"
    assert chiron("replay", str(tmp_path / "missing")).returncode == 2
    run = chiron("serve", "tiny", *SIMULATED, "--event-log", str(tmp_path / "notes"), "--grpc-port", "0")
    assert run.returncode == 2
    assert "cannot write the event log" in run.stderr and "holds something else" in run.stderr

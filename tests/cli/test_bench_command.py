"""`chiron bench` through the command line, against a server process: what it refuses, what it writes,
and how it ends when it is interrupted or the server dies."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chiron_engine.commands.bench_run import first_requests, load
from tests.cli.chiron_process import CHIRON, chiron
from tests.gateway.tiny_model import write_tiny_model

INTERACTIVE = "poisson:rate=20,duration=2,lengths=64/8"
BATCH = "burst:count=5,lengths=100/10"
SIMULATE_KEYS = {
    "trace",
    "requests",
    "requests_by_class",
    "slo_attainment",
    "slo_misses",
    "ttft_s",
    "itl_ms",
    "throughput_rps",
    "preemptions",
    "wall_s",
    "index_of_dispersion",
    "seed",
    "slo",
}


@contextmanager
def server(model: Path, step_s: float) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """An engine without a model and a gateway, in a process of their own: its address."""
    command = [sys.executable, "-m", "tests.gateway.engine_main", str(step_s), "1", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}", process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with server(model, 0.002) as (found, _):
        yield found


def test_both_classes_a_table_json_and_a_plot(address: str, tmp_path: Path) -> None:
    json_file, plot = tmp_path / "run.json", tmp_path / "run.png"
    result = chiron(
        *("bench", "--address", address, "--interactive", INTERACTIVE, "--batch", BATCH),
        *("--ttft-slo", "20", "--itl-slo", "5s", "--json", str(json_file), "--plot", str(plot)),
    )
    assert result.returncode == 0, result.stderr
    assert "interactive" in result.stdout
    assert "sent" in result.stdout
    figures = json.loads(json_file.read_text())
    assert figures.keys() >= SIMULATE_KEYS
    counts = figures["requests_by_class"]
    assert counts["batch"] == 5
    assert figures["finished"] == figures["requests"] == counts["interactive"] + 5
    assert figures["output_tokens"] == 8 * counts["interactive"] + 50
    assert figures["slo_attainment"] == {"interactive": 1.0, "batch": 1.0}
    assert figures["rejected"] == figures["lost"] == 0
    assert figures["slo"]["interactive"] == {"ttft_s": 20.0, "itl_s": 5.0}
    assert 0 < figures["lag_ms"]["p50"] <= figures["lag_ms"]["p99"] <= figures["lag_ms"]["max"]
    assert figures["wall_s"] >= 1.5
    assert plot.stat().st_size > 5000


def test_json_on_stdout_leaves_the_table_to_stderr(address: str) -> None:
    result = chiron("bench", "--address", address, "--batch", BATCH, "--requests", "3", "--json", "-")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["requests_by_class"] == {"interactive": 0, "batch": 3}
    assert figures["ttft_s"] == {"p50": None, "p99": None}
    assert "in SLO" in result.stderr or "SLO %" in result.stderr


def test_what_is_over_the_context_is_cut_and_counted(address: str) -> None:
    spec = "burst:count=2,lengths=5000/10"
    result = chiron("bench", "--address", address, "--interactive", spec, "--json", "-")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["clipped"] == {"prompts": 2, "outputs": 0}
    assert figures["prompt_tokens"] == 2 * (figures["max_model_len"] - 10)
    assert "cut to the context: 2 prompts" in result.stderr


def test_ctrl_c_reports_what_was_done(address: str, tmp_path: Path) -> None:
    json_file = tmp_path / "run.json"
    spec = "poisson:rate=20,duration=600,lengths=64/8"
    command = [*CHIRON, "bench", "--address", address, "--interactive", spec, "--json", str(json_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_requests(address)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "interrupted after" in out
    figures = json.loads(json_file.read_text())
    assert figures["interrupted"] is True
    assert 0 < figures["finished"] <= figures["requests"] < 1000


def wait_for_requests(address: str) -> None:
    """Until the server's engine has committed steps for a second."""
    import asyncio

    from chiron_engine.rpc.client import EngineClient

    async def wait() -> None:
        async with EngineClient(address) as engine, asyncio.timeout(30):
            while (await engine.status()).load.running == 0:
                await asyncio.sleep(0.002)

    asyncio.run(wait())
    time.sleep(1.0)


def test_a_server_that_dies_costs_errors_but_not_the_report(model: Path) -> None:
    with server(model, 0.002) as (address, process):
        command = [*CHIRON, "bench", "--address", address, "--json", "-"]
        command += ["--interactive", "poisson:rate=20,duration=4,lengths=64/8"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            try:
                wait_for_requests(address)
                process.kill()
                out, err = client.communicate(timeout=60)
            finally:
                client.kill()
    assert client.returncode == 0, err
    figures = json.loads(out)
    assert figures["finished"] > 0
    assert figures["lost"] > 0
    assert figures["finished"] + figures["lost"] == figures["requests"]
    assert sum(figures["errors"].values()) == figures["lost"]
    assert all(error.startswith("UNAVAILABLE") for error in figures["errors"])
    assert figures["slo_attainment"]["interactive"] < 1
    assert "x UNAVAILABLE" in err


def test_a_run_without_any_success_exits_1(model: Path) -> None:
    with server(model, 0.01) as (address, process):
        arguments = ("bench", "--address", address, "--interactive", BATCH, "--timeout", "1ms", "--json", "-")
        result = chiron(*arguments)
        assert process.poll() is None
    assert result.returncode == 1
    assert "no request of 5 succeeded" in result.stderr
    assert json.loads(result.stdout)["lost"] == 5


def test_nobody_there_exits_1() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, not listening
        result = chiron("bench", "--address", f"127.0.0.1:{holder.getsockname()[1]}", "--interactive", BATCH)
    assert result.returncode == 1
    assert "no server answers" in result.stderr
    assert result.stderr.count("\n") == 1


PROFILE = "h100/llama-3.1-8b/tp1/bf16"
BAD_OPTIONS = [
    ([], "give a trace"),
    (["--interactive", "no-such-trace"], "azure-conv"),
    (["--interactive", "/no/such/file.csv"], "/no/such/file.csv"),
    (["--interactive", BATCH, "--load", "2"], "--load 2 depends on the kind of instance"),
    (["--interactive", INTERACTIVE, "--itl-slo", "1.5x"], "--itl-slo 1.5x depends"),
    (["--interactive", INTERACTIVE, "--profile", PROFILE], "--profile says nothing here"),
    (["--interactive", INTERACTIVE, "--profile", "x", "--load", "1"], PROFILE),
    (["--interactive", BATCH, "--profile", PROFILE, "--load", "1"], "all requests arrive at once"),
    (["--interactive", INTERACTIVE, "--load", "2", "--rate-scale", "2"], "give one of them"),
    (["--batch", INTERACTIVE, "--batch-load", "2", "--rate-scale", "2"], "--batch-load both scale"),
    (["--interactive", INTERACTIVE, "--rate-scale", "0"], "--rate-scale: '0'"),
    (["--interactive", INTERACTIVE, "--rate-scale", "1e9"], "--rate-scale 1e+09 makes more than"),
    (["--interactive", INTERACTIVE, "--batch-deadline", "5"], "--batch-deadline"),
    (["--interactive", INTERACTIVE, "--timeout", "0"], "--timeout: '0'"),
    (["--interactive", INTERACTIVE, "--duration", "-1"], "--duration"),
    (["--interactive", INTERACTIVE, "--json", "/no/such/folder/x.json"], "--json"),
    (["--interactive", INTERACTIVE, "--plot", "x.txt"], "must end in one of"),
    (["--interactive", INTERACTIVE, "--address", "nowhere"], "'nowhere' is no HOST:PORT"),
    (["--interactive", INTERACTIVE, "--address", "host:70000"], "'host:70000' is no HOST:PORT"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_OPTIONS, ids=[words for _, words in BAD_OPTIONS])
def test_bad_input_is_told_before_anything_is_sent(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiron_engine.cli import main

    given = ["--address", "127.0.0.1:1", *arguments]  # nothing listens there: exit 1 if it got so far
    monkeypatch.setattr(sys, "argv", ["chiron", "bench", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def options(**given: Any) -> dict[str, Any]:
    names = "interactive batch load batch_load duration batch_deadline rate_scale requests profile timeout"
    defaults = {
        "seed": 0,
        "ttft_slo": 10.0,
        "itl_slo": "200",
        "batch_ttft_slo": 60.0,
        "batch_itl_slo": "2000",
    }
    return {**dict.fromkeys(names.split()), **defaults, **given}


def test_the_rate_is_scaled_and_the_span_kept() -> None:
    plain = load(options(interactive="poisson:rate=10,duration=100,lengths=64/8", batch=BATCH))
    scaled = load(
        options(interactive="poisson:rate=10,duration=100,lengths=64/8", batch=BATCH, rate_scale=2.5)
    )
    assert plain.interactive and plain.batch and scaled.interactive and scaled.batch
    assert len(scaled.interactive.trace) == round(2.5 * len(plain.interactive.trace))
    assert math.isclose(scaled.interactive.trace.span_s, plain.interactive.trace.span_s, rel_tol=0.05)
    assert len(scaled.batch.trace) == 12
    assert scaled.batch.first_id == len(scaled.interactive.trace)
    assert scaled.batch.completion_s == plain.batch.completion_s


@pytest.mark.parametrize("count", [1, 5, 6, 30, 10_000])
def test_the_first_requests_are_those_that_arrive_first(count: int) -> None:
    whole = load(options(interactive=INTERACTIVE, batch=BATCH))
    cut = first_requests(whole, count)
    expected = [(arrival, stream.slo_class, row) for arrival, _, stream, row in whole.arrivals()][:count]
    assert [(arrival, stream.slo_class, row) for arrival, _, stream, row in cut.arrivals()] == expected
    assert sorted(request for _, request, _, _ in cut.arrivals()) == list(range(len(expected)))

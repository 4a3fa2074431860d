"""`chiron serve` with real engine processes of a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.cli.chiron_process import CHIRON, SMALL, Server, chiron, wait_gone


def serve_arguments(model: Path, *more: str) -> list[str]:
    return ["serve", str(model), "--grpc-port", "0", *SMALL, *more]


def address_of(request: str) -> str:
    words = request.split()
    return words[words.index("--server") + 1]


def ask(address: str, *more: str, tokens: int = 4) -> subprocess.CompletedProcess[str]:
    limits = ["--max-tokens", str(tokens), "--ignore-eos", "--temperature", "0"]
    return chiron("generate", "--server", address, "--json", *limits, *more, "hello")


def test_two_engines_one_dies_the_other_serves_and_sigterm_ends_all(tiny_llama: Path) -> None:
    with Server(serve_arguments(tiny_llama, "--engines", "2")) as server:
        request = server.wait_ready()
        address = address_of(request)
        engines = server.engine_pids()
        assert len(engines) == 2
        server.wait_for(r"\[engine 0\] load weights")
        server.wait_for(r"\[engine 1\] load weights")
        reference = json.loads(ask(address).stdout)
        assert len(reference["token_ids"]) == 4

        os.kill(engines[0], signal.SIGKILL)
        server.wait_for(r"engine 0: its process ended with code -9")
        again = json.loads(ask(address).stdout)
        assert again["token_ids"] == reference["token_ids"]

        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert wait_gone(engines)


def test_the_printed_request_works_when_pasted(tiny_llama: Path) -> None:
    with Server(serve_arguments(tiny_llama)) as server:
        request = server.wait_ready()
        assert "--chat" in request  # the tiny model has a chat template
        pasted = subprocess.run(
            request + " --max-tokens 5 --ignore-eos", shell=True, capture_output=True, text=True, timeout=60
        )
        assert pasted.returncode == 0, pasted.stderr
        assert pasted.stdout.strip()
        server.signal(signal.SIGINT)
        assert server.wait() == 130


def start_stream(address: str, *more: str) -> subprocess.Popen[bytes]:
    """A client whose stream has begun: its first byte is read."""
    greedy = ["--ignore-eos", "--temperature", "0", *more]
    command = [*CHIRON, "generate", "--server", address, *greedy, "hello"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    assert client.stdout is not None
    assert client.stdout.read(1)
    return client


def test_sigterm_lets_running_requests_end_and_refuses_new_ones(tiny_llama: Path) -> None:
    with Server(serve_arguments(tiny_llama)) as server:
        address = address_of(server.wait_ready())
        engines = server.engine_pids()
        whole = json.loads(ask(address, tokens=1500).stdout)
        assert len(whole["token_ids"]) == 1500
        with start_stream(address, "--max-tokens", "1500") as client:
            server.signal(signal.SIGTERM)
            server.wait_for("draining")
            refused = ask(address)
            rest, _ = client.communicate(timeout=60)
        assert rest == whole["text"].encode()[1:] + b"\n"
        assert refused.returncode == 1
        assert "UNAVAILABLE" in refused.stderr or "no server answers" in refused.stderr
        assert server.wait() == 0
        assert wait_gone(engines)


def test_a_second_signal_stops_at_once(tiny_llama: Path) -> None:
    with Server(serve_arguments(tiny_llama, "--drain-timeout", "600", "--max-model-len", "2000")) as server:
        address = address_of(server.wait_ready())
        engines = server.engine_pids()
        with start_stream(address) as client:
            server.signal(signal.SIGTERM)
            server.wait_for("draining")
            server.signal(signal.SIGTERM)
            assert server.wait(15) == 0
            client.communicate(timeout=30)
            assert client.returncode == 1  # cut off
        assert wait_gone(engines)


def test_an_engine_that_dies_is_replaced(tiny_llama: Path) -> None:
    with Server(serve_arguments(tiny_llama)) as server:
        address = address_of(server.wait_ready())
        (engine,) = server.engine_pids()
        reference = json.loads(ask(address).stdout)
        os.kill(engine, signal.SIGKILL)
        server.wait_for(r"engine 1 is ready")
        assert json.loads(ask(address).stdout)["token_ids"] == reference["token_ids"]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_loading_it_leaves_no_engine(tiny_llama: Path, number: signal.Signals) -> None:
    with Server(serve_arguments(tiny_llama, "--engines", "2")) as server:
        while len(engines := server.engine_pids()) < 2:
            assert server.process.poll() is None, server.stderr
        server.wait_for(r"\[engine 0\]")
        server.signal(number)
        assert server.wait(20) == (0 if number is signal.SIGTERM else -number)
        assert wait_gone(engines)


def test_a_port_in_use_is_found_before_any_engine_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        result = chiron("serve", "/no/such/model", "--grpc-port", port)
    assert result.returncode == 2
    assert f"port {port}" in result.stderr
    assert f"process {os.getpid()}" in result.stderr
    assert "model" not in result.stderr.replace("/no/such/model", "")  # it got no further
    assert result.stdout == ""


def test_one_engine_alone_answers_clients_too(tiny_llama: Path) -> None:
    with Server(["engine", str(tiny_llama), "--grpc-port", "0", *SMALL]) as server:
        address = address_of(server.wait_ready())
        assert ask(address).returncode == 0
        server.signal(signal.SIGTERM)
        assert server.wait() == 0

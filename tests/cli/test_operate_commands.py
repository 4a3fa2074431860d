"""`chiron ps`, `top`, `drain`, `retire` and `scale` against a real fleet of simulated engines."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.chiron_process import CHIRON, Server, chiron
from tests.cli.test_serve import address_of

SIMULATED = ["--executor", "simulated", "--profile", "h100/llama-3.1-8b/tp1/bf16"]


@pytest.fixture(scope="module")
def fleet(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    state = str(tmp_path_factory.mktemp("state"))
    arguments = [
        "serve",
        str(tiny_llama),
        *SIMULATED,
        "--grpc-port",
        "0",
        "--engines",
        "2",
        "--max-engines",
        "3",
    ]
    arguments += ["--min-engines", "2", "--tick", "100ms", "--metrics-port", "0", "--state-dir", state]
    arguments += ["--served-model-name", "tiny"]
    with Server(arguments) as server:
        server.address = address_of(server.wait_ready())  # type: ignore[attr-defined]
        yield server
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def shown(address: str) -> dict[str, Any]:
    result = chiron("ps", "--server", address, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def wait_for_ids(address: str, wanted: set[int]) -> None:
    end = time.monotonic() + 30
    while {one["instance_id"] for one in shown(address)["instances"] if one["state"] == "ready"} != wanted:
        assert time.monotonic() < end, shown(address)


def test_a_fleet_is_seen_and_changed(fleet: Server) -> None:
    address = fleet.address  # type: ignore[attr-defined]
    wait_for_ids(address, {0, 1})
    seen = shown(address)
    assert (seen["min_instances"], seen["max_devices"], seen["trouble"]) == (2, 3, "")
    one = seen["instances"][0]
    assert one["pid"] and one["address"] and one["role"] == "mixed" and one["telemetry"]["max_running"] > 0

    lines = chiron("ps", "--server", address).stdout.splitlines()
    assert lines[0].split()[:3] == ["ID", "ROLE", "STATE"]
    assert lines[1].split()[:3] == ["0", "mixed", "ready"]
    assert "2 ready, min 2, max 3" in lines[3] and "IBP" in lines[4]

    retired = chiron("retire", "0", "--server", address)
    assert retired.returncode == 0 and "engine 0 is retiring" in retired.stderr
    wait_for_ids(address, {1, 2})
    again = chiron("retire", "0", "--server", address)
    assert again.returncode == 0 and "ended already" in again.stderr
    drained = chiron("drain", "1", "--server", address)
    assert drained.returncode == 0 and "engine 1 is draining" in drained.stderr
    wait_for_ids(address, {2, 3})

    scaled = chiron("scale", "--server", address, "--min", "3", "--max", "5")
    assert scaled.stdout == "min 3, max 5\n"
    wait_for_ids(address, {2, 3, 4})


def test_bad_input(fleet: Server) -> None:
    address = fleet.address  # type: ignore[attr-defined]
    for command in ("drain", "retire"):
        unknown = chiron(command, "999", "--server", address)
        assert (unknown.returncode, unknown.stderr) == (1, "chiron: there is no instance 999\n")
        assert chiron(command, "--server", address, "--", "-1").returncode == 2
        assert chiron(command, "one", "--server", address).returncode == 2
        assert chiron(command, str(2**64), "--server", address).returncode == 2
    for bounds in (["--min", "-1"], ["--max", "0"], ["--min", "9", "--max", "8"], ["--max", "257"]):
        assert chiron("scale", "--server", address, *bounds).returncode == 2
    assert shown(address)["max_devices"] < 8
    assert chiron("top", "--interval", "0").returncode == 2


@pytest.mark.parametrize("command", [["ps"], ["top"], ["drain", "0"], ["retire", "0"], ["scale"]])
def test_without_a_server(command: list[str]) -> None:
    result = chiron(*command, "--server", "127.0.0.1:1")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "chiron: no server answers at 127.0.0.1:1; is `chiron serve` running?\n"


def test_top_prints_lines_into_a_pipe(fleet: Server) -> None:
    address = fleet.address  # type: ignore[attr-defined]
    result = chiron("top", "--server", address, "--count", "2", "--interval", "100ms")
    assert result.returncode == 0
    assert result.stdout.count("Theta") == 2 and "\x1b" not in result.stdout


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x03", 130)])
def test_top_on_a_terminal_ends_with_q_or_ctrl_c(fleet: Server, key: bytes, code: int) -> None:
    address = fleet.address  # type: ignore[attr-defined]
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [*CHIRON, "top", "--server", address, "--interval", "200ms"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", "LINES": "50", "TERM": "xterm"},
        preexec_fn=_own_terminal,
    )
    os.close(terminal)
    written = b""
    while b"queued batch  " not in written:
        written += os.read(master, 4096)
    assert "▁".encode() in written and b"limit of" in written
    os.write(master, key)
    while _read(master):
        pass
    assert process.wait(10) == code
    os.close(master)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # the other side is closed
        return b""


def test_metrics_are_served_beside_it(fleet: Server) -> None:
    line = next(line for line in fleet.stderr_lines if "metrics on" in line)
    text = urllib.request.urlopen(line.split()[-1], timeout=10).read().decode()
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text
    assert "chiron_fleet_theta" in text and 'chiron_instance_max_running{instance="' in text


def test_a_metrics_port_in_use_is_found_before_any_engine_starts(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        arguments = ["serve", "anything", *SIMULATED, "--grpc-port", "0", "--state-dir", str(tmp_path)]
        result = chiron(*arguments, "--metrics-port", port)
    assert result.returncode == 2 and f"port {port}" in result.stderr

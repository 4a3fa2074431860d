"""Gateways in processes of their own: real processes without a model."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.chiron_process import Server, chiron, is_alive, wait_gone
from tests.cli.fleet_process import (
    SIMULATED,
    ask_fleet,
    free_port,
    generate,
    serve,
    told,
    wait_fleet,
    wait_until,
)


def gateway_pids(server: Server) -> list[int]:
    return [pid for pid in server.engine_pids() if b"gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def answers(port: int, tokens: list[int]) -> bool:
    try:
        return generate(port) == tokens
    except Exception:
        return False


def test_gateways_share_a_port_and_one_that_ends_is_started_again(tmp_path: Path) -> None:
    port = free_port()
    with Server(serve(port, tmp_path, "--gateways", "3", "--coordinator-port", "0")) as server:
        assert f"127.0.0.1:{port}" in server.wait_ready(), server.stderr
        tokens = generate(port)
        assert len(tokens) == 20
        assert all(generate(port) == tokens for _ in range(10))
        assert len(ask_fleet(port).instances) == 1  # passed on to the coordinator
        pids = server.engine_pids()
        victim, *others = gateway_pids(server)
        assert len(others) == 2
        os.kill(victim, signal.SIGKILL)
        server.wait_for("it is started again")
        wait_until(lambda: len(gateway_pids(server)) == 3)
        wait_until(lambda: all(answers(port, tokens) for _ in range(10)))
        assert set(others) < set(gateway_pids(server))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert wait_gone([*pids, *others])


def test_gateways_end_with_a_killed_coordinator(tmp_path: Path) -> None:
    port = free_port()
    with Server(serve(port, tmp_path, "--gateways", "2", "--coordinator-port", "0")) as server:
        assert server.wait_ready(), server.stderr
        gateways = gateway_pids(server)
        server.signal(signal.SIGKILL)
        server.wait()
        assert wait_gone(gateways, 5.0)


def test_a_stream_of_a_gateway_apart_outlives_the_coordinator(tmp_path: Path) -> None:
    """Killed in the middle of it, and another one started in its place: not a token is lost or doubled."""
    port, other = free_port(), free_port()
    gateway = ["gateway", "tiny", *SIMULATED, "--coordinator", f"127.0.0.1:{port}", "--grpc-port", str(other)]
    clients = ThreadPoolExecutor(1)
    with clients, Server(gateway) as apart, Server(serve(port, tmp_path)) as server:
        assert server.wait_ready(), server.stderr
        assert f"127.0.0.1:{other}" in apart.wait_ready(), apart.stderr
        (engine,) = wait_fleet(port, 1)
        expected = generate(other, max_tokens=1200)
        stream = clients.submit(generate, other, max_tokens=1200)
        wait_until(lambda: ask_fleet(port).instances[0].telemetry.running_interactive == 1)
        server.signal(signal.SIGKILL)
        server.wait()
        with Server(serve(port, tmp_path)) as server:
            assert server.wait_ready(), server.stderr
            assert not stream.done(), "it was to be interrupted"
            assert told(stream) == expected
            assert is_alive(engine)
            assert generate(other) == expected[:20]
            apart.signal(signal.SIGTERM)
            assert apart.wait() == 0
            server.signal(signal.SIGTERM)
            assert server.wait() == 0


def test_a_stream_on_an_engine_that_joined_outlives_a_clean_stop_of_the_coordinator(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    coordinator = ["coordinator", "tiny", *SIMULATED, "--grpc-port", str(port), "--state-dir", str(tmp_path)]
    engine = ["engine", "tiny", *SIMULATED, "--join", f"127.0.0.1:{port}", "--grpc-port", "0"]
    gateway = ["gateway", "tiny", *SIMULATED, "--coordinator", f"127.0.0.1:{port}", "--grpc-port", str(other)]
    clients = ThreadPoolExecutor(1)
    with clients, Server(engine) as joined, Server(gateway) as apart, Server(coordinator) as server:
        assert server.wait_ready(), server.stderr
        assert apart.wait_ready(), apart.stderr
        expected = generate(other, max_tokens=1200)
        stream = clients.submit(generate, other, max_tokens=1200)
        wait_until(lambda: ask_fleet(port).instances[0].telemetry.running_interactive == 1)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not stream.done(), "it was to be interrupted"
        with Server(coordinator) as server:
            assert server.wait_ready(), server.stderr
            assert told(stream) == expected
            wait_until(lambda: answers(other, expected[:20]))
            for each in (apart, joined, server):
                each.signal(signal.SIGTERM)
                assert each.wait() == 0


def test_gateways_that_are_not_drained_in_time_tell_their_clients(tmp_path: Path) -> None:
    port, clients = free_port(), ThreadPoolExecutor(3)
    shared = ["--gateways", "2", "--coordinator-port", "0", "--drain-timeout", "1"]
    with clients, Server(serve(port, tmp_path, *shared)) as server:
        assert server.wait_ready(), server.stderr
        streams = [clients.submit(generate, port, max_tokens=5000) for _ in range(3)]
        wait_until(lambda: ask_fleet(port).instances[0].telemetry.running_interactive == 3)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        ends = [told(stream, 10) for stream in streams]
        assert [str(end).partition(":")[0] for end in ends] == ["UNAVAILABLE (draining)"] * 3, ends


def test_a_gateway_that_cannot_listen_or_does_not_fit_says_why(tmp_path: Path) -> None:
    port = free_port()
    apart = ["gateway", "another", *SIMULATED, "--grpc-port", "0", "--coordinator"]
    with Server(serve(port, tmp_path)) as server:
        assert server.wait_ready(), server.stderr
        ended = chiron(*apart, f"127.0.0.1:{port}")
        assert ended.returncode == 1
        assert "refused this gateway: model is another; this coordinator serves tiny" in ended.stderr
        ended = chiron(*serve(port, tmp_path, "--gateways", "2"))
        assert ended.returncode == 2
        assert f"port {port} on 127.0.0.1 is in use by process" in ended.stderr
        server.signal(signal.SIGTERM)
        server.wait()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--coordinator-port", "1"], "is for --gateways over 1"),
        (
            ["--gateways", "2", "--coordinator-port", "50999"],
            "--coordinator-port is 50999, where",
        ),
        (["--gateways", "0"], "greater than or equal to 1"),
    ],
)
def test_ports_that_contradict_each_other_are_refused(more: list[str], reason: str, tmp_path: Path) -> None:
    ended = chiron(*serve(50999, tmp_path, *more))
    assert ended.returncode == 2
    assert reason in ended.stderr


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", ":5"])
def test_the_address_of_a_coordinator_is_checked(address: str) -> None:
    ended = chiron("gateway", "tiny", *SIMULATED, "--coordinator", address)
    assert ended.returncode == 2
    assert f"--coordinator is '{address}'; give HOST:PORT" in ended.stderr

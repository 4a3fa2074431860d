"""Coordinators that are killed, and what becomes of their engines: real processes without a model."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.chiron_process import Server, is_alive, wait_gone
from tests.cli.fleet_process import SIMULATED, ask_fleet, free_port, generate, serve, wait_fleet, wait_until


def test_engines_outlive_a_killed_coordinator_and_the_next_one_takes_them_over(tmp_path: Path) -> None:
    port = free_port()
    with Server(serve(port, tmp_path, "--engines", "2", "--policy", "static:2")) as server:
        assert server.wait_ready(), server.stderr
        engines = wait_fleet(port, 2)
        tokens = generate(port)
        server.signal(signal.SIGKILL)
        server.wait()
    time.sleep(1.0)
    assert all(map(is_alive, engines))
    began = time.monotonic()
    with Server(serve(port, tmp_path, "--engines", "2", "--policy", "static:2")) as server:
        assert server.wait_ready(), server.stderr
        assert wait_fleet(port, 2).keys() == engines.keys()
        assert time.monotonic() - began < 8.0  # 5 s, and the start of a process on a busy machine
        assert server.engine_pids() == []
        assert generate(port) == tokens

        victim = min(engines)
        os.kill(victim, signal.SIGKILL)  # not its child, and seen to end all the same
        server.wait_for("its process ended")
        (launched,) = set(now := wait_fleet(port, 2)) - set(engines)
        assert now[launched] == 2
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert wait_gone([*engines, launched])
    assert not list((tmp_path / "engines").glob("*.json"))


def test_engines_that_do_not_fit_or_do_not_come_back_are_replaced(tmp_path: Path) -> None:
    port = free_port()
    with Server(serve(port, tmp_path)) as server:
        assert server.wait_ready(), server.stderr
        (first,) = wait_fleet(port, 1)
        server.signal(signal.SIGKILL)
    with Server(serve(port, tmp_path, "--max-num-seqs", "4")) as server:
        assert server.wait_ready(), server.stderr
        (second,) = wait_fleet(port, 1)
        assert second != first
        assert wait_gone([first])
        os.kill(second, signal.SIGSTOP)
        server.signal(signal.SIGKILL)
    with Server(serve(port, tmp_path, "--max-num-seqs", "4")) as server:
        assert server.wait_ready(), server.stderr
        assert "did not come back" in server.stderr
        assert second not in wait_fleet(port, 1)
        assert wait_gone([second])
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_an_engine_that_still_loads_ends_with_its_coordinator(tmp_path: Path) -> None:
    port = free_port()
    with Server(serve(port, tmp_path)) as server:
        while not (engines := server.engine_pids()):
            assert server.process.poll() is None, server.stderr
        server.signal(signal.SIGKILL)
        server.wait()
        assert wait_gone(engines, 3.0)


def test_without_a_coordinator_an_engine_drains_and_ends(tmp_path: Path) -> None:
    port = free_port()
    engine = ["engine", "tiny", *SIMULATED, "--join", f"127.0.0.1:{port}", "--orphan-timeout", "2"]
    with Server(engine) as alone:
        assert alone.wait(20) == 1
        failed = json.loads((alone.process.stdout or pytest.fail("no output")).read().splitlines()[-1])
        assert failed["message"].startswith(f"no coordinator answers at 127.0.0.1:{port}")
    with Server(serve(port, tmp_path)) as server, Server(engine) as joined:
        assert server.wait_ready(), server.stderr
        wait_until(lambda: joined.process.pid in {instance.pid for instance in ask_fleet(port).instances})
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert joined.wait(20) == 0

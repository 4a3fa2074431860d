"""Coordinators that are killed, and what becomes of their engines: real processes without a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path

import grpc.aio
import pytest

from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc, inference_pb2
from tests.cli.chiron_process import Server, is_alive, wait_gone

SIMULATED = ["--executor", "simulated", "--profile", "h100/llama-3.1-8b/tp1/bf16"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def serve(port: int, state: Path, *more: str) -> list[str]:
    return ["serve", "tiny", *SIMULATED, "--grpc-port", str(port), "--state-dir", str(state), *more]


def ask_fleet(port: int) -> coordinator_pb2.Fleet:
    async def ask() -> coordinator_pb2.Fleet:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)
            return await stub.GetFleet(coordinator_pb2.GetFleetRequest(), wait_for_ready=True, timeout=20)

    return asyncio.run(ask())


def generate(port: int, max_tokens: int = 20) -> list[int]:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=sampling(max_tokens=max_tokens, seed=1, ignore_eos=True),
    )

    async def ask() -> list[int]:
        async with InferenceClient(f"127.0.0.1:{port}") as client:
            chunks = await client.generate_all(request, timeout=30)
        return [token for chunk in chunks for token in chunk.token_ids]

    return asyncio.run(ask())


def wait_fleet(port: int, count: int, seconds: float = 20.0) -> dict[int, int]:
    """Instance ids by pid, once so many are ready."""
    end = time.monotonic() + seconds
    while True:
        ready = {i.pid: i.instance_id for i in ask_fleet(port).instances if i.state == "ready"}
        if len(ready) == count:
            return ready
        assert time.monotonic() < end, ready
        time.sleep(0.05)


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
        end = time.monotonic() + 20
        while joined.process.pid not in {instance.pid for instance in ask_fleet(port).instances}:
            assert time.monotonic() < end, joined.stderr
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert joined.wait(20) == 0

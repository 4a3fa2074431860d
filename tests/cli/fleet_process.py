"""Fleets of processes without a model, from outside."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import grpc.aio

from chiron_engine.rpc.client import InferenceClient, sampling
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc, inference_pb2

SIMULATED = ["--executor", "simulated", "--profile", "h100/llama-3.1-8b/tp1/bf16"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def serve(port: int, state: Path, *more: str) -> list[str]:
    return ["serve", "tiny", *SIMULATED, "--grpc-port", str(port), "--state-dir", str(state), *more]


def ask_fleet(port: int, host: str = "127.0.0.1") -> coordinator_pb2.Fleet:
    async def ask() -> coordinator_pb2.Fleet:
        async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)
            return await stub.GetFleet(coordinator_pb2.GetFleetRequest(), wait_for_ready=True, timeout=20)

    return asyncio.run(ask())


def generate(port: int, max_tokens: int = 20, seed: int = 1, host: str = "127.0.0.1") -> list[int]:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=sampling(max_tokens=max_tokens, seed=seed, ignore_eos=True),
    )

    async def ask() -> list[int]:
        async with InferenceClient(f"{host}:{port}") as client:
            chunks = await client.generate_all(request, timeout=60)
        return [token for chunk in chunks for token in chunk.token_ids]

    return asyncio.run(ask())


def told(stream: Future[list[int]], seconds: float = 70.0) -> list[int] | str:
    """The tokens of a `generate` on another thread, or what its client was told instead of them."""
    try:
        return stream.result(seconds)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} ({error_code(error)}): {error.details()}"
    except TimeoutError:
        return f"no end within {seconds} s"


def wait_fleet(port: int, count: int, seconds: float = 20.0) -> dict[int, int]:
    """Instance ids by pid, once so many are ready."""
    ready: dict[int, int] = {}

    def has_count() -> bool:
        ready.clear()
        ready.update({i.pid: i.instance_id for i in ask_fleet(port).instances if i.state == "ready"})
        return len(ready) == count

    wait_until(has_count, seconds)
    return ready


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)

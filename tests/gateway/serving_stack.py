"""An engine without a model and a gateway in front of it, over real sockets in this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from chiron_engine.config import GatewayConfig
from chiron_engine.core.clocks import MonotonicClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import Executor, ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.gateway.engine_pool import EnginePool
from chiron_engine.gateway.server import Gateway, open_server, serve_gateway
from chiron_engine.gateway.text import ModelText
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.client import EngineClient, InferenceClient
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import engine_pb2
from chiron_engine.serving.engine_process import LoadedEngine, run_engine
from chiron_engine.serving.engine_service import CompileGuide, EngineDescription
from tests.gateway.tiny_model import END

SHAPE = ExecutorShape(
    block_size=16,
    num_device_blocks=1024,
    num_host_blocks=0,
    max_slots=64,
    max_step_tokens=512,
    max_model_len=1024,
    vocab_size=257,
)
T = TypeVar("T")

NAME = "tiny"
DESCRIPTION = EngineDescription(NAME, "NoModel", "float32", (END,))
LONG_S = 20.0


def null_executor(shape: ExecutorShape = SHAPE) -> Executor:
    return NullExecutor(shape)


def slow_executor(step_s: float = 0.01, shape: ExecutorShape = SHAPE) -> Executor:
    """Steps take real time, as on a device."""
    return LatencyModelExecutor(shape, StepCosts(step_s), MonotonicClock(), scripted_tokens=True)


@dataclass(slots=True)
class RunningEngine:
    task: asyncio.Task[None]
    shutdown: Shutdown
    client: EngineClient

    async def status(self) -> engine_pb2.EngineStatus:
        return await self.client.status()

    async def wait_running(self, count: int) -> None:
        """Return once this many requests run. Raises TimeoutError."""
        async with asyncio.timeout(LONG_S):
            while (await self.status()).load.running != count:
                await asyncio.sleep(0.005)

    async def wait_idle(self, timeout: float = 1.0) -> None:
        """Return once nothing runs and every block is free. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while True:
                load = (await self.status()).load
                if load.running == load.waiting == 0 and load.free_blocks == load.total_blocks:
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_engine(
    executor: Callable[[], Executor] = null_executor,
    *,
    drain_timeout_s: float = 5.0,
    compile_guide: CompileGuide | None = None,
    **core: int,
) -> AsyncIterator[RunningEngine]:
    shutdown = Shutdown(drain_timeout_s)
    listening = asyncio.get_running_loop().create_future()
    ready = asyncio.Event()
    task = asyncio.create_task(
        run_engine(
            lambda report: LoadedEngine(
                EngineCore(executor(), **core), DESCRIPTION, compile_guide=compile_guide
            ),
            shutdown=shutdown,
            on_listening=listening.set_result,
            on_ready=lambda port: ready.set(),
        )
    )
    async with asyncio.timeout(LONG_S):
        await ready.wait()
    async with EngineClient(f"127.0.0.1:{listening.result()}") as client:
        try:
            yield RunningEngine(task, shutdown, client)
        finally:
            await stop(task, shutdown)


@dataclass(slots=True)
class RunningGateway:
    task: asyncio.Task[None]
    shutdown: Shutdown
    client: InferenceClient


@asynccontextmanager
async def running_gateway(
    model: Path, engines: list[str], *, wait: bool = True, **config: int | float
) -> AsyncIterator[RunningGateway]:
    settings = GatewayConfig(grpc_port=config.pop("grpc_port", free_port()), **config)  # type: ignore[arg-type]
    shutdown = Shutdown(settings.drain_timeout_s)
    server, _ = open_server(settings)
    text = ModelText.from_directory(model)
    gateway = Gateway(text, NAME, EnginePool(engines), settings.max_queued_requests)
    task = asyncio.create_task(serve_gateway(settings, gateway, server, shutdown=shutdown))
    async with InferenceClient(f"127.0.0.1:{settings.grpc_port}") as client:
        try:
            if wait:
                await client.wait_serving(LONG_S)
            yield RunningGateway(task, shutdown, client)
        finally:
            await stop(task, shutdown)


@asynccontextmanager
async def serving(
    model: Path, executor: Callable[[], Executor] = null_executor, **config: int | float
) -> AsyncIterator[tuple[InferenceClient, RunningEngine]]:
    """One engine and one gateway."""
    async with (
        running_engine(executor) as engine,
        running_gateway(model, [engine.client.address], **config) as gateway,
    ):
        yield gateway.client, engine


async def stop(task: asyncio.Task[None], shutdown: Shutdown) -> None:
    """Stop now, and raise what the task raised."""
    if not task.done():
        shutdown.request()
        shutdown.request()
    async with asyncio.timeout(LONG_S):
        await task


@dataclass(slots=True)
class Background:
    """A stack on an event loop in a thread, for tests that are not coroutines."""

    loop: asyncio.AbstractEventLoop
    client: InferenceClient
    engine: RunningEngine

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LONG_S)


@contextmanager
def serving_in_background(
    model: Path, executor: Callable[[], Executor] = null_executor, **config: int | float
) -> Iterator[Background]:
    started: Future[Background] = Future()
    ended = threading.Event()

    async def main() -> None:
        async with serving(model, executor, **config) as (client, engine):
            started.set_result(Background(asyncio.get_running_loop(), client, engine))
            await asyncio.to_thread(ended.wait)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=run, name="serving")
    thread.start()
    try:
        yield started.result(LONG_S)
    finally:
        ended.set()
        thread.join(LONG_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def status_of(call: grpc.aio.UnaryStreamCall) -> tuple[grpc.StatusCode, str]:
    """Read a call to its end; its status code and details."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""

"""The engine process: load phases, health, signals, draining, failures."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.null_executor import NullExecutor, PlannedStep
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.rpc.client import ENGINE_SERVICE, EngineClient, InferenceClient, sampling
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.port import PortInUse
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import engine_pb2, inference_pb2, types_pb2
from chiron_engine.serving.engine_process import EngineFailed, LoadedEngine, ReportPhase, run_engine
from tests.gateway.serving_stack import (
    DESCRIPTION,
    LONG_S,
    SHAPE,
    running_engine,
    running_gateway,
    slow_executor,
    status_of,
)
from tests.gateway.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
Code = grpc.StatusCode


def ids(token: int, max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[token]),
        sampling=sampling(max_tokens=max_tokens, seed=1, ignore_eos=True),
    )


def scripted(token: int, count: int) -> list[int]:
    return [(31 + token * 7 + index * 13 + 1) % SHAPE.vocab_size for index in range(count)]


def test_answers_while_loading_and_reports_phases() -> None:
    async def check() -> None:
        shutdown, loaded = Shutdown(1.0), threading.Event()
        listening = asyncio.get_running_loop().create_future()

        def load(report: ReportPhase) -> LoadedEngine:
            report("weights 1/2")
            loaded.wait(LONG_S)
            return LoadedEngine(EngineCore(NullExecutor(SHAPE)), DESCRIPTION)

        task = asyncio.create_task(run_engine(load, shutdown=shutdown, on_listening=listening.set_result))
        async with EngineClient(f"127.0.0.1:{await listening}") as client:
            while (status := await client.status()).phase != "weights 1/2":
                await asyncio.sleep(0.01)
            assert not status.load.total_blocks
            assert not await client.is_serving() and not await client.is_serving(ENGINE_SERVICE)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.connect().read()
            assert error.value.code() is Code.UNAVAILABLE
            assert error_code(error.value) == "model_loading"
            assert "weights 1/2" in (error.value.details() or "")

            loaded.set()
            await client.wait_serving(LONG_S, ENGINE_SERVICE)
            assert await client.is_serving()
            assert (await client.status()).phase == "ready"
            stub = health_pb2_grpc.HealthStub(client.channel)
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
            assert unknown.value.code() is Code.NOT_FOUND
            shutdown.request()
            await asyncio.wait_for(task, LONG_S)

    asyncio.run(check())


def test_a_load_failure_is_raised_as_it_is() -> None:
    def load(report: ReportPhase) -> LoadedEngine:
        raise FileNotFoundError("no such model")

    async def check() -> None:
        with pytest.raises(FileNotFoundError, match="no such model"):
            await run_engine(load, shutdown=Shutdown(1.0))

    asyncio.run(check())


def test_a_stop_while_loading_does_not_wait_for_the_load() -> None:
    release = threading.Event()

    def load(report: ReportPhase) -> LoadedEngine:
        release.wait(LONG_S)
        return LoadedEngine(EngineCore(NullExecutor(SHAPE)), DESCRIPTION)

    async def check() -> None:
        shutdown = Shutdown(1.0)
        task = asyncio.create_task(run_engine(load, shutdown=shutdown))
        await asyncio.sleep(0.1)
        shutdown.request()
        await asyncio.wait_for(task, 3.0)

    try:
        asyncio.run(check())
    finally:
        release.set()


def test_a_port_in_use_is_refused_before_loading() -> None:
    def load(report: ReportPhase) -> LoadedEngine:
        raise AssertionError("loaded in spite of the port")

    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as holder, pytest.raises(PortInUse):
            await run_engine(load, port=holder.getsockname()[1], shutdown=Shutdown(1.0))

    asyncio.run(check())


class BrokenExecutor(NullExecutor):
    """Works for some steps, then raises a message that no client may see."""

    steps = 0

    def submit(self, plan: StepPlan) -> PlannedStep:
        self.steps += 1
        if self.steps > 20:
            raise RuntimeError("CUDA error at 0x7f00 in /secret/path.py")
        time.sleep(0.002)
        return super().submit(plan)


def test_a_failed_step_ends_streams_cleanly_and_the_process_with_an_error(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path)

    async def check() -> None:
        with pytest.raises(EngineFailed):
            async with (
                running_engine(partial(BrokenExecutor, SHAPE)) as engine,
                running_gateway(model, [engine.client.address]) as gateway,
            ):
                calls = [gateway.client.generate(ids(token, 100)) for token in range(8)]
                for code, details in await asyncio.gather(*map(status_of, calls)):  # type: ignore[arg-type]
                    assert code is Code.UNAVAILABLE
                    assert details == "the engine failed on this request; send it again"
                with pytest.raises(EngineFailed):
                    await asyncio.wait_for(engine.task, LONG_S)

    asyncio.run(check())


def test_reflection_only_when_asked_for() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def names(reflection: bool) -> set[str]:
        shutdown = Shutdown(1.0)
        ready = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            run_engine(
                lambda report: LoadedEngine(EngineCore(NullExecutor(SHAPE)), DESCRIPTION),
                shutdown=shutdown,
                reflection=reflection,
                on_ready=ready.set_result,
            )
        )
        async with EngineClient(f"127.0.0.1:{await ready}") as client:
            stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            found = set()
            try:
                async for answer in stub.ServerReflectionInfo(iter([request])):
                    found = {service.name for service in answer.list_services_response.service}
            except grpc.aio.AioRpcError as error:
                assert error.code() is Code.UNIMPLEMENTED
        shutdown.request()
        await asyncio.wait_for(task, LONG_S)
        return found

    assert ENGINE_SERVICE in asyncio.run(names(True))
    assert asyncio.run(names(False)) == set()


def test_the_drain_timeout_aborts_what_is_left() -> None:
    async def check() -> None:
        async with running_engine(partial(slow_executor, 0.02), drain_timeout_s=0.3) as engine:
            connection = engine.client.connect()
            assert (await connection.read()).HasField("hello")
            submit = engine_pb2.Submit(
                handle=1, prompt_token_ids=[1], sampling=sampling(max_tokens=1000, ignore_eos=True)
            )
            await connection.write(engine_pb2.EngineCommand(submits=[submit]))
            await connection.read()
            assert not await told_of_draining_by(connection, engine.shutdown.request)
            started = time.monotonic()
            reasons, code = await read_to_end(connection)
            assert time.monotonic() - started < 3.0
            assert reasons == [types_pb2.FINISH_REASON_ABORT]
            assert code is Code.UNAVAILABLE
            await asyncio.wait_for(engine.task, 5.0)

    async def told_of_draining_by(connection: grpc.aio.StreamStreamCall, ask: object) -> list[int]:
        """Ask for the drain; the ends seen before a load that says `draining`."""
        ask()  # type: ignore[operator]
        ends: list[int] = []
        while True:
            output = (await connection.read()).output
            ends += [finished.reason for finished in output.finished]
            if output.load.draining:
                return ends

    async def read_to_end(connection: grpc.aio.StreamStreamCall) -> tuple[list[int], grpc.StatusCode]:
        reasons: list[int] = []
        try:
            while (event := await connection.read()) is not grpc.aio.EOF:
                reasons += [finished.reason for finished in event.output.finished]
        except grpc.aio.AioRpcError as error:
            return reasons, error.code()
        return reasons, Code.OK

    asyncio.run(check())


@asynccontextmanager
async def engine_process(
    step_s: float, drain_s: float, *more: str
) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """A real process; its address. Killed at the end if it still runs."""
    command = [sys.executable, "-m", "tests.gateway.engine_main", str(step_s), str(drain_s), *more]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        port = await asyncio.to_thread(process.stdout.readline)
        yield process, f"127.0.0.1:{int(port)}"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(LONG_S)
        process.stdout.close()


async def exit_code(process: subprocess.Popen[str], timeout: float) -> int:
    return await asyncio.to_thread(process.wait, timeout)


def test_sigterm_drains_and_exits_0(tmp_path: Path) -> None:
    """Engine and gateway on one server: streams finish, new ones do not start."""
    model = write_tiny_model(tmp_path)

    async def check() -> None:
        async with (
            engine_process(0.01, 10.0, str(model)) as (process, address),
            InferenceClient(address) as client,
            EngineClient(address) as engine,
        ):
            assert await client.is_serving()
            calls = [asyncio.create_task(client.generate_all(ids(token, 200))) for token in range(10)]
            while (await engine.status()).load.running < 10:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            while await client.is_serving():
                await asyncio.sleep(0.01)
            assert (await status_of(client.generate(ids(1, 5))))[0] is Code.UNAVAILABLE  # type: ignore[arg-type]
            for token, call in enumerate(calls):
                got = [t for chunk in await call for t in chunk.token_ids]
                assert got == scripted(token, 200)
            assert await exit_code(process, 5.0) == 0

    asyncio.run(check())


def test_a_second_signal_stops_at_once() -> None:
    async def check() -> None:
        async with engine_process(0.02, 60.0) as (process, address), EngineClient(address) as client:
            connection = client.connect()
            await connection.read()
            submit = engine_pb2.Submit(
                handle=1, prompt_token_ids=[1], sampling=sampling(max_tokens=1000, ignore_eos=True)
            )
            await connection.write(engine_pb2.EngineCommand(submits=[submit]))
            await connection.read()
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert await exit_code(process, 5.0) == 0

    asyncio.run(check())


def test_an_engine_killed_mid_stream_gives_unavailable_and_a_new_one_is_found(tmp_path: Path) -> None:
    """Never a clean end for a broken stream; the tokens before are exact; the other engine takes over."""
    model = write_tiny_model(tmp_path)

    async def follow(client: InferenceClient, token: int, seen: dict[int, list[int]]) -> grpc.StatusCode:
        seen[token] = []
        try:
            async for chunk in client.generate(ids(token, 1000)):
                seen[token] += chunk.token_ids
        except grpc.aio.AioRpcError as error:
            assert error_code(error) == "engine_lost"
            return error.code()
        return Code.OK

    async def check() -> None:
        async with (
            engine_process(0.01, 5.0) as (victim, address),
            running_gateway(model, [address]) as gateway,
        ):
            seen: dict[int, list[int]] = {}
            follows = [asyncio.create_task(follow(gateway.client, token, seen)) for token in range(16)]
            while len(seen) < 16 or not all(len(tokens) > 3 for tokens in seen.values()):
                await asyncio.sleep(0.01)
            killed = time.monotonic()
            victim.kill()
            assert set(await asyncio.gather(*follows)) == {Code.UNAVAILABLE}
            assert time.monotonic() - killed < 1.0
            assert all(tokens == scripted(token, len(tokens)) for token, tokens in seen.items())
            assert not await gateway.client.is_serving()

            port = int(address.rpartition(":")[2])
            shutdown = Shutdown(1.0)
            task = asyncio.create_task(
                run_engine(
                    lambda report: LoadedEngine(EngineCore(NullExecutor(SHAPE)), DESCRIPTION),
                    port=port,
                    shutdown=shutdown,
                )
            )
            await gateway.client.wait_serving(5.0)
            assert await gateway.client.generate_all(ids(1, 3))
            shutdown.request()
            await asyncio.wait_for(task, LONG_S)

    asyncio.run(check())

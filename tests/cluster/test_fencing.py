"""What the coordinator takes from engines, and from whom."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from chiron_engine import __version__
from chiron_engine.cluster import engine_roster
from chiron_engine.cluster.engines import reported
from chiron_engine.cluster.fleet_message import fleet_message
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc
from chiron_engine.serving.engine_process import LoadedEngine, run_engine
from chiron_engine.serving.engine_service import EngineDescription
from chiron_engine.serving.fleet_member import Join
from tests.cluster.fleet_stack import (
    COSTS,
    END,
    NAME,
    SHAPE,
    Fleet,
    InProcessLauncher,
    expected,
    running_fleet,
    simulated_core,
)

CONFIG = FleetConfig(max_gpus=2, tick_s=0.1, prior_output_tokens=32.0)


def register(**changes: object) -> coordinator_pb2.Register:
    fields = {
        "boot_id": "b",
        "version": __version__,
        "model": NAME,
        "address": "127.0.0.1:1",
        "kv_capacity_tokens": 4096,
        "max_slots": 16,
        "max_model_len": SHAPE.max_model_len,
        "costs": coordinator_pb2.StepCosts(base_s=1e-3),
        **changes,
    }
    return coordinator_pb2.Register(**fields)


class Line:
    """A line of an engine that is none."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call

    async def send(self, **report: object) -> None:
        await self._call.write(coordinator_pb2.EngineReport(**report))

    async def order(self) -> coordinator_pb2.EngineOrder:
        async with asyncio.timeout(10):
            return await self._call.read()


@asynccontextmanager
async def line(fleet: Fleet, registration: coordinator_pb2.Register) -> AsyncIterator[Line]:
    async with grpc.aio.insecure_channel(fleet.launcher.address) as channel:
        line = Line(coordinator_pb2_grpc.CoordinatorStub(channel).Join())
        await line.send(register=registration)
        yield line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "model is other; the engines of this coordinator have tiny"),
        ({"version": "0.0.0"}, f"version is 0.0.0; this coordinator runs {__version__}"),
        ({"max_model_len": 7}, "max_model_len is 7; the engines of this coordinator have 2048"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    async def check() -> None:
        async with running_fleet(CONFIG) as fleet, line(fleet, register(**changes)) as engine:
            with pytest.raises(grpc.aio.AioRpcError, match=words) as error:
                await engine.order()
            assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert len(fleet.coordinator.roster.engines) == 1
            assert await fleet.generate([1], 5) == expected([1], 5)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"costs": coordinator_pb2.StepCosts(base_s=math.nan)}, "costs.base_s is nan; it must be finite"),
        ({"costs": coordinator_pb2.StepCosts(base_s=1, per_request_s=-2)}, "costs.per_request_s is -2.0"),
        ({"costs": coordinator_pb2.StepCosts()}, "costs.base_s is 0"),
        ({"kv_capacity_tokens": 0}, "kv_capacity_tokens is 0; it must be at least 1"),
        ({"max_slots": 0}, "max_slots is 0; it must be at least 1"),
        ({"address": ""}, "address is ''; it must be host:port"),
        ({"address": "host:70000"}, "address is 'host:70000'; it must be host:port"),
        ({"boot_id": ""}, "boot_id is empty"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(changes: dict[str, object], words: str) -> None:
    """Also as the first of all, whose word the policy starts with: the next one is taken."""

    async def check() -> None:
        async with running_fleet(CONFIG, launcher=InProcessLauncher(delay_s=0.5), wait=False) as fleet:
            async with asyncio.timeout(10):
                while not fleet.coordinator.roster._has_started:
                    await asyncio.sleep(0.01)
            async with line(fleet, register(**changes)) as engine:
                with pytest.raises(grpc.aio.AioRpcError, match=words) as error:
                    await engine.order()
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await fleet.client.wait_serving(10.0)
            assert await fleet.generate([1], 5) == expected([1], 5)

    asyncio.run(check())


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_report_that_is_no_number_teaches_nothing(seconds: float) -> None:
    async def check() -> None:
        async with running_fleet(CONFIG) as fleet:
            roster = fleet.coordinator.roster
            assert fleet.coordinator.fleet is not None
            model, engine = fleet.coordinator.fleet.model, roster.engines[0]
            await fleet.wait_for(lambda: engine.telemetry is not None)
            assert engine.register is not None
            report = coordinator_pb2.Telemetry(
                boot_id=engine.register.boot_id,
                phase="ready",
                last_step=coordinator_pb2.MeasuredStep(seconds=seconds, requests=3),
                latency_backpressure=seconds,
                itl_s=seconds,
            )
            slowness = model._batch_slowness
            roster.reported(engine, report)
            assert model._batch_slowness == slowness
            assert reported(0, report).latency_backpressure == reported(0, report).itl_s == 0.0

    asyncio.run(check())


def test_what_ends_a_line_is_told() -> None:
    async def check() -> None:
        async with (
            running_fleet(CONFIG) as fleet,
            grpc.aio.insecure_channel(fleet.launcher.address) as channel,
        ):
            join = channel.stream_stream("/chiron.v1.Coordinator/Join")()
            await join.write(coordinator_pb2.EngineReport(register=register()).SerializeToString())
            await join.read()
            await join.write(b"\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                while await join.read() is not grpc.aio.EOF:
                    pass
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(check())


def test_reports_under_another_boot_id_are_ignored() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG) as fleet, line(fleet, register()) as engine:
            instance_id = (await engine.order()).joined.instance_id
            entry = fleet.coordinator.roster.engines[instance_id]
            await engine.send(telemetry=coordinator_pb2.Telemetry(boot_id="a", step=9, phase="ready"))
            await engine.send(telemetry=coordinator_pb2.Telemetry(boot_id="b", step=4, phase="ready"))
            await fleet.wait_for(lambda: entry.telemetry is not None)
            assert entry.telemetry is not None
            assert entry.telemetry.step == 4

    asyncio.run(check())


def test_an_old_instance_id_is_of_another_coordinator() -> None:
    """The engine gets a new one: 0 is the one that was launched here."""

    async def check() -> None:
        old = register(instance_id=0, coordinator_id="another")
        async with running_fleet(CONFIG) as fleet, line(fleet, old) as engine:
            joined = (await engine.order()).joined
            assert joined.instance_id == 1
            assert joined.coordinator_id == fleet.coordinator.roster.coordinator_id
            again = register(instance_id=1, coordinator_id=joined.coordinator_id)
            async with line(fleet, again) as second:
                assert (await second.order()).joined.instance_id == 1
            other_boot = register(instance_id=1, coordinator_id=joined.coordinator_id, boot_id="c")
            async with line(fleet, other_boot) as third:
                assert (await third.order()).joined.instance_id == 2

    asyncio.run(check())


def test_an_engine_that_was_given_up_has_to_join_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line ends, and what it says on it until then is not heard."""
    monkeypatch.setattr(engine_roster, "SILENT_S", 0.5)

    async def check() -> None:
        async with running_fleet(CONFIG) as fleet, line(fleet, register()) as engine:
            joined = (await engine.order()).joined
            entry = fleet.coordinator.roster.engines[joined.instance_id]
            await fleet.wait_for(lambda: joined.instance_id not in fleet.coordinator.roster.engines)
            assert entry.is_dead
            while await engine.order() is not grpc.aio.EOF:
                pass
            rejoining = register(instance_id=joined.instance_id, coordinator_id=joined.coordinator_id)
            async with line(fleet, rejoining) as second:
                assert (await second.order()).joined.instance_id == joined.instance_id + 1

    asyncio.run(check())


@contextlib.contextmanager
def engine_in_a_thread(address: str) -> Iterator[asyncio.AbstractEventLoop]:
    """An engine with an event loop of its own, which is yielded."""
    started, shutdown_of = threading.Event(), []

    async def main() -> None:
        shutdown = Shutdown(1.0)
        shutdown_of.append((asyncio.get_running_loop(), shutdown))
        description = EngineDescription(NAME, "NoModel", "float32", (END,))
        await run_engine(
            lambda report: LoadedEngine(simulated_core(), description, COSTS),
            shutdown=shutdown,
            join=Join(address),
            on_joined=started.set,
        )

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(20)
    loop, shutdown = shutdown_of[0]
    try:
        yield loop
    finally:
        shutdown.request()
        shutdown.request()
        thread.join(20)


def test_a_busy_event_loop_does_not_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_roster, "SILENT_S", 0.6)

    async def check() -> None:
        async with running_fleet(CONFIG) as fleet:
            engines = fleet.coordinator.roster.engines
            member = engine_in_a_thread(fleet.launcher.address)
            loop = await asyncio.to_thread(member.__enter__)
            try:
                await fleet.wait_for(lambda: 1 in engines and engines[1].is_ready and engines[1].telemetry)
                loop.call_soon_threadsafe(time.sleep, 3.0)
                await asyncio.sleep(2.7)
                assert not engines[1].is_dead
                assert fleet.coordinator.clock() - engines[1].heard_at < 0.6
            finally:
                await asyncio.to_thread(member.__exit__, None, None, None)

    asyncio.run(check())


def test_at_the_cap_requests_wait_and_the_fleet_says_so() -> None:
    async def check() -> None:
        config = replace(CONFIG, max_gpus=1)
        async with running_fleet(config) as fleet:
            count = 3 * SHAPE.max_slots
            batch = [asyncio.create_task(fleet.generate([5, i], 60, batch=True)) for i in range(count)]
            await fleet.wait_for(lambda: fleet_message(fleet.coordinator).queued_batch > 0)
            assert fleet_message(fleet.coordinator).max_devices == 1
            for i, tokens in enumerate(await asyncio.gather(*batch)):
                assert tokens == expected([5, i], 60)
            assert fleet.launcher.launched == [0]

    asyncio.run(check())

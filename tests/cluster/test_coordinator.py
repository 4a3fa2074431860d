"""The coordinator with real engines (without a model) over real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import (
    FleetEffect,
    FleetEvent,
    FleetRequest,
    InstanceReported,
    RequestArrived,
    Tick,
)
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import types_pb2
from tests.cluster.fleet_stack import SHAPE, InProcessLauncher, expected, running_fleet

CONFIG = FleetConfig(max_gpus=3, tick_s=0.1, prior_output_tokens=32.0)


def test_one_engine_starts_and_serves() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG) as fleet:
            assert await fleet.generate([1, 2, 3], 20) == expected([1, 2, 3], 20)
            assert fleet.launcher.launched == [0]
            await fleet.wait_for(lambda: fleet.coordinator.roster.engines[0].telemetry is not None)

    asyncio.run(check())


def test_a_batch_request_gives_way_and_goes_on_where_its_kv_is() -> None:
    """Batch fills the engine; an interactive request takes its place at once, and every token is right."""
    shape = replace(SHAPE, num_device_blocks=40, max_slots=4)

    async def check() -> None:
        launcher = InProcessLauncher(shape=shape)
        async with running_fleet(replace(CONFIG, max_gpus=1), launcher=launcher) as fleet:
            batch = [asyncio.create_task(fleet.generate([5, i], 200, batch=True, seed=i)) for i in range(8)]
            await fleet.wait_for(lambda: len(fleet.coordinator.roster.engines[0].streams) >= 3)
            await asyncio.sleep(0.3)
            prompts = [[7] * 100 + [i] for i in range(4)]
            answers = await asyncio.gather(*(fleet.generate(prompt, 60) for prompt in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer == expected(prompt, 60)
            for i, tokens in enumerate(await asyncio.gather(*batch)):
                assert tokens == expected([5, i], 200, seed=i)

    asyncio.run(check())


def test_an_engine_that_ends_loses_no_request() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG, policy="static:2", initial=2) as fleet:
            await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
            streams = [asyncio.create_task(fleet.generate([3, i], 150, seed=i)) for i in range(12)]
            engines = fleet.coordinator.roster.engines.values()
            await fleet.wait_for(lambda: any(len(engine.streams) >= 3 for engine in engines))
            await asyncio.sleep(0.2)
            busiest = max(engines, key=lambda engine: len(engine.streams))
            await fleet.launcher.stop(busiest.instance_id, 0.0)
            for i, tokens in enumerate(await asyncio.gather(*streams)):
                assert tokens == expected([3, i], 150, seed=i)
            await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
            assert fleet.launcher.launched == [0, 1, 2]

    asyncio.run(check())


def test_a_stream_that_ends_before_it_is_started_leaves_nothing_behind() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG) as fleet:
            coordinator = fleet.coordinator
            assert coordinator.fleet is not None
            key, limits = coordinator.next_key(), types_pb2.SamplingParams(max_tokens=5)

            async def start() -> TokenStream:
                stream = TokenStream([1], limits, types_pb2.Slo(), "line", coordinator)
                stream.abort()
                return stream

            slo = Slo(SloClass.BATCH, 3600.0, 2.0)
            coordinator.enqueue(FleetRequest(key, slo, coordinator.clock(), 1, 5), start)
            assert coordinator._placed
            await fleet.wait_for(lambda: not coordinator._starts)
            assert not coordinator.fleet.dispatcher.tracked
            assert not coordinator._placed

    asyncio.run(check())


def test_what_the_policy_fails_at_costs_the_requests_of_that_event_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing: list[type] = []
    seen: list[type] = []
    handle = FleetState.handle

    def fails(self: FleetState, event: FleetEvent, now: float) -> list[FleetEffect]:
        seen.append(type(event))
        if type(event) in failing:
            failing.remove(type(event))
            raise KeyError("a bug")
        return handle(self, event, now)

    monkeypatch.setattr(FleetState, "handle", fails)

    async def check() -> None:
        async with running_fleet(CONFIG) as fleet:
            answer = asyncio.create_task(fleet.generate([1, 2, 3], 150))
            await fleet.wait_for(lambda: any(e.streams for e in fleet.coordinator.roster.engines.values()))
            failing.extend([RequestArrived, Tick, InstanceReported])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fleet.generate([4], 5)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert error_code(caught.value) == "server_error"
            await fleet.wait_for(lambda: not failing)
            seen.clear()
            await fleet.wait_for(lambda: Tick in seen and InstanceReported in seen)
            assert await answer == expected([1, 2, 3], 150)
            assert caplog.text.count("KeyError: 'a bug'") == 3

    asyncio.run(check())

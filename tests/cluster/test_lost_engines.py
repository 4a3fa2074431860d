"""Requests that lose one engine after another: unlucky ones end well, one that may be the cause does not."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.rpc.errors import error_code
from tests.cluster.fleet_stack import SHAPE, Fleet, InProcessLauncher, expected, running_fleet

CONFIG = FleetConfig(max_gpus=1, tick_s=0.05, prior_output_tokens=32.0)
PROMPT = [4, 5, 6]


async def kill_next(fleet: Fleet, tokens: int) -> None:
    """The engine of the only stream, once that has got so many tokens there."""
    engines = fleet.coordinator.roster.engines

    def has_come() -> bool:
        streams = [stream for engine in engines.values() for stream in engine.streams.values()]
        return bool(streams) and len(streams[0].tokens) >= target

    await fleet.wait_for(lambda: any(engine.streams for engine in engines.values()))
    (engine,) = engines.values()
    (stream,) = engine.streams.values()
    target = len(stream.tokens) + tokens
    await fleet.wait_for(has_come)
    shutdown = fleet.launcher.shutdowns[engine.instance_id]
    shutdown.request()
    shutdown.request()  # at once
    await fleet.wait_for(lambda: engine.instance_id not in engines)


def test_a_request_that_gets_on_outlives_many_engines() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG, policy="static:1") as fleet:
            answer = asyncio.create_task(fleet.generate(PROMPT, 400))
            for _ in range(5):
                await kill_next(fleet, 10)
            assert await answer == expected(PROMPT, 400)

    asyncio.run(check())


def test_a_request_that_gets_nowhere_kills_no_more_than_three_engines() -> None:
    """Its prompt takes 100 steps; each engine ends during those."""
    launcher = InProcessLauncher(shape=replace(SHAPE, max_step_tokens=16))

    async def check() -> None:
        async with running_fleet(CONFIG, policy="static:1", launcher=launcher) as fleet:
            answer = asyncio.create_task(fleet.generate(PROMPT * 530, 40))
            for _ in range(3):
                await kill_next(fleet, 0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            assert error_code(caught.value) == "engine_lost"
            await fleet.client.wait_serving(10.0)
            assert await fleet.generate(PROMPT, 5) == expected(PROMPT, 5)

    asyncio.run(check())


def test_a_request_is_not_blamed_for_engines_that_are_killed() -> None:
    launcher = InProcessLauncher(shape=replace(SHAPE, max_step_tokens=16), exit_code=-signal.SIGKILL)

    async def check() -> None:
        async with running_fleet(CONFIG, policy="static:1", launcher=launcher) as fleet:
            answer = asyncio.create_task(fleet.generate(PROMPT * 530, 40))
            for _ in range(4):
                await kill_next(fleet, 0)
            assert await answer == expected(PROMPT * 530, 40)

    asyncio.run(check())

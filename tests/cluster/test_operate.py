"""What operators ask of a fleet: drain, retire, scale; over real sockets."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chiron_engine.cluster.event_log import EventLog
from chiron_engine.cluster.event_replay import EventReplay
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.rpc.client import CoordinatorClient
from tests.cluster.fleet_stack import Fleet, InProcessLauncher, expected, running_fleet

CONFIG = FleetConfig(max_gpus=3, tick_s=0.1, prior_output_tokens=32.0)


async def refusal(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


async def start_streams(fleet: Fleet, streams: int, tokens: int) -> tuple[int, list[asyncio.Task[list[int]]]]:
    """On two engines; the first that is returned has some."""
    await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
    tasks = [asyncio.create_task(fleet.generate([3, i], tokens, seed=i)) for i in range(streams)]
    engines = fleet.coordinator.roster.engines
    await fleet.wait_for(lambda: max(len(engine.streams) for engine in engines.values()) >= 3)
    await asyncio.sleep(0.2)
    return max(engines, key=lambda key: len(engines[key].streams)), tasks


def test_retiring_moves_what_runs_at_once_and_loses_no_token() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG, policy="static:2", initial=2) as fleet:
            busy, tasks = await start_streams(fleet, 12, 300)
            async with CoordinatorClient(fleet.client.address) as client:
                assert await client.retire(busy)
                engine = fleet.coordinator.roster.engines[busy]
                assert not engine.streams and engine.is_draining
                await fleet.wait_for(lambda: busy not in fleet.coordinator.roster.engines)
                assert not all(task.done() for task in tasks), "it is gone before its requests end"
                assert not await client.retire(busy), "retired before"
            for i, tokens in enumerate(await asyncio.gather(*tasks)):
                assert tokens == expected([3, i], 300, seed=i)

    asyncio.run(check())


def test_draining_lets_requests_end_where_they_are() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG, policy="static:2", initial=2) as fleet:
            busy, tasks = await start_streams(fleet, 12, 150)
            async with CoordinatorClient(fleet.client.address) as client:
                engine = fleet.coordinator.roster.engines[busy]
                ran_there = list(engine.streams.values())
                assert await client.drain(busy)
            await asyncio.gather(*tasks)
            assert ran_there and {stream.num_attempts for stream in ran_there} == {1}
            await fleet.wait_for(lambda: busy not in fleet.coordinator.roster.engines)

    asyncio.run(check())


def test_a_hundred_retires_are_one(tmp_path: Path) -> None:
    async def check() -> None:
        with EventLog(tmp_path / "events") as log:
            async with running_fleet(CONFIG, policy="static:2", initial=2, event_log=log) as fleet:
                await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
                async with CoordinatorClient(fleet.client.address) as client:
                    await asyncio.gather(*(client.retire(1) for _ in range(100)))
                    await fleet.wait_for(lambda: 1 not in fleet.coordinator.roster.engines)
                    assert await refusal(client.retire(77)) == (
                        grpc.StatusCode.NOT_FOUND,
                        "there is no instance 77",
                    )
                    assert (await refusal(client.drain(77)))[0] is grpc.StatusCode.NOT_FOUND
        assert (tmp_path / "events").read_text().count('"kind":"RetireAsked"') == 1

    asyncio.run(check())


def test_the_bounds_of_a_fleet_change_while_it_runs() -> None:
    async def check() -> None:
        async with running_fleet(CONFIG) as fleet, CoordinatorClient(fleet.client.address) as client:
            answer = await client.scale(min_instances=2)
            assert (answer.min_instances, answer.max_devices) == (2, 3)
            await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
            await client.scale(1, 1)
            await fleet.wait_for(lambda: len(fleet.coordinator.roster.engines) == 1)
            code, message = await refusal(client.scale(min_instances=2))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "must fit" in message
            fleet.coordinator._most_devices = 4
            code, message = await refusal(client.scale(max_devices=5))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "there are 4 devices" in message
            fleet.coordinator.roster._launcher = None
            code, message = await refusal(client.scale(max_devices=2))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and "join this coordinator" in message
            shown = await client.fleet()
            assert (shown.min_instances, shown.max_devices) == (1, 1)

    asyncio.run(check())


def test_what_operators_asked_is_logged_and_decided_the_same_in_a_replay(tmp_path: Path) -> None:
    path = tmp_path / "events"

    async def check() -> None:
        with EventLog(path) as log:
            async with running_fleet(CONFIG, event_log=log) as fleet:
                fleet.coordinator.scale(2, 2)
                await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
                fleet.coordinator.retire(0)
                await fleet.wait_for(lambda: set(fleet.coordinator.roster.engines) == {1, 2})

    asyncio.run(check())
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    replay = EventReplay(header)
    assert [replay.feed(line) for line in lines] == [None] * len(lines)
    assert {"FleetResized", "RetireAsked"} <= {line.get("kind") for line in lines}


def test_launches_that_fail_stop_after_five_and_scale_tries_again() -> None:
    config = replace(CONFIG, tick_s=0.02)

    async def check() -> None:
        launcher = InProcessLauncher()
        async with running_fleet(config, launcher=launcher, wait=True) as fleet:
            launcher.fail += ["the disk is full"] * 5
            async with CoordinatorClient(fleet.client.address) as client:
                await client.scale(min_instances=2)
                await fleet.wait_for(lambda: not launcher.fail)
                await asyncio.sleep(1.5)
                assert len(launcher.launched) == 6
                shown = await client.fleet()
                assert shown.failed_launches == 5
                assert "FAILED: 5 launches" in shown.trouble and "the disk is full" in shown.trouble
                await client.scale()
                await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
                shown = await client.fleet()
                assert (shown.failed_launches, shown.trouble) == (0, "")
            assert fleet.coordinator.counters.failed_launches == 5

    asyncio.run(check())

"""A gateway's line to its coordinator, by itself."""

from __future__ import annotations

import asyncio

from chiron_engine.gateway.coordinator_line import CoordinatorLine
from chiron_engine.rpc.v1 import routing_pb2
from tests.rpc.mute_server import MuteServer


class NoOwner:
    async def attached(self) -> None:
        raise AssertionError("nobody answers")

    def detached(self) -> None:
        raise AssertionError("it was never up")

    async def obey(self, order: routing_pb2.GatewayOrder) -> None:
        raise AssertionError("nobody orders")


def test_a_line_closes_as_its_coordinator_is_killed() -> None:
    async def check() -> None:
        with MuteServer() as coordinator:
            line = CoordinatorLine(coordinator.address, "", NoOwner())
            line.start()
            await coordinator.die_unheard()
            await asyncio.wait_for(line.close(), 5)

    asyncio.run(check())

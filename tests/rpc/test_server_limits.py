"""A server refuses with a reason, or serves; it drops no call without a word."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2, health_pb2_grpc

from chiron_engine.rpc.client import open_channel
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import Health, create_server

AT_ONCE = 2200
"""More than gRPC lets wait by default, fewer than may run."""


def test_many_calls_at_once_are_all_answered() -> None:
    async def check() -> None:
        server = create_server()
        health = Health(server)
        await health.set_serving(True, [""])
        port = bind(server, "127.0.0.1", 0)
        await server.start()
        try:
            async with open_channel(f"127.0.0.1:{port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                calls = [stub.Check(health_pb2.HealthCheckRequest()) for _ in range(AT_ONCE)]
                answers = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await server.stop(0)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        assert not failed, f"{len(failed)} of {AT_ONCE}: {failed[0]}"

    asyncio.run(check())

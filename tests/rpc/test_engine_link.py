"""A link to an engine comes back after whatever ended it, and only to the engine it is for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.errors import unavailable
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import create_server
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, engine_pb2_grpc, types_pb2
from tests.rpc.mute_server import MuteServer


class OneToken(engine_pb2_grpc.EngineServicer):
    """Greets, and answers each request with one token and its end."""

    def __init__(self) -> None:
        self.connections = 0

    async def Connect(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], context: grpc.aio.ServicerContext
    ) -> None:
        self.connections += 1
        await context.write(engine_pb2.EngineEvent(hello=engine_pb2.Hello(boot_id="right")))
        async for command in commands:
            for submit in command.submits:
                ended = engine_pb2.Finished(handle=submit.handle, reason=types_pb2.FINISH_REASON_LENGTH)
                output = engine_pb2.StepOutput(handles=[submit.handle], token_ids=[7], finished=[ended])
                await context.write(engine_pb2.EngineEvent(output=output))


class Endless(OneToken):
    """Yields tokens until it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted: list[int] = []

    async def Connect(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], context: grpc.aio.ServicerContext
    ) -> None:
        await context.write(engine_pb2.EngineEvent(hello=engine_pb2.Hello(boot_id="right")))
        async for command in commands:
            self.aborted += command.aborts
            for submit in command.submits:
                output = engine_pb2.StepOutput(handles=[submit.handle] * 3, token_ids=[7] * 3)
                await context.write(engine_pb2.EngineEvent(output=output))


class Owner:
    """Fails at the first end it hears of."""

    def __init__(self) -> None:
        self.ends = 0

    def paused(self, stream: TokenStream) -> None:
        raise AssertionError("nothing pauses here")

    def ended(self, stream: TokenStream) -> None:
        self.ends += 1
        if self.ends == 1:
            raise KeyError("a bug")


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def linked(engine: OneToken, boot_id: str) -> AsyncIterator[EngineLink]:
    server = create_server()
    engine_pb2_grpc.add_EngineServicer_to_server(engine, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    link = EngineLink(f"127.0.0.1:{port}", boot_id=boot_id)
    link.start()
    try:
        yield link
    finally:
        await link.close()
        await server.stop(0)


def test_a_link_outlives_the_failures_of_those_it_tells() -> None:
    async def check() -> None:
        engine, owner = OneToken(), Owner()
        async with linked(engine, "right") as link:
            for count in (1, 2):
                await until(lambda: link.is_connected)
                stream = TokenStream([1], types_pb2.SamplingParams(), types_pb2.Slo(), "r", owner)
                link.run(stream)
                await until(lambda count=count: owner.ends == count)
                await until(lambda: engine.connections == 2)
            assert list(stream.tokens) == [7]

    asyncio.run(check())


class CountingOwner:
    def __init__(self) -> None:
        self.paused_ones: list[TokenStream] = []
        self.ended_ones: list[TokenStream] = []

    def paused(self, stream: TokenStream) -> None:
        self.paused_ones.append(stream)
        if len(self.paused_ones) == 1:
            raise KeyError("a bug")

    def ended(self, stream: TokenStream) -> None:
        self.ended_ones.append(stream)


def stream_of(owner: CountingOwner) -> TokenStream:
    return TokenStream([1], types_pb2.SamplingParams(), types_pb2.Slo(), "r", owner)


def test_a_stream_that_fails_is_ended_at_its_engine() -> None:
    async def check() -> None:
        engine, owner = Endless(), CountingOwner()
        async with linked(engine, "right") as link:
            await until(lambda: link.is_connected)
            stream = stream_of(owner)
            link.run(stream)
            await until(lambda: stream.output_tokens == 3)
            stream.fail(unavailable("no more", "draining"))
            await until(lambda: engine.aborted == [1])
            assert not stream.is_running
        assert (owner.paused_ones, owner.ended_ones) == ([], [stream])

    asyncio.run(check())


def test_a_link_closes_and_tells_all_though_one_cannot_be_told() -> None:
    async def check() -> None:
        owner = CountingOwner()
        async with linked(Endless(), "right") as link:
            await until(lambda: link.is_connected)
            streams = [stream_of(owner) for _ in range(3)]
            for stream in streams:
                link.run(stream)
            async with asyncio.timeout(5):
                await link.close()
            assert not link.is_connected
        assert owner.paused_ones == streams

    asyncio.run(check())


def test_another_engine_at_the_address_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        engine = OneToken()
        async with linked(engine, "wrong") as link:
            await until(lambda: engine.connections >= 3)
            assert not link.is_connected
            assert "has the boot id right, not wrong" in caplog.text

    asyncio.run(check())


def test_a_link_closes_as_its_engine_is_killed() -> None:
    """Until it has closed, the coordinator moves no request of that engine elsewhere."""

    async def check() -> None:
        with MuteServer() as engine:
            link = EngineLink(engine.address)
            link.start()
            await engine.die_unheard()
            await asyncio.wait_for(link.close(), 5)

    asyncio.run(check())

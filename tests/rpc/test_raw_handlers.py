"""Handlers fail cleanly: no exception text, whatever kind of call it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from chiron_engine.rpc.errors import error_code, retry_after_ms, unavailable
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import create_server
from chiron_engine.rpc.v1 import inference_pb2

Code = grpc.StatusCode
Message = inference_pb2.TokenizeRequest
SECRET = "secret /etc/path at 0x7f"


def react(request: Message) -> None:
    if request.text == "raise":
        raise KeyError(SECRET)
    if request.text == "refuse":
        raise unavailable("come back later", "draining", 250)


async def unary(request: Message, context: grpc.aio.ServicerContext) -> Message:
    react(request)
    return request


async def generator(request: Message, context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
    yield request
    react(request)


async def writer(request: Message, context: grpc.aio.ServicerContext) -> None:
    await context.write(request)
    react(request)


async def collect(requests: AsyncIterator[Message], context: grpc.aio.ServicerContext) -> Message:
    async for request in requests:
        react(request)
    return Message()


async def echo(requests: AsyncIterator[Message], context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
    async for request in requests:
        react(request)
        yield request


CODECS = (Message.FromString, Message.SerializeToString)
HANDLERS = {
    "unary": grpc.unary_unary_rpc_method_handler(unary, *CODECS),
    "generator": grpc.unary_stream_rpc_method_handler(generator, *CODECS),
    "writer": grpc.unary_stream_rpc_method_handler(writer, *CODECS),
    "collect": grpc.stream_unary_rpc_method_handler(collect, *CODECS),
    "echo": grpc.stream_stream_rpc_method_handler(echo, *CODECS),
}


async def send(method: str, raw: bytes) -> grpc.aio.AioRpcError | None:
    server = create_server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", HANDLERS),))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            async for _ in channel.stream_stream(f"/test.Service/{method}")(iter([raw]), timeout=5):
                pass
    except grpc.aio.AioRpcError as error:
        return error
    finally:
        await server.stop(0)
    return None


@pytest.mark.parametrize("method", HANDLERS)
def test_every_kind_of_call(method: str, caplog: pytest.LogCaptureFixture) -> None:
    def ask(raw: bytes) -> grpc.aio.AioRpcError | None:
        return asyncio.run(send(method, raw))

    assert ask(Message(text="fine").SerializeToString()) is None

    bad = ask(b"\xff\xff\xff")
    assert bad is not None and bad.code() is Code.INVALID_ARGUMENT

    refused = ask(Message(text="refuse").SerializeToString())
    assert refused is not None and refused.code() is Code.UNAVAILABLE
    assert refused.details() == "come back later"
    assert (error_code(refused), retry_after_ms(refused)) == ("draining", 250)

    with caplog.at_level(logging.ERROR):
        failed = ask(Message(text="raise").SerializeToString())
    assert failed is not None and failed.code() is Code.INTERNAL
    details = failed.details() or ""
    assert SECRET not in details and "KeyError" not in details
    number = details.rpartition(" ")[2]
    assert len(number) == 32 and number in caplog.text and SECRET in caplog.text

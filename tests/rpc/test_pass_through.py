"""What passes is what was sent, both ways, and each end learns how the other one ended."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from chiron_engine.rpc.client import open_channel
from chiron_engine.rpc.errors import error_code, retry_after_ms, unavailable
from chiron_engine.rpc.pass_through import PassThrough
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import create_server
from chiron_engine.rpc.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    coordinator_pb2,
    coordinator_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

Code = grpc.StatusCode
HOST = "127.0.0.1"
BATCH, COORDINATOR = "chiron.v1.Batch", "chiron.v1.Coordinator"
GET, SUBMIT, DRAIN = f"/{BATCH}/Get", f"/{BATCH}/Submit", f"/{COORDINATOR}/DrainInstance"
TRAILING = (("chiron-error-code", "no_such"), ("grpc-retry-pushback-ms", "17"), ("x-bin", b"\0\xff"))
SECOND_PART = 1 << 20
RETRIES = {
    "maxAttempts": 3,
    "initialBackoff": "0.01s",
    "maxBackoff": "0.01s",
    "backoffMultiplier": 1,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


class FarBatch(batch_pb2_grpc.BatchServicer):
    """Does what the batch id says, and notes what it sees."""

    def __init__(self) -> None:
        self.calls = 0
        self.metadata: list[tuple[str, str | bytes]] = []
        self.time_remaining: float | None = None
        self.cancelled = asyncio.Event()
        self.received = asyncio.Event()

    async def Get(
        self, request: batch_pb2.GetBatchRequest, context: grpc.aio.ServicerContext
    ) -> batch_pb2.BatchInfo:
        self.calls += 1
        self.metadata = [(key, value) for key, value in context.invocation_metadata() or ()]
        self.time_remaining = context.time_remaining()
        self.received.set()
        match request.batch_id:
            case "none":
                await context.abort(Code.NOT_FOUND, "there is no batch näme", TRAILING)
            case "busy":
                raise unavailable("the store is busy", "store_busy", 40)
            case "at the second" if self.calls == 1:
                raise unavailable("the store is busy", "store_busy", 10)
            case "never":
                await self._wait_cancelled()
            case "headers":
                await context.send_initial_metadata((("early", "1"), ("early-bin", b"\0")))
                await asyncio.sleep(0.3)
                context.set_trailing_metadata((("late", "2"), ("late", "3")))
        return batch_pb2.BatchInfo(batch_id=request.batch_id, name="far")

    async def Submit(
        self, requests: AsyncIterator[batch_pb2.SubmitBatchRequest], context: grpc.aio.ServicerContext
    ) -> batch_pb2.BatchInfo:
        count = 0
        async for request in requests:
            count += 1
            self.received.set()
            if request.batch.name == "refuse":
                await context.abort(Code.INVALID_ARGUMENT, "line 0 is wrong", TRAILING)
            if request.batch.name == "block":
                await self._wait_cancelled()
        return batch_pb2.BatchInfo(name=f"{count} messages")

    async def _wait_cancelled(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class FarCoordinator(coordinator_pb2_grpc.CoordinatorServicer):
    async def Join(
        self, reports: AsyncIterator[coordinator_pb2.EngineReport], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[coordinator_pb2.EngineOrder]:
        async for report in reports:
            joined = coordinator_pb2.Joined(instance_id=report.telemetry.step + 1)
            yield coordinator_pb2.EngineOrder(joined=joined)

    async def DrainInstance(
        self, request: coordinator_pb2.DrainInstanceRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.DrainInstanceResponse:
        raise AssertionError("an excluded method came through")


@dataclass
class Passing:
    far: FarBatch
    address: str
    channel: grpc.aio.Channel

    @property
    def batch(self) -> batch_pb2_grpc.BatchStub:
        return batch_pb2_grpc.BatchStub(self.channel)


@asynccontextmanager
async def far_server(far: FarBatch, port: int = 0) -> AsyncIterator[int]:
    server = create_server()
    batch_pb2_grpc.add_BatchServicer_to_server(far, server)
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(FarCoordinator(), server)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference_pb2_grpc.InferenceServicer(), server)
    port = bind(server, HOST, port)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@asynccontextmanager
async def gateway(far_port: int) -> AsyncIterator[str]:
    """The address of a server that passes on to `far_port`."""
    server = create_server()
    handler = PassThrough(f"{HOST}:{far_port}", (BATCH, COORDINATOR), excluded=(DRAIN,))
    server.add_generic_rpc_handlers((handler,))
    port = bind(server, HOST, 0)
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(0)
        await handler.close()


@asynccontextmanager
async def passing() -> AsyncIterator[Passing]:
    far = FarBatch()
    async with far_server(far) as far_port, gateway(far_port) as address, open_channel(address) as channel:
        yield Passing(far, address, channel)


def run(check: Callable[[Passing], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), passing() as it:
            await check(it)

    asyncio.run(main())


def get(batch_id: str) -> batch_pb2.GetBatchRequest:
    return batch_pb2.GetBatchRequest(batch_id=batch_id)


def upload(name: str = "", text: str = "") -> batch_pb2.SubmitBatchRequest:
    line = batch_pb2.BatchLine(custom_id=text)
    return batch_pb2.SubmitBatchRequest(batch=batch_pb2.BatchSpec(name=name), lines=[line])


def free_port() -> int:
    """A port nobody listens on, the next moment at least."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_an_answer_comes_back() -> None:
    async def check(it: Passing) -> None:
        assert await it.batch.Get(get("b")) == batch_pb2.BatchInfo(batch_id="b", name="far")

    run(check)


def test_a_streamed_request_passes_with_its_end() -> None:
    async def check(it: Passing) -> None:
        answer = await it.batch.Submit(iter([upload(), upload(), upload()]))
        assert answer.name == "3 messages"
        assert (await it.batch.Submit(iter(()))).name == "0 messages"

    run(check)


def test_both_sides_of_a_stream_talk_in_turns() -> None:
    async def check(it: Passing) -> None:
        call = coordinator_pb2_grpc.CoordinatorStub(it.channel).Join()
        for step in range(3):
            await call.write(coordinator_pb2.EngineReport(telemetry=coordinator_pb2.Telemetry(step=step)))
            assert (await call.read()).joined.instance_id == step + 1
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is Code.OK

    run(check)


def test_bytes_that_are_no_message_pass_as_they_are() -> None:
    async def check(it: Passing) -> None:
        error = await failure(it.channel.unary_unary(GET)(b"\xff\xff\xff"))
        assert error.code() is Code.INVALID_ARGUMENT
        assert "does not parse" in (error.details() or "")
        unknown = await failure(it.channel.unary_unary(f"/{BATCH}/Later")(b"\xff"))
        assert unknown.code() is Code.UNIMPLEMENTED

    run(check)


def test_a_large_message() -> None:
    async def check(it: Passing) -> None:
        batch_id = "x" * (8 << 20)
        assert (await it.batch.Get(get(batch_id))).batch_id == batch_id

    run(check)


def test_an_error_arrives_unchanged() -> None:
    async def check(it: Passing) -> None:
        error = await failure(it.batch.Get(get("none")))
        assert (error.code(), error.details()) == (Code.NOT_FOUND, "there is no batch näme")
        assert sorted(error.trailing_metadata()) == sorted(TRAILING)

    run(check)


def test_an_error_that_comes_while_requests_are_sent_arrives_unchanged() -> None:
    """The client is a plain one: one on asyncio would lose the status itself (grpc/grpc#36066)."""

    def refused(address: str) -> grpc.RpcError:
        def uploads() -> Iterator[batch_pb2.SubmitBatchRequest]:
            yield upload("refuse")
            for _ in range(100):
                yield upload(text="x" * 100_000)

        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            batch_pb2_grpc.BatchStub(channel).Submit(uploads(), timeout=10)
        return caught.value

    async def check(it: Passing) -> None:
        for _ in range(20):
            error: Any = await asyncio.to_thread(refused, it.address)
            assert (error.code(), error.details()) == (Code.INVALID_ARGUMENT, "line 0 is wrong")
            assert sorted(tuple(pair) for pair in error.trailing_metadata()) == sorted(TRAILING)

    run(check)


def test_request_metadata_passes_without_what_belongs_to_the_connection() -> None:
    async def check(it: Passing) -> None:
        sent = [("key", "v"), ("key", "w"), ("key-bin", b"\0\xff")]
        options = [("grpc.primary_user_agent", "its-client")]
        async with grpc.aio.insecure_channel(it.address, options=options) as channel:
            own = ("grpc-other", "1")
            await batch_pb2_grpc.BatchStub(channel).Get(get("b"), metadata=(*sent, own))
        assert [pair for pair in it.far.metadata if pair[0] != "user-agent"] == sent
        assert "its-client" not in str(it.far.metadata)

    run(check)


def test_metadata_of_the_answer_comes_back_as_soon_as_it_is_there() -> None:
    async def check(it: Passing) -> None:
        call = it.batch.Get(get("headers"))
        assert set(await call.initial_metadata()) == {("early", "1"), ("early-bin", b"\0")}
        assert list(await call.trailing_metadata()) == [("late", "2"), ("late", "3")]
        stream = it.channel.stream_stream(GET)(iter([get("headers").SerializeToString()]))
        await stream.initial_metadata()
        assert not stream.done()

    run(check)


def test_the_deadline_passes() -> None:
    async def check(it: Passing) -> None:
        await it.batch.Get(get("b"), timeout=7)
        assert it.far.time_remaining is not None and 5 < it.far.time_remaining < 7.1
        await it.batch.Get(get("b"))
        assert it.far.time_remaining is None
        error = await failure(it.batch.Get(get("never"), timeout=0.3))
        assert error.code() is Code.DEADLINE_EXCEEDED
        await it.far.cancelled.wait()

    run(check)


@pytest.mark.parametrize("method", ["Get", "Submit"])
def test_a_call_that_its_client_cancels_is_cancelled(method: str) -> None:
    async def check(it: Passing) -> None:
        if method == "Get":
            call = it.batch.Get(get("never"))
        else:
            call = it.batch.Submit()
            await call.write(upload("block"))
        await it.far.received.wait()
        assert not it.far.cancelled.is_set()
        call.cancel()
        await asyncio.wait_for(it.far.cancelled.wait(), 5)

    run(check)


def test_a_client_waits_for_a_far_server_that_does_not_read() -> None:
    async def check(it: Passing) -> None:
        call = it.batch.Submit()
        await call.write(upload("block"))
        part, num_sent, limit = upload(text="x" * (1 << 20)), 0, 128
        with pytest.raises(TimeoutError):
            while num_sent < limit:
                await asyncio.wait_for(call.write(part), 2)
                num_sent += 1
        assert num_sent < limit / 2

    run(check)


def test_without_the_far_server_the_client_is_told_to_try_again_until_it_is_there() -> None:
    async def check() -> None:
        far_port = free_port()
        async with gateway(far_port) as address, open_channel(address) as channel:
            stub = batch_pb2_grpc.BatchStub(channel)
            for call in (stub.Get(get("b")), stub.Submit(iter([upload()] * 3))):
                error = await failure(call)
                assert error.code() is Code.UNAVAILABLE
                assert error.details() == "the coordinator cannot be reached; try again shortly"
                assert (error_code(error), retry_after_ms(error)) == ("coordinator_away", 1000)
            await asyncio.sleep(6.2)  # a wait that grows without bound would outlast the patience below
            async with far_server(FarBatch(), far_port):
                begun = time.monotonic()
                while time.monotonic() < begun + 2:
                    try:
                        assert (await stub.Get(get("b"))).name == "far"
                        return
                    except grpc.aio.AioRpcError as again:
                        assert error_code(again) == "coordinator_away"
                        await asyncio.sleep(0.1)
                raise AssertionError("the far server is back, and not found")

    asyncio.run(check())


def test_a_far_server_that_goes_away_during_a_call() -> None:
    async def check() -> None:
        far, far_port = FarBatch(), free_port()
        async with gateway(far_port) as address, open_channel(address) as channel:
            async with far_server(far, far_port):
                answer = asyncio.ensure_future(failure(batch_pb2_grpc.BatchStub(channel).Get(get("never"))))
                await far.received.wait()
            error = await asyncio.wait_for(answer, 5)
            assert (error.code(), error_code(error)) == (Code.UNAVAILABLE, "coordinator_away")

    asyncio.run(check())


def test_an_unavailable_of_the_far_server_itself_is_its_own() -> None:
    async def check(it: Passing) -> None:
        error = await failure(it.batch.Get(get("busy")))
        assert (error.code(), error.details()) == (Code.UNAVAILABLE, "the store is busy")
        assert (error_code(error), retry_after_ms(error)) == ("store_busy", 40)

    run(check)


def test_a_client_whose_grpc_retries_may_do_so() -> None:
    """gRPC tries a call again only where no headers came before the refusal."""

    async def check(it: Passing) -> None:
        config = {"methodConfig": [{"name": [{"service": BATCH}], "retryPolicy": RETRIES}]}
        options = [("grpc.service_config", json.dumps(config))]
        async with grpc.aio.insecure_channel(it.address, options=options) as channel:
            answer = await batch_pb2_grpc.BatchStub(channel).Get(get("at the second"))
        assert (answer.name, it.far.calls) == ("far", 2)

    run(check)


def test_other_services_and_excluded_methods_do_not_pass() -> None:
    async def check(it: Passing) -> None:
        inference = inference_pb2_grpc.InferenceStub(it.channel)
        other = await failure(inference.Tokenize(inference_pb2.TokenizeRequest(text="x")))
        request = coordinator_pb2.DrainInstanceRequest(instance_id=1)
        excluded = await failure(coordinator_pb2_grpc.CoordinatorStub(it.channel).DrainInstance(request))
        for error in (other, excluded):
            assert (error.code(), error.details()) == (Code.UNIMPLEMENTED, "Method not found!")

    run(check)

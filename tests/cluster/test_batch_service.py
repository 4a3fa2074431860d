"""The Batch service over real sockets, with a listener in the coordinator's place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chiron_engine.cluster import batch_upload
from chiron_engine.cluster.batch_checks import BatchLimits
from chiron_engine.cluster.batch_records import Submitted, Withdrawn
from chiron_engine.cluster.batch_service import BATCH_SERVICE, BatchService
from chiron_engine.cluster.batch_store_thread import BatchStoreThread
from chiron_engine.cluster.batch_upload import CheckedRequest
from chiron_engine.rpc.client import open_channel
from chiron_engine.rpc.errors import error_code, invalid_argument, retry_after_ms
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import create_server
from chiron_engine.rpc.v1 import batch_pb2, batch_pb2_grpc, inference_pb2, types_pb2

Code = grpc.StatusCode
Spec, Line, Page = batch_pb2.BatchSpec, batch_pb2.BatchLine, batch_pb2.SubmitBatchRequest
NOW = 1_000_000.0
CONTEXT = 100
NAN = float("nan")


@dataclass(slots=True)
class Listener:
    submitted: list[Submitted] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    def on_submitted(self, submitted: Submitted) -> None:
        self.submitted.append(submitted)
        self.heard.set()

    def on_withdrawn(self, withdrawn: Withdrawn) -> None:
        self.withdrawn.append(withdrawn)


@dataclass(slots=True)
class Stack:
    stub: batch_pb2_grpc.BatchStub
    channel: grpc.aio.Channel
    store: BatchStoreThread
    listener: Listener
    service: BatchService
    now: float = NOW

    async def submit(self, spec: Spec, lines: Iterable[Line] = ()) -> batch_pb2.BatchInfo:
        return await self.stub.Submit(iter([Page(batch=spec, lines=lines, complete=True)]), timeout=10)

    async def get(self, batch_id: str) -> batch_pb2.BatchInfo:
        return await self.stub.Get(batch_pb2.GetBatchRequest(batch_id=batch_id))

    async def cancel(self, batch_id: str) -> batch_pb2.BatchInfo:
        return await self.stub.Cancel(batch_pb2.CancelBatchRequest(batch_id=batch_id))

    async def results(self, batch_id: str, **fields: int) -> batch_pb2.ListResultsResponse:
        return await self.stub.Results(batch_pb2.ListResultsRequest(batch_id=batch_id, **fields))

    async def run(self, line_ids: Iterable[int]) -> None:
        wanted = list(line_ids)
        await self.store.call(lambda store: store.claim(wanted, self.now))


async def check(request: inference_pb2.GenerateRequest) -> CheckedRequest:
    """Draws a seed, as a gateway does where none is given."""
    count = len(request.token_ids.ids)
    if count >= CONTEXT:
        raise invalid_argument(f"the prompt has {count} tokens", "context_length_exceeded")
    request.sampling.seed = random.getrandbits(32)
    return CheckedRequest(request, count, request.sampling.max_tokens or 8)


@asynccontextmanager
async def serving(directory: Path, limits: BatchLimits | None = None) -> AsyncIterator[Stack]:
    store = await BatchStoreThread.open(directory, limits)
    server = create_server()
    listener = Listener()
    service = BatchService(store, listener, check, lambda: stack.now)
    batch_pb2_grpc.add_BatchServicer_to_server(service, server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stack = Stack(batch_pb2_grpc.BatchStub(channel), channel, store, listener, service)
        try:
            yield stack
        finally:
            await server.stop(1)
            await store.close()


def in_loop(directory: Path, scenario: Callable[[Stack], Awaitable[None]], **fields: object) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), serving(directory, **fields) as stack:  # type: ignore[arg-type]
            await scenario(stack)

    asyncio.run(run())


def line(custom_id: str = "a", tokens: int = 3, slo: types_pb2.Slo | None = None) -> Line:
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=range(tokens)), slo=slo)
    return Line(custom_id=custom_id, request=request)


def lines(count: int) -> list[Line]:
    return [line(f"line-{place}") for place in range(count)]


def slo(**fields: object) -> Line:
    return line(slo=types_pb2.Slo(**fields))  # type: ignore[arg-type]


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_a_batch_comes_in_pages_and_is_known_at_once(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        spec = Spec(
            batch_id="b", name="night", metadata={"k": "v"}, completion_window_s=60, expire_after_s=90
        )
        own = slo(deadline_s=7, ttft_slo_ms=500, itl_slo_ms=50)
        pages = [Page(batch=spec), Page(lines=lines(3)), Page(), Page(lines=[own], complete=True)]
        info = await stack.stub.Submit(iter(pages), timeout=10)
        assert info == await stack.get("b")
        assert (info.name, dict(info.metadata), info.created) == ("night", {"k": "v"}, NOW)
        assert (info.deadline, info.expires_at) == (NOW + 60, NOW + 90)
        assert (info.lines.total, info.lines.queued) == (4, 4)
        assert info.status == batch_pb2.BATCH_STATUS_IN_PROGRESS
        assert not info.HasField("finished_at")
        (submitted,) = stack.listener.submitted
        found = [(x.line_no, x.prompt_tokens, x.max_tokens, x.deadline) for x in submitted.lines]
        assert found == [(i, 3, 8, NOW + 60) for i in range(3)] + [(3, 3, 8, NOW + 7)]
        assert (submitted.lines[0].ttft_slo_s, submitted.lines[0].itl_slo_s) == (3600.0, 2.0)
        assert (submitted.lines[3].ttft_slo_s, submitted.lines[3].itl_slo_s) == (0.5, 0.05)
        (claim,) = await stack.store.call(lambda store: store.claim([submitted.lines[0].line_id], NOW))
        request = inference_pb2.GenerateRequest.FromString(claim.request)
        assert request.slo.slo_class == types_pb2.SLO_CLASS_BATCH
        assert list(request.token_ids.ids) == [0, 1, 2] and request.sampling.HasField("seed")

    in_loop(tmp_path, scenario)


def test_a_lost_answer_can_be_asked_for_again(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        spec = Spec(batch_id="b", completion_window_s=60.0005)
        first = await stack.submit(spec, lines(3))
        stack.now += 1234.56789
        assert await stack.submit(spec, lines(3)) == first
        assert len(stack.listener.submitted) == 1
        error = await failure(stack.submit(spec, lines(2)))
        assert (error.code(), error_code(error)) == (Code.ALREADY_EXISTS, "already_exists")

    in_loop(tmp_path, scenario)


def test_ids_are_made_where_none_is_given(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        made = {(await stack.submit(Spec(), lines(1))).batch_id for _ in range(3)}
        assert len(made) == 3 and all(len(batch_id) > 20 for batch_id in made)

    in_loop(tmp_path, scenario)


def test_results(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await stack.submit(Spec(batch_id="b"), lines(3))
        ids = [x.line_id for x in stack.listener.submitted[0].lines]
        await stack.run(ids)
        output = inference_pb2.GenerateChunk(
            text="é", token_ids=[5, 6], finish_reason=types_pb2.FINISH_REASON_STOP
        )
        await stack.store.call(lambda store: store.finish(ids[2], 1, output.SerializeToString(), NOW + 2))
        await stack.store.call(lambda store: store.fail(ids[0], 1, "engine_lost", "three were lost", NOW + 3))
        page = await stack.results("b", limit=1)
        assert page.next_after == 0
        (first,) = page.results
        assert (first.line_no, first.custom_id, first.ended_at) == (0, "line-0", NOW + 3)
        assert (first.state, first.error.code) == (batch_pb2.LINE_STATE_FAILED, "engine_lost")
        page = await stack.results("b", after=page.next_after)
        assert not page.HasField("next_after")
        (second,) = page.results
        assert (second.line_no, second.state, second.output) == (2, batch_pb2.LINE_STATE_DONE, output)
        assert not second.HasField("error")

    in_loop(tmp_path, scenario)


def test_cancel_tells_what_runs(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await stack.submit(Spec(batch_id="b"), lines(3))
        ids = [x.line_id for x in stack.listener.submitted[0].lines]
        await stack.run(ids[:1])
        info = await stack.cancel("b")
        assert info.status == batch_pb2.BATCH_STATUS_CANCELLING
        assert (info.lines.running, info.lines.cancelled, info.cancelled_at) == (1, 2, NOW)
        (withdrawn,) = stack.listener.withdrawn
        assert set(withdrawn.ended) == set(ids[1:])
        assert [(x.line_id, x.attempt) for x in withdrawn.to_stop] == [(ids[0], 1)]
        await stack.store.call(lambda store: store.stopped(ids[0], 1, NOW))
        info = await stack.cancel("b")
        assert (info.status, info.lines.cancelled) == (batch_pb2.BATCH_STATUS_CANCELLED, 3)

    in_loop(tmp_path, scenario)


def test_listing(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        for number in range(3):
            await stack.submit(Spec(batch_id=f"b{number}"), lines(1))
        request = batch_pb2.ListBatchesRequest(limit=2)
        page = await stack.stub.List(request)
        assert ([info.batch_id for info in page.batches], page.has_more) == (["b2", "b1"], True)
        page = await stack.stub.List(batch_pb2.ListBatchesRequest(after="b1"))
        assert ([info.batch_id for info in page.batches], page.has_more) == (["b0"], False)

    in_loop(tmp_path, scenario)


BAD = Code.INVALID_ARGUMENT
BAD_SUBMITS = [
    ([], BAD, "no messages"),
    ([Page(lines=lines(1))], BAD, "batch is not set in the first message"),
    ([Page(batch=Spec()), Page(batch=Spec(), lines=lines(1))], BAD, "batch is set in a later message"),
    ([Page(batch=Spec())], BAD, "the batch has no lines"),
    ([Page(batch=Spec(batch_id="a/b"), lines=lines(1))], BAD, "batch_id is 'a/b'"),
    ([Page(batch=Spec(completion_window_s=-1), lines=lines(1))], BAD, "completion_window_s is -1.0"),
    ([Page(batch=Spec(expire_after_s=NAN), lines=lines(1))], BAD, "expire_after_s is nan"),
    ([Page(batch=Spec(), lines=[line(), line()])], BAD, "same custom_id"),
    ([Page(batch=Spec(), lines=[line("")])], BAD, "custom_id of line 0 is empty"),
    ([Page(batch=Spec(), lines=[Line(custom_id="a")])], BAD, "line 0 ('a'): request is not set"),
    ([Page(batch=Spec(), lines=[slo(slo_class=1)])], BAD, "slo_class is interactive"),
    ([Page(batch=Spec(), lines=[slo(slo_class=9)])], BAD, "slo_class is 9"),
    ([Page(batch=Spec(), lines=[slo(itl_slo_ms=-3)])], BAD, "itl_slo_ms is -3.0"),
    ([Page(batch=Spec(), lines=[slo(deadline_s=-3)])], BAD, "deadline_s is -3.0"),
    ([Page(batch=Spec(), lines=[line("a"), line("b", CONTEXT)])], BAD, "line 1 ('b'): the prompt has 100"),
    ([Page(batch=Spec(), lines=[line(tokens=0)])], BAD, "prompt_tokens of line 0 is 0"),
    ([Page(batch=Spec(), lines=lines(6))], Code.RESOURCE_EXHAUSTED, "more than 5 lines"),
    ([Page(batch=Spec(), lines=[line("x" * 999)])], Code.RESOURCE_EXHAUSTED, "takes more than 300 bytes"),
]


def test_bad_batches_are_named_and_not_stored(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        for pages, code, says in BAD_SUBMITS:
            for page in pages[-1:]:
                page.complete = True
            error = await failure(stack.stub.Submit(iter(pages), timeout=10))
            assert (error.code(), says in (error.details() or "")) == (code, True), (says, error.details())
            assert error_code(error) in ("invalid_value", "context_length_exceeded", "request_too_large")
        assert not (await stack.stub.List(batch_pb2.ListBatchesRequest())).batches
        assert not stack.listener.submitted
        wrong = line()
        wrong.request.request_id = "mine"
        assert "request_id is set" in ((await failure(stack.submit(Spec(), [wrong]))).details() or "")

    in_loop(tmp_path, scenario, limits=BatchLimits(max_lines=5, max_batch_bytes=300))


def test_unknown_batches_and_bad_limits(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        for call in (stack.get, stack.cancel, stack.results):
            error = await failure(call("nothing"))
            assert (error.code(), error_code(error)) == (Code.NOT_FOUND, "not_found")
            assert (await failure(call(""))).code() is BAD
        error = await failure(stack.results("b", limit=1001))
        assert error.code() is BAD and "limit is 1001" in (error.details() or "")
        error = await failure(stack.stub.List(batch_pb2.ListBatchesRequest(after="nothing")))
        assert error.code() is Code.NOT_FOUND

    in_loop(tmp_path, scenario)


@pytest.mark.parametrize("method", ["Submit", "Get", "List", "Results", "Cancel"])
def test_bytes_that_do_not_parse(tmp_path: Path, method: str) -> None:
    async def scenario(stack: Stack) -> None:
        path = f"/{BATCH_SERVICE}/{method}"
        junk = b"\xff\xff\xff"
        if method == "Submit":
            error = await failure(stack.channel.stream_unary(path)(iter([junk]), timeout=5))
        else:
            error = await failure(stack.channel.unary_unary(path)(junk, timeout=5))
        assert error.code() is BAD and "does not parse" in (error.details() or "")

    in_loop(tmp_path, scenario)


def test_a_full_disk_and_a_closed_store(tmp_path: Path) -> None:
    async def scenario(stack: Stack) -> None:
        await stack.submit(Spec(batch_id="b"), lines(1))

        def fill(full: bool) -> None:
            stack.store._store._db.execute(f"PRAGMA max_page_count = {1 if full else 100_000}")

        stack.store._thread.submit(fill, True).result()
        error = await failure(stack.submit(Spec(batch_id="c"), [line(str(i), 99) for i in range(99)]))
        assert (error.code(), error_code(error)) == (Code.RESOURCE_EXHAUSTED, "insufficient_storage")
        assert (retry_after_ms(error) or 0) > 0
        assert (await stack.get("b")).lines.queued == 1
        stack.store._thread.submit(fill, False).result()
        assert (await stack.submit(Spec(batch_id="c"), lines(99))).lines.total == 99
        await stack.store.close()
        error = await failure(stack.get("b"))
        assert (error.code(), error_code(error)) == (Code.UNAVAILABLE, "draining")

    in_loop(tmp_path, scenario)


def test_a_client_that_leaves_during_the_commit_is_still_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its batch would lie on the disk until the next start."""

    async def scenario(stack: Stack) -> None:
        started, release = asyncio.Event(), asyncio.Event()
        really_call = stack.store.call

        async def slow_call(operation: Callable[..., object]) -> object:
            started.set()
            await release.wait()
            return await really_call(operation)

        monkeypatch.setattr(stack.store, "call", slow_call)
        call = stack.stub.Submit(iter([Page(batch=Spec(batch_id="b"), lines=lines(2), complete=True)]))
        await started.wait()
        call.cancel()
        await asyncio.sleep(0.1)
        release.set()
        await asyncio.wait_for(stack.listener.heard.wait(), 5)
        assert (await stack.get("b")).lines.queued == 2

    in_loop(tmp_path, scenario)


@pytest.mark.parametrize("ends", ["cancelled", "closed"])
def test_an_upload_that_breaks_off_is_not_stored(tmp_path: Path, ends: str) -> None:
    """gRPC shows a cancelled call first as one whose requests have ended."""

    async def scenario(stack: Stack) -> None:
        for number in range(20):
            call = stack.stub.Submit()
            await call.write(Page(batch=Spec(batch_id=f"b{number}"), lines=lines(2)))
            if ends == "cancelled":
                await asyncio.sleep(0.02)  # the page has come
                call.cancel()
            else:
                await call.done_writing()
                error = await failure(call)
                assert (error.code(), "complete is not set" in (error.details() or "")) == (BAD, True)
        await asyncio.sleep(0.1)
        assert not (await stack.stub.List(batch_pb2.ListBatchesRequest())).batches

    in_loop(tmp_path, scenario)


def test_a_stalled_upload_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_upload, "UPLOAD_TIMEOUT_S", 0.1)

    async def scenario(stack: Stack) -> None:
        call = stack.stub.Submit()
        await call.write(Page(batch=Spec(batch_id="b"), lines=lines(2)))
        assert (await failure(call)).code() is Code.DEADLINE_EXCEEDED
        assert (await failure(stack.get("b"))).code() is Code.NOT_FOUND

    in_loop(tmp_path, scenario)


def test_uploads_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 300
    monkeypatch.setattr("chiron_engine.cluster.batch_service.MAX_UPLOADS_BYTES", most)

    async def scenario(stack: Stack) -> None:
        space = stack.service._space
        first = stack.stub.Submit()
        await first.write(Page(batch=Spec(batch_id="first"), lines=lines(10), complete=True))
        while space._free == most:
            await asyncio.sleep(0.01)
        error = await failure(stack.submit(Spec(), lines(10)))
        assert (error.code(), error_code(error)) == (Code.RESOURCE_EXHAUSTED, "rate_limit_exceeded")
        await first.done_writing()
        assert (await first).lines.total == 10
        assert space._free == most
        assert (await stack.submit(Spec(), lines(10))).lines.total == 10

    in_loop(tmp_path, scenario)

"""The Batch service: batches in over gRPC, their results out, over the durable store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from chiron_engine.rpc.errors import RpcFailure, exhausted, invalid_argument, unavailable
from chiron_engine.rpc.v1 import batch_pb2, batch_pb2_grpc

from .batch_errors import (
    BatchConflict,
    BatchInvalid,
    BatchNotFound,
    BatchStoreFull,
    BatchTooLarge,
)
from .batch_messages import batch_info, line_result
from .batch_records import NewBatch, NewLine, Submitted, Withdrawn
from .batch_store import BatchStore
from .batch_store_thread import BatchStoreClosed, BatchStoreThread
from .batch_upload import CheckRequest, Upload, UploadSpace

BATCH_SERVICE = batch_pb2.DESCRIPTOR.services_by_name["Batch"].full_name
LIST_LIMIT, MAX_LIST_LIMIT = 20, 100
MAX_RESULTS = 1000
MAX_UPLOADS_BYTES = 1 << 30
FULL_RETRY_MS = 10_000

T = TypeVar("T")


class BatchListener(Protocol):
    """What the owner of the queue hears, on the event loop, once it is on the disk."""

    def on_submitted(self, submitted: Submitted) -> None:
        """A new batch; its lines wait to be run."""

    def on_withdrawn(self, withdrawn: Withdrawn) -> None:
        """Lines that wait no more, and running ones to stop; each of those is to be reported to the
        store with `stopped`, `finish`, `evict` or `requeue`."""


class BatchService(batch_pb2_grpc.BatchServicer):
    """Runs on one event loop."""

    def __init__(
        self,
        store: BatchStoreThread,
        listener: BatchListener,
        check: CheckRequest,
        wall_time: Callable[[], float] = time.time,
    ) -> None:
        """check: tells the lengths of a request, or raises RpcFailure where it cannot be run."""
        self._store = store
        self._listener = listener
        self._check = check
        self._wall_time = wall_time
        self._space = UploadSpace(MAX_UPLOADS_BYTES)
        self._changes: set[asyncio.Task[Any]] = set()

    async def Submit(
        self, requests: AsyncIterator[batch_pb2.SubmitBatchRequest], context: grpc.aio.ServicerContext
    ) -> batch_pb2.BatchInfo:
        now = self._wall_time()
        upload = Upload(self._check, self._store.limits, self._space, now)
        try:
            with _answered():
                batch = await upload.receive(requests)
                submitted = await self._change(self._submit(batch, upload.lines, now))
        finally:
            upload.release()
        return batch_info(submitted.batch)

    async def Get(
        self, request: batch_pb2.GetBatchRequest, context: grpc.aio.ServicerContext
    ) -> batch_pb2.BatchInfo:
        batch_id = _batch_id(request.batch_id)
        with _answered():
            return batch_info(await self._store.call(lambda store: store.get(batch_id)))

    async def List(
        self, request: batch_pb2.ListBatchesRequest, context: grpc.aio.ServicerContext
    ) -> batch_pb2.ListBatchesResponse:
        limit = _limit(request.limit, LIST_LIMIT, MAX_LIST_LIMIT)
        after = request.after or None
        with _answered():
            found = await self._store.call(lambda store: store.list(limit + 1, after))
        batches = [batch_info(batch) for batch in found[:limit]]
        return batch_pb2.ListBatchesResponse(batches=batches, has_more=len(found) > limit)

    async def Results(
        self, request: batch_pb2.ListResultsRequest, context: grpc.aio.ServicerContext
    ) -> batch_pb2.ListResultsResponse:
        batch_id = _batch_id(request.batch_id)
        after = request.after if request.HasField("after") else -1
        limit = _limit(request.limit, MAX_RESULTS, MAX_RESULTS)
        with _answered():
            page = await self._store.call(lambda store: store.results(batch_id, after, limit))
        return batch_pb2.ListResultsResponse(
            results=[line_result(result) for result in page.results], next_after=page.next_after
        )

    async def Cancel(
        self, request: batch_pb2.CancelBatchRequest, context: grpc.aio.ServicerContext
    ) -> batch_pb2.BatchInfo:
        batch_id = _batch_id(request.batch_id)
        with _answered():
            return await self._change(self._cancel(batch_id))

    async def _submit(self, batch: NewBatch, lines: list[NewLine], now: float) -> Submitted:
        submitted = await self._store.call(lambda store: store.submit(batch, lines, now))
        if submitted.is_new:
            self._listener.on_submitted(submitted)
        return submitted

    async def _cancel(self, batch_id: str) -> batch_pb2.BatchInfo:
        now = self._wall_time()

        def cancel(store: BatchStore) -> tuple[Withdrawn, batch_pb2.BatchInfo]:
            withdrawn = store.cancel(batch_id, now)
            return withdrawn, batch_info(store.get(batch_id))

        withdrawn, info = await self._store.call(cancel)
        self._listener.on_withdrawn(withdrawn)
        return info

    async def _change(self, change: Coroutine[Any, Any, T]) -> T:
        """Runs to its end where the client goes away: what is stored must be heard of."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)


@contextmanager
def _answered() -> Iterator[None]:
    """Raise the store's errors as what the client is told."""
    try:
        yield
    except BatchTooLarge as error:
        raise exhausted(str(error), "request_too_large", None) from None
    except BatchInvalid as error:
        raise invalid_argument(str(error)) from None
    except BatchNotFound as error:
        raise RpcFailure(grpc.StatusCode.NOT_FOUND, str(error), error_code="not_found") from None
    except BatchConflict as error:
        raise RpcFailure(grpc.StatusCode.ALREADY_EXISTS, str(error), error_code="already_exists") from None
    except BatchStoreFull as error:
        raise exhausted(str(error), "insufficient_storage", FULL_RETRY_MS) from None
    except BatchStoreClosed:
        raise unavailable("the server is shutting down and takes no new requests", "draining") from None


def _batch_id(batch_id: str) -> str:
    if not batch_id:
        raise invalid_argument("batch_id is empty; it must name a batch")
    return batch_id


def _limit(asked: int, default: int, most: int) -> int:
    if asked > most:
        raise invalid_argument(f"limit is {asked}; it must be at most {most}")
    return asked or default

"""Writes the chunks of one call to its client: one after another, and not for ever."""

from __future__ import annotations

import asyncio
from types import TracebackType

import grpc.aio

from chiron_engine.rpc.errors import exhausted
from chiron_engine.rpc.raw_handlers import send_headers
from chiron_engine.rpc.v1 import inference_pb2

from .write_guard import WriteGuard


class ChunkWriter:
    """A context around all writes of a call, which may come from several tasks. Raises RpcFailure in the
    task that entered where the client takes no byte for `limit_s` seconds."""

    __slots__ = ("_context", "_guard", "_has_sent_headers", "_limit_s", "_turn")

    def __init__(self, context: grpc.aio.ServicerContext, limit_s: float) -> None:
        self._context = context
        self._limit_s = limit_s
        self._guard = WriteGuard(limit_s)
        self._turn = asyncio.Lock()
        self._has_sent_headers = False

    async def __aenter__(self) -> ChunkWriter:
        await self._guard.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._guard.__aexit__(kind, error, trace)
        except TimeoutError:
            message = f"the client read nothing for {self._limit_s:.0f} s; the request was ended"
            raise exhausted(message, "slow_reader", None) from None

    async def write(self, chunk: inference_pb2.GenerateChunk) -> None:
        async with self._turn:
            if not self._has_sent_headers:
                await send_headers(self._context)
                self._has_sent_headers = True
            self._guard.began()
            await self._context.write(chunk)
            self._guard.ended()

"""Clients of the server: streams that are read all the time, and batches."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from chiron_engine.rpc.v1 import batch_pb2, types_pb2

from .server import LOOK_EVERY_S, Server
from .workload import Asked

LONGEST_PAUSE_S = 1.0
"""Between two streams of a client."""


@dataclass(slots=True)
class Stream:
    """What a client saw of one stream.

    finished: its last chunk said why it ended. completion_tokens: what that chunk counted. error: name
    of the gRPC status it ended with. cut: the server was killed while it ran.
    """

    asked: Asked
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    completion_tokens: int = 0
    error: str = ""
    cut: bool = False


async def ask(server: Server, asked: Asked) -> Stream:
    stream, life = Stream(asked), server.life
    try:
        async for chunk in server.inference.generate(asked.request()):
            stream.tokens += chunk.token_ids
            if chunk.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED:
                stream.finished = True
                stream.completion_tokens = chunk.usage.completion_tokens
    except grpc.aio.AioRpcError as error:
        stream.error = f"{error.code().name}: {error.details()}"
    stream.cut = server.life != life
    return stream


class Traffic:
    """So many clients, each with one stream at a time and a pause after it, until `stop`."""

    def __init__(
        self, server: Server, workload: Sequence[Asked], clients: int, chance: random.Random
    ) -> None:
        self.streams: list[Stream] = []
        self._chance = chance
        self._server = server
        self._next = itertools.cycle(workload)
        self._is_stopping = False
        self._clients = [asyncio.create_task(self._keep_asking()) for _ in range(clients)]

    async def stop(self) -> list[Stream]:
        """All streams, those under way read to their end."""
        self._is_stopping = True
        await asyncio.gather(*self._clients)
        return self.streams

    async def _keep_asking(self) -> None:
        while not self._is_stopping:
            await self._server.is_up.wait()
            self.streams.append(await ask(self._server, next(self._next)))
            await asyncio.sleep(self._chance.uniform(0.0, LONGEST_PAUSE_S))


@dataclass(frozen=True, slots=True)
class Batch:
    batch_id: str
    lines: Sequence[Asked]


class Batches:
    """One batch after another, so that there is always one that runs."""

    def __init__(self, server: Server, workload: Sequence[Asked], lines: int, name: str) -> None:
        """name: that their ids begin with."""
        self.batches: list[Batch] = []
        self._name = name
        self._server = server
        self._lines = [asked for asked, _ in zip(itertools.cycle(workload), range(lines), strict=False)]

    async def submit(self) -> None:
        batch = Batch(f"{self._name}-{len(self.batches)}", self._lines)
        lines = [asked.line(line_no) for line_no, asked in enumerate(batch.lines)]
        await self._server.batch.submit(batch_pb2.BatchSpec(batch_id=batch.batch_id), lines)
        self.batches.append(batch)

    async def wait_running(self) -> int:
        """How many lines of the last batch run, once some do; a new batch takes the place of one whose
        last line has begun."""
        while True:
            counts = (await self._server.batch.get(self.batches[-1].batch_id)).lines
            if not counts.queued and not counts.evicted:
                await self.submit()
            elif counts.running:
                return int(counts.running)
            await asyncio.sleep(LOOK_EVERY_S)

    async def results(self, batch: Batch, seconds: float) -> list[batch_pb2.LineResult]:
        """Those there are once it has ended, or after so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while not (await self._server.batch.get(batch.batch_id)).HasField("finished_at"):
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            pass  # lines without a result are found by whoever counts them
        return [result async for result in self._server.batch.results(batch.batch_id)]

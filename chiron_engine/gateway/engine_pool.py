"""A fixed set of engines without a coordinator: each request goes to the one with the least to do."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence

import grpc

from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.errors import RpcFailure, exhausted, unavailable
from chiron_engine.rpc.token_stream import Pause, TokenStream
from chiron_engine.rpc.v1 import engine_pb2

MAX_LOST_ATTEMPTS = 3
"""Engines that one request may lose before it is taken for the cause."""


class EnginePool:
    """An `EngineRouter`. A request whose engine is lost, or refuses it, goes on at another one."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._listeners: list[Callable[[], None]] = []
        self._keys = itertools.count(1)
        self._refused_by: dict[int, list[EngineLink]] = {}
        self._running_on: dict[int, EngineLink] = {}
        self.links = [EngineLink(address, self._changed) for address in addresses]

    @property
    def num_ready(self) -> int:
        return sum(link.is_ready for link in self.links)

    @property
    def hello(self) -> engine_pb2.Hello | None:
        known = [link.hello for link in self.links if link.hello is not None]
        return known[0] if known else None

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def start(self) -> None:
        for link in self.links:
            link.start()

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self.links))

    def submit(self, stream: TokenStream, received: float) -> None:
        stream.key = next(self._keys)
        self._run(stream)

    def paused(self, stream: TokenStream) -> None:
        pause, hello = stream.pause, self.hello
        assert pause is not None and hello is not None  # it ran
        link = self._running_on.pop(stream.key)
        if pause.rejected is not None or not pause.evicted:
            self._refused_by.setdefault(stream.key, []).append(link)
        if (reason := stream.end_of(hello)) is not None:
            stream.finish(engine_pb2.Finished(reason=reason))
        elif pause.rejected is None and not pause.evicted and stream.num_attempts >= MAX_LOST_ATTEMPTS:
            stream.fail(unavailable("every engine that served this request was lost", "engine_lost"))
        else:
            self._run(stream)

    def ended(self, stream: TokenStream) -> None:
        self._refused_by.pop(stream.key, None)
        self._running_on.pop(stream.key, None)

    def _run(self, stream: TokenStream) -> None:
        link = self._least_loaded(self._refused_by.get(stream.key, ()))
        if link is not None:
            self._running_on[stream.key] = link
            link.run(stream)
            return
        stream.fail(_failure(stream.pause))

    def _least_loaded(self, excluded: Sequence[EngineLink]) -> EngineLink | None:
        """Ties go to any of them."""
        candidates = [link for link in self.links if link.is_ready and link not in excluded]
        return min(candidates, key=lambda link: (link.outstanding, random.random()), default=None)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _failure(pause: Pause | None) -> RpcFailure:
    """Nobody is left to run a request that last paused like this."""
    if pause is None:
        return unavailable("no engine is ready; try again shortly", "server_is_overloaded")
    if pause.rejected is None:
        return unavailable("the engine that served this request was lost; send it again", "engine_lost")
    message, hint = pause.rejected.message, pause.rejected.retry_after_ms
    if pause.rejected.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
        return exhausted(message, "rate_limit_exceeded", hint or None)
    return unavailable(message, "server_is_overloaded", hint)

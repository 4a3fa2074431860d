"""The tokens of one request on their way from an engine to the client's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from .v1 import engine_pb2

# Tokens that may wait for a client that does not read: some 64 KiB of text.
MAX_PENDING_TOKENS = 1 << 14


@dataclass(slots=True)
class TokenTimes:
    """Arrival times at the gateway, on `time.monotonic`. Tokens of one message share one arrival."""

    first: float = 0.0
    last: float = 0.0
    longest_gap: float = 0.0
    count: int = 0

    def add(self, now: float) -> None:
        if self.count == 0:
            self.first = now
        else:
            self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now
        self.count += 1


class TokenStream:
    """One attempt of one request on one engine. Exactly one of `finished`, `rejected` and `lost`
    is set when it has ended, and it stays readable then."""

    def __init__(self, handle: int, prompt_tokens: int, abort: Callable[[TokenStream], None]) -> None:
        self.handle = handle
        self.prompt_tokens = prompt_tokens
        self.times = TokenTimes()
        self.finished: engine_pb2.Finished | None = None
        self.rejected: engine_pb2.Rejected | None = None
        self.lost = False
        self.overflowed = False
        self._abort = abort
        self._pending: list[int] = []
        self._ready = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return self.lost or self.finished is not None or self.rejected is not None

    async def next(self) -> list[int]:
        """The tokens that came since the last call, waiting for some unless the stream has ended
        (then possibly none)."""
        await self._ready.wait()
        if not self.has_ended:
            self._ready.clear()
        tokens, self._pending = self._pending, []
        return tokens

    async def wait_ended(self) -> None:
        while not self.has_ended:
            await self.next()

    def abort(self) -> None:
        """Tell the engine to end the request; the stream ends when the engine says so."""
        if not self.has_ended:
            self._abort(self)

    def push(self, token: int, now: float) -> None:
        self.times.add(now)
        self._pending.append(token)
        if len(self._pending) > MAX_PENDING_TOKENS and not self.overflowed:
            self.overflowed = True
            self.abort()
        self._ready.set()

    def finish(self, finished: engine_pb2.Finished) -> None:
        self.finished = finished
        self._ready.set()

    def reject(self, rejected: engine_pb2.Rejected) -> None:
        self.rejected = rejected
        self._ready.set()

    def lose(self) -> None:
        """The engine, or the connection to it, is gone."""
        self.lost = True
        self._ready.set()

"""Ends a client's stream when one write to it takes too long, with no timer of its own for each write."""

from __future__ import annotations

import asyncio
from types import TracebackType


class WriteGuard:
    """A context around all writes of one stream. `began` and `ended` go around each of them; a write under
    way for `limit_s` seconds raises TimeoutError in the task that entered.

    A timeout for each write would cost a tenth of what relaying a token does. Here one timer looks every
    `limit_s`, or when the write that it finds under way would be due: no write that is overdue is seen late.
    """

    __slots__ = ("_began", "_limit_s", "_loop", "_timeout", "_timer")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began: float | None = None
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> WriteGuard:
        await self._timeout.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._limit_s, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def began(self) -> None:
        self._began = self._loop.time()

    def ended(self) -> None:
        self._began = None

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._began is None else self._began) + self._limit_s
        if now >= due:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)

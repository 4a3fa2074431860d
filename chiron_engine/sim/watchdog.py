"""Notices that a simulation will never end."""

from __future__ import annotations

from .request_book import LiveRequest, RequestBook

IDLE_S = 600.0
FRUITLESS_S = 6 * 3600.0
NAMED = 8


class Stuck(RuntimeError):
    """Requests are left that nobody serves."""


class Watchdog:
    """Looks on at every tick. A fleet may well leave batch work alone until its deadline is near,
    so only overdue requests count: while nothing at all has happened for IDLE_S and ten load times,
    or none was served for FRUITLESS_S."""

    def __init__(self, book: RequestBook, load_time_s: float) -> None:
        self._book = book
        self._idle_s = max(IDLE_S, 10.0 * load_time_s)
        self._busy_at = 0.0
        self._served_at = 0.0
        self._unserved = book.unserved

    def look(self, now: float, busy: bool, instances: int) -> None:
        """`busy`: whether any instance is loading or running a step. Raises Stuck."""
        if busy or not self._book.live:
            self._busy_at = now
        if self._book.unserved != self._unserved or not self._book.live:
            self._unserved = self._book.unserved
            self._served_at = now
        if now - self._busy_at < self._idle_s and now - self._served_at < FRUITLESS_S:
            return
        if any(now > _due(live) + self._idle_s for live in self._book.live.values()):
            raise Stuck(_message([*self._book.live], now, instances))


def _due(live: LiveRequest) -> float:
    if live.slo.deadline is not None:
        return live.slo.deadline
    return live.arrival + live.slo.ttft_s + live.output_tokens * live.slo.itl_s


def _message(left: list[int], now: float, instances: int) -> str:
    names = ", ".join(str(request_id) for request_id in left[:NAMED])
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return (
        f"nothing serves the {len(left)} requests that are left at {now:.0f} s (ids {names}{more}) though "
        f"they are overdue; there are {instances} instances now, and some must be started and last long "
        "enough to serve"
    )

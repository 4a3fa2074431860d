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
        overdue = [live for live in self._book.live.values() if now > _due(live) + self._idle_s]
        if overdue:
            raise Stuck(_message(overdue, now, instances))


def _due(live: LiveRequest) -> float:
    if live.slo.deadline is not None:
        return live.slo.deadline
    return live.arrival + live.slo.ttft_s + live.output_tokens * live.slo.itl_s


def _message(overdue: list[LiveRequest], now: float, instances: int) -> str:
    names = ", ".join(str(live.request_id) for live in overdue[:NAMED])
    more = f" and {len(overdue) - NAMED} more" if len(overdue) > NAMED else ""
    return (
        f"{len(overdue)} requests are overdue at {now:.0f} s and nothing serves them (ids {names}{more}); "
        f"the policy keeps {instances} instances, and it must keep or start one that can"
    )

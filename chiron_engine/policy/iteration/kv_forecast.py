"""The most KV that running requests will hold together, by how long each is predicted to run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from .request import Request

KEEP_STEPS = 64
"""Predictions are made anew after so many steps: those that live on are then known to be longer."""

Predict = Callable[[Request, int], int]
Entry = tuple[int, int, int, Request]


class KvForecast:
    """Running requests in the order they are predicted to end.

    A request with k tokens at step s holds k + (t - s) at a later step t, up to its end: an entry
    keeps its end and k - s, which does not change while it runs. The most held together is held when
    one of them is about to end: the sum of k - s over those that live then, plus their number times t.
    Every request may waste part of its last block.

    remaining: how many more tokens a request is predicted to produce from a step on.
    """

    __slots__ = ("_built", "_entries", "_remaining", "_total", "_waste", "_where")

    def __init__(self, block_size: int, remaining: Predict) -> None:
        self._remaining = remaining
        self._waste = block_size - 1
        self._built: int | None = None
        self._entries: list[Entry] = []
        self._where: dict[Request, tuple[int, int]] = {}
        self._total = 0

    def fits(self, newcomer: Request, running: dict[Request, None], step: int, capacity: int) -> bool:
        """Whether the running requests and `newcomer` stay within `capacity` tokens, as predicted."""
        if self._built is None or step - self._built >= KEEP_STEPS:
            self._build(running, step)
        self._renew_overdue(step)
        start = newcomer.tokens_at(step) - step + self._waste
        end = step + self._remaining(newcomer, step)
        return self._peak_fits(start, end, step, capacity)

    def join(self, request: Request, step: int) -> None:
        """It runs from now on. Costs nothing while nobody asks."""
        if self._built is None:
            return
        if step - self._built >= 2 * KEEP_STEPS:
            self._forget()
            return
        self._add(request, step)

    def leave(self, request: Request) -> None:
        where = self._where.pop(request, None)
        if where is None:
            return
        entry = self._entries.pop(bisect_left(self._entries, where, key=_place))
        self._total -= entry[2]

    def _peak_fits(self, start: int, end: int, step: int, capacity: int) -> bool:
        """Go through the ends in order, the newcomer (`start` + t tokens until `end`) among them."""
        total, count = self._total + start, len(self._entries) + 1
        comes = False
        for ends_at, _, offset, _ in self._entries:
            if not comes and ends_at >= end:
                comes = True
                if total + count * end > capacity:
                    return False
                total -= start
                count -= 1
            if total + count * ends_at > capacity:
                return False
            total -= offset
            count -= 1
        return comes or total + count * end <= capacity

    def _build(self, running: dict[Request, None], step: int) -> None:
        self._forget()
        self._built = step
        for request in running:
            self._add(request, step)

    def _forget(self) -> None:
        self._built = None
        self._entries, self._where, self._total = [], {}, 0

    def _add(self, request: Request, step: int) -> None:
        offset = request.tokens_at(step) - step + self._waste
        where = (step + self._remaining(request, step), request.request_id)
        self._where[request] = where
        insort(self._entries, (*where, offset, request))
        self._total += offset

    def _renew_overdue(self, step: int) -> None:
        """Those that should have ended by now live longer."""
        while self._entries and self._entries[0][0] < step:
            request = self._entries[0][3]
            self.leave(request)
            self._add(request, step)


def _place(entry: Entry) -> tuple[int, int]:
    return entry[:2]

"""Requests waiting for a place, in the order they will be served."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from .request import Request

Priority = tuple[int, float, int]


def priority(request: Request) -> Priority:
    """Service order, smallest first: class, then arrival, then id."""
    return (int(request.slo.slo_class), request.arrival, request.request_id)


class WaitingQueue:
    """Sorted by priority. The head is at the end of the list, so taking it costs O(1); a request
    that comes back after a preemption keeps the place its arrival gives it."""

    __slots__ = ("_entries", "num_tokens")

    def __init__(self) -> None:
        self._entries: list[tuple[Priority, Request]] = []
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in reversed(self._entries))

    @property
    def head(self) -> Request | None:
        return self._entries[-1][1] if self._entries else None

    def push(self, request: Request) -> None:
        self._entries.insert(self._index(request), (priority(request), request))
        self.num_tokens += len(request.prompt_ids)

    def pop(self) -> Request:
        _, request = self._entries.pop()
        self.num_tokens -= len(request.prompt_ids)
        return request

    def remove(self, request: Request) -> None:
        index = self._index(request)
        if index == len(self._entries) or self._entries[index][1] is not request:
            raise ValueError(f"request {request.request_id} is not waiting")
        del self._entries[index]
        self.num_tokens -= len(request.prompt_ids)

    def _index(self, request: Request) -> int:
        rank, request_arrival, request_id = priority(request)
        return bisect_left(
            self._entries,
            (-rank, -request_arrival, -request_id),
            key=lambda entry: (-entry[0][0], -entry[0][1], -entry[0][2]),
        )

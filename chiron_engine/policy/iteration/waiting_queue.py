"""Requests waiting for a place, in the order they will be served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from .request import Request, SloClass

Priority = tuple[int, float, int]
Entry = tuple[int, float, int, Request]


def priority(request: Request) -> Priority:
    """Service order, smallest first: class, then arrival, then id."""
    return (int(request.slo.slo_class), request.arrival, request.request_id)


class WaitingQueue:
    """Sorted by priority. The head is at the end of the list, so taking it costs O(1); a request
    that comes back after a preemption keeps the place its arrival gives it.

    num_tokens: known tokens of all of them, prompts and what they had produced;
    num_interactive_tokens: of the interactive ones.
    """

    __slots__ = ("_entries", "num_interactive_tokens", "num_tokens")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self.num_tokens = 0
        self.num_interactive_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in reversed(self._entries))

    @property
    def head(self) -> Request | None:
        return self._entries[-1][3] if self._entries else None

    def push(self, request: Request) -> None:
        insort(self._entries, _entry(request))
        self._count(request, _known_tokens(request))

    def pop(self) -> Request:
        request = self._entries.pop()[3]
        self._count(request, -_known_tokens(request))
        return request

    def remove(self, request: Request) -> None:
        """Raises ValueError when it is not here."""
        index = bisect_left(self._entries, _entry(request)[:3], key=lambda entry: entry[:3])
        if index == len(self._entries) or self._entries[index][3] is not request:
            raise ValueError(f"request {request.request_id} is not waiting")
        del self._entries[index]
        self._count(request, -_known_tokens(request))

    def _count(self, request: Request, tokens: int) -> None:
        self.num_tokens += tokens
        if request.slo.slo_class is SloClass.INTERACTIVE:
            self.num_interactive_tokens += tokens


def _known_tokens(request: Request) -> int:
    return len(request.prompt_ids) + request.num_planned_outputs


def _entry(request: Request) -> Entry:
    """Ascending entries are descending priorities. Ids differ, so requests are never compared."""
    return (-int(request.slo.slo_class), -request.arrival, -request.request_id, request)

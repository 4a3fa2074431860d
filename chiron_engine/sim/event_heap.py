"""What is to happen, in order of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Handler = Callable[[Any], None]
STEPS_LAST = 1 << 60
"""Sequence numbers of step completions: at one moment they come after all else, by instance."""


class EventHeap:
    """Events of one moment come in the order they were added, step completions of engines last and
    by instance, whenever they were added."""

    __slots__ = ("_heap", "_sequence", "now")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Handler, Any]] = []
        self._sequence = 0
        self.now = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, handler: Handler, payload: Any) -> None:
        self._sequence += 1
        heappush(self._heap, (when, self._sequence, handler, payload))

    def add_step(self, when: float, instance_id: int, handler: Handler, payload: Any) -> None:
        """At most one at a time for each instance."""
        heappush(self._heap, (when, STEPS_LAST + instance_id, handler, payload))

    def next_time(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def run_next(self) -> None:
        self.now, _, handler, payload = heappop(self._heap)
        handler(payload)

"""The global queue of batch requests: earliest deadline first across groups, first come first
served inside one; evicted requests wait for the instance that keeps their KV."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from .instances import Tracked
from .request_groups import RequestGroup, group_range

HOME_PATIENCE_S = 5.0
"""How long an evicted request waits for the instance that keeps its KV: elsewhere all of it, prompt
and output, would be computed anew."""


class BatchQueue:
    """Requests wait in their group, or, while an instance keeps their KV, in that instance's own
    queue, from which others take them only after HOME_PATIENCE_S."""

    def __init__(self, lead_s: float) -> None:
        self._lead_s = lead_s
        self._groups: dict[tuple[float, float], RequestGroup] = {}
        self._order: list[tuple[float, float, int, RequestGroup]] = []
        self._num_groups = 0
        self._saved: dict[int, deque[Tracked]] = {}
        self._by_eviction: deque[tuple[float, Tracked]] = deque()
        self.num_queued = 0

    def groups(self) -> Iterable[RequestGroup]:
        """Groups with unfinished requests, the earliest deadline first."""
        return sorted(self._groups.values(), key=lambda group: (group.start, group.width))

    def join(self, tracked: Tracked, deadline: float, now: float) -> None:
        """A new request enters the group of its deadline, for good."""
        start, width = group_range(deadline, deadline - now, self._lead_s)
        group = self._groups.get((start, width))
        if group is None:
            self._num_groups += 1
            group = self._groups[start, width] = RequestGroup(start, width, self._num_groups)
        group.due = min(group.due, deadline)
        tracked.group = group
        group.waiting.append(tracked)
        self._enqueue(tracked, group)
        self._put_in_order(group)

    def come_back(self, tracked: Tracked, produced: int, home: int | None, now: float) -> None:
        """A request that left an instance unfinished, with so many output tokens, before those that
        never ran. `home` keeps its KV."""
        group = _group_of(tracked)
        group.running.add(tracked.request, -1)
        tracked.request.produced = produced
        tracked.request.home = home
        tracked.evicted_at = now
        self._enqueue(tracked, group)
        if home is None:
            group.waiting.appendleft(tracked)
            self._put_in_order(group)
            return
        self._saved.setdefault(home, deque()).append(tracked)
        self._by_eviction.append((now, tracked))

    def peek(self, instance_id: int, now: float) -> Tracked | None:
        """What this instance should run next: what it keeps the KV of, else the first in order, or
        one that has waited for its home for long and is due no later."""
        own = self._saved.get(instance_id)
        while own:
            if _still_at(own[0], instance_id):
                return own[0]
            own.popleft()
        first = self._first_in_order()
        patient = self._longest_evicted()
        if patient is None or now - patient.evicted_at < HOME_PATIENCE_S:
            return first
        if first is None or _group_of(patient).start <= _group_of(first).start:
            return patient
        return first

    def take(self, tracked: Tracked) -> None:
        """The request was given to an instance."""
        group = _group_of(tracked)
        if group.waiting and group.waiting[0] is tracked:
            group.waiting.popleft()
        self._dequeue(tracked, group)
        group.running.add(tracked.request)
        tracked.request.home = None

    def leave(self, tracked: Tracked) -> None:
        """The request ended, in the queue or on an instance."""
        group = _group_of(tracked)
        if tracked.is_queued:
            self._dequeue(tracked, group)
        else:
            group.running.add(tracked.request, -1)
        if group.is_over:
            self._groups.pop((group.start, group.width), None)

    def release_saved(self, instance_id: int) -> list[Tracked]:
        """The KV kept by this instance is gone or to be dropped: its requests join their groups."""
        released = [t for t in self._saved.pop(instance_id, ()) if _still_at(t, instance_id)]
        for tracked in reversed(released):
            tracked.request.home = None
            group = _group_of(tracked)
            group.waiting.appendleft(tracked)
            self._put_in_order(group)
        return released

    def _enqueue(self, tracked: Tracked, group: RequestGroup) -> None:
        tracked.is_queued = True
        group.queued.add(tracked.request)
        self.num_queued += 1

    def _dequeue(self, tracked: Tracked, group: RequestGroup) -> None:
        tracked.is_queued = False
        group.queued.add(tracked.request, -1)
        self.num_queued -= 1

    def _put_in_order(self, group: RequestGroup) -> None:
        if not group.in_order:
            group.in_order = True
            heapq.heappush(self._order, (group.start, group.width, group.number, group))

    def _first_in_order(self) -> Tracked | None:
        """Entries of requests taken or ended meanwhile are dropped when they come to the front."""
        while self._order:
            group = self._order[0][3]
            while group.waiting:
                tracked = group.waiting[0]
                if tracked.is_queued and tracked.request.home is None:
                    return tracked
                group.waiting.popleft()
            group.in_order = False
            heapq.heappop(self._order)
        return None

    def _longest_evicted(self) -> Tracked | None:
        while self._by_eviction:
            evicted_at, tracked = self._by_eviction[0]
            if tracked.is_queued and tracked.request.home is not None and tracked.evicted_at == evicted_at:
                return tracked
            self._by_eviction.popleft()
        return None


def _still_at(tracked: Tracked, instance_id: int) -> bool:
    return tracked.is_queued and tracked.request.home == instance_id


def _group_of(tracked: Tracked) -> RequestGroup:
    assert tracked.group is not None, "a batch request has a group from its arrival on"
    return tracked.group

"""Which instance an interactive request goes to (section 3 of the paper: packing, own type first,
then mixed), and whether an instance has room for batch work."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from .capacity import CapacityModel
from .config import FleetConfig
from .instances import Instance, Tracked
from .load_index import LoadIndex
from .messages import FleetRequest, Role

CANDIDATES = 4
"""Instances with room that are looked at for one with time for the prompt, whatever the fleet's size."""
MOST_PREFIXES = 100_000
"""Prefixes whose instance is remembered; the one used longest ago is forgotten first."""
PREFILL_SHARE = 0.5
"""Of the TTFT slack, what the prompts before it on an instance may take."""
LOOKAHEAD = 4
"""Batch requests that may wait in an engine, so that a finish is followed by a join at once. Few,
for what waits there can be neither reordered nor moved."""
SERVING = (Role.INTERACTIVE, Role.MIXED)


class Router:
    """An index of open instances by role, ITL target and load, and the choice over it.

    Interactive: the fullest interactive instance with u + du <= 1 and time for its prompt, then the
    fullest such mixed one, which evicts batch for it. Both only where the instance's ITL target is
    at most the request's, the loosest such target first.
    """

    def __init__(self, config: FleetConfig, model: CapacityModel) -> None:
        self._targets = config.itl_targets_s
        self._model = model
        self._indices = {(target, role): LoadIndex() for target in self._targets for role in SERVING}
        self._by_prefix: dict[object, Instance] = {}

    def refresh(self, instance: Instance) -> None:
        """Role, state or load of the instance changed."""
        if instance.is_open and instance.role is not Role.BATCH:
            self._indices[instance.target_s, instance.role].put(instance)

    def discard(self, instance: Instance) -> None:
        """Before its role or target changes, and when it may be given nothing more."""
        if instance.bucket >= 0:
            self._indices[instance.target_s, instance.role].discard(instance)

    def target_for(self, itl_s: float) -> float | None:
        """The loosest ITL target on offer that is at most the request's."""
        fitting = [target for target in self._targets if target <= itl_s]
        return fitting[-1] if fitting else None

    def pick_interactive(self, tracked: Tracked, now: float) -> Instance | None:
        """None when no interactive or mixed instance has room for it."""
        request = tracked.request
        preferred = self._by_prefix.get(request.prefix) if request.prefix is not None else None
        for target in reversed(self._targets):
            if target > request.slo.itl_s:
                continue
            share = self._model.share(tracked.added_s, tracked.kv_tokens, target)
            if preferred is not None and self._suits(preferred, tracked, target, share, now):
                return preferred
            for role in SERVING:
                for instance in self._candidates(self._indices[target, role], 1.0 - share):
                    if self._is_in_time(instance, request, now):
                        return instance
        return None

    def emptiest(self, itl_s: float) -> Instance | None:
        """The least loaded instance that keeps the request's ITL target, full or not."""
        found = [
            instance
            for (target, _), index in self._indices.items()
            if target <= itl_s and (instance := index.emptiest()) is not None
        ]
        return min(found, key=lambda instance: (instance.load, instance.instance_id), default=None)

    def sent(self, tracked: Tracked, instance: Instance, now: float) -> None:
        """The interactive request goes there: its prompt is computed after those before it, and whoever
        shares its prefix had better follow."""
        request = tracked.request
        prefill_s = self._prefill_s(request, instance.target_s)
        instance.prefilled_at = max(now, instance.prefilled_at) + prefill_s
        if request.prefix is not None:
            self._by_prefix.pop(request.prefix, None)
            self._by_prefix[request.prefix] = instance
            if len(self._by_prefix) > MOST_PREFIXES:
                del self._by_prefix[next(iter(self._by_prefix))]

    def has_batch_room(self, instance: Instance, added_s: float, kv_tokens: float) -> bool:
        """Whether batch work fits beside what the instance has: by KV at its mean and by the
        engine's own limit, a few waiting requests over it, and beside interactive work also by
        time at the ITL target."""
        if not instance.is_open or instance.role is Role.INTERACTIVE or instance.batch_paused:
            return False
        running = len(instance.interactive) + len(instance.batch)
        if not running:
            return True
        if running >= instance.max_running + LOOKAHEAD:
            return False
        if instance.interactive_kv + instance.batch_kv + kv_tokens > instance.kv_capacity:
            return False
        added = instance.interactive_added_s + instance.batch_added_s + added_s
        room = instance.room_s if instance.interactive else self._model.room_s(self._model.batch_itl_s)
        return added <= room

    def _candidates(self, index: LoadIndex, most_load: float) -> Iterator[Instance]:
        """The fullest few, and where those have too many prompts to compute, the emptiest."""
        yield from islice(index.fullest_first(most_load), CANDIDATES)
        last = index.emptiest()
        if last is not None and last.load <= most_load:
            yield last

    def _suits(self, instance: Instance, tracked: Tracked, target: float, share: float, now: float) -> bool:
        """Prefix affinity chooses among busy instances that have room: it opens no idle or closed one."""
        return (
            instance.is_busy
            and instance.target_s == target
            and instance.load + share <= 1.0
            and self._is_in_time(instance, tracked.request, now)
        )

    def _is_in_time(self, instance: Instance, request: FleetRequest, now: float) -> bool:
        """The prompts routed there before leave it the time for its first token."""
        waits = instance.prefilled_at - now
        if waits <= 0:
            return True
        slack = request.arrival + request.slo.ttft_s - now
        return waits + self._prefill_s(request, instance.target_s) <= PREFILL_SHARE * slack

    def _prefill_s(self, request: FleetRequest, target_s: float) -> float:
        """Seconds until a prompt is computed in steps of the ITL target that hold prompts only."""
        costs = self._model.costs
        compute = costs.prefill_s(request.prompt_tokens + request.produced)
        return compute * target_s / self._model.room_s(target_s)

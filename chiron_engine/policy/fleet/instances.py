"""Book-keeping of one instance, and of all of them by role and state."""

from __future__ import annotations

from collections.abc import Iterable

from .messages import FleetRequest, InstanceState, Role
from .request_groups import RequestGroup


class Tracked:
    """An accepted request and where it is: on `instance`, else queued in its `group` (batch) or
    held (interactive).

    group: set for a batch request from its arrival on, None for an interactive one. added_s,
    kv_tokens: seconds a step (`CapacityModel.added_s`) and KV that its instance counts for it.
    force_at: until when an interactive request is held for an instance with room; then the least
    loaded one takes it. evicted_at: when a batch request last came back.
    """

    __slots__ = (
        "added_s",
        "evicted_at",
        "force_at",
        "group",
        "instance",
        "is_queued",
        "kv_tokens",
        "request",
    )

    def __init__(self, request: FleetRequest) -> None:
        self.request = request
        self.instance: Instance | None = None
        self.group: RequestGroup | None = None
        self.is_queued = False
        self.added_s = 0.0
        self.kv_tokens = 0.0
        self.force_at = 0.0
        self.evicted_at = 0.0


class Instance:
    """Role, state and load of one instance.

    load: u, the largest of three shares that its interactive requests take: seconds they add to a
    step over those an ITL target leaves (`room_s`), KV over KV capacity, requests over slots. u = 1
    is a full instance. What batch requests take is counted apart and is no part of u: they give way.

    closing: not needed any more; it is given nothing, and drained once empty or after a while.
    batch_paused: it handed batch work back, so its limits are unknown until it reports. batch_since:
    when it last got batch work after having none. reported_at, batch_tokens_total, max_running: of
    its last report. prefilled_at: when the prompts routed to it should be computed. is_initial:
    there from the start, so that its load time tells nothing. bucket: place in a `LoadIndex`, -1
    outside of it.
    """

    __slots__ = (
        "batch", "batch_added_s", "batch_kv", "batch_paused", "batch_since", "batch_tokens_total", "bucket",
        "closing", "closing_since", "instance_id", "interactive", "interactive_added_s", "interactive_kv",
        "is_initial", "kv_capacity", "launched_at", "load", "max_running", "max_slots", "prefilled_at",
        "reported_at", "role", "room_s", "state", "target_s",
    )  # fmt: skip

    def __init__(
        self, instance_id: int, role: Role, target_s: float, kv_capacity: float, max_slots: int, now: float
    ) -> None:
        self.instance_id = instance_id
        self.role = role
        self.target_s = target_s
        self.kv_capacity = kv_capacity
        self.max_slots = max_slots
        self.launched_at = now
        self.state = InstanceState.LOADING
        self.is_initial = False
        self.closing = False
        self.closing_since = 0.0
        self.interactive: dict[int, Tracked] = {}
        self.batch: dict[int, Tracked] = {}
        self.interactive_added_s = 0.0
        self.interactive_kv = 0.0
        self.batch_added_s = 0.0
        self.batch_kv = 0.0
        self.batch_paused = False
        self.batch_since = 0.0
        self.batch_tokens_total = 0
        self.reported_at = now
        self.max_running = max_slots
        self.prefilled_at = 0.0
        self.room_s = 1.0
        self.load = 0.0
        self.bucket = -1

    @property
    def is_open(self) -> bool:
        """It may be given requests."""
        return self.state is InstanceState.READY and not self.closing

    @property
    def is_busy(self) -> bool:
        """It may be given interactive requests, and has some: idle ones are in bucket 0 of the index."""
        return self.bucket > 0

    @property
    def is_empty(self) -> bool:
        return not (self.interactive or self.batch)

    def add_interactive(self, tracked: Tracked) -> None:
        self.interactive[tracked.request.request_id] = tracked
        self.interactive_added_s += tracked.added_s
        self.interactive_kv += tracked.kv_tokens
        tracked.instance = self
        self.refresh_load()

    def remove_interactive(self, tracked: Tracked) -> None:
        del self.interactive[tracked.request.request_id]
        tracked.instance = None
        if self.interactive:
            self.interactive_added_s -= tracked.added_s
            self.interactive_kv -= tracked.kv_tokens
        else:
            # Sums of differences drift; an empty instance is a chance to start over.
            self.interactive_added_s = self.interactive_kv = 0.0
        self.refresh_load()

    def add_batch(self, tracked: Tracked) -> None:
        self.batch[tracked.request.request_id] = tracked
        self.batch_added_s += tracked.added_s
        self.batch_kv += tracked.kv_tokens
        tracked.instance = self

    def remove_batch(self, tracked: Tracked) -> None:
        del self.batch[tracked.request.request_id]
        tracked.instance = None
        if self.batch:
            self.batch_added_s -= tracked.added_s
            self.batch_kv -= tracked.kv_tokens
        else:
            self.batch_added_s = self.batch_kv = 0.0

    def refresh_load(self) -> None:
        time_share = self.interactive_added_s / self.room_s
        kv_share = self.interactive_kv / self.kv_capacity
        slot_share = len(self.interactive) / self.max_slots
        self.load = max(time_share, kv_share, slot_share, 0.0)


class Instances:
    """All instances by id in order of launch, and the ready ones by role."""

    def __init__(self) -> None:
        self.by_id: dict[int, Instance] = {}
        self.ready: dict[Role, dict[int, Instance]] = {role: {} for role in Role}
        self.num_loading = 0
        self.num_draining = 0
        self.next_id = 0

    def __len__(self) -> int:
        return len(self.by_id)

    def launch(self, role: Role, target_s: float, kv_capacity: float, max_slots: int, now: float) -> Instance:
        instance = Instance(self.next_id, role, target_s, kv_capacity, max_slots, now)
        self.next_id += 1
        self.by_id[instance.instance_id] = instance
        self.num_loading += 1
        return instance

    def set_ready(self, instance: Instance) -> None:
        self.num_loading -= 1
        instance.state = InstanceState.READY
        self.ready[instance.role][instance.instance_id] = instance

    def set_draining(self, instance: Instance) -> None:
        self._leave_state(instance)
        instance.state = InstanceState.DRAINING
        self.num_draining += 1

    def set_role(self, instance: Instance, role: Role, target_s: float) -> None:
        if instance.state is InstanceState.READY:
            del self.ready[instance.role][instance.instance_id]
            self.ready[role][instance.instance_id] = instance
        instance.role = role
        instance.target_s = target_s

    def remove(self, instance: Instance) -> None:
        self._leave_state(instance)
        del self.by_id[instance.instance_id]

    def staying(self) -> Iterable[Instance]:
        """Loading and ready instances, in order of launch; those that close are among them."""
        return [i for i in self.by_id.values() if i.state is not InstanceState.DRAINING]

    def _leave_state(self, instance: Instance) -> None:
        if instance.state is InstanceState.LOADING:
            self.num_loading -= 1
        elif instance.state is InstanceState.READY:
            del self.ready[instance.role][instance.instance_id]
        else:
            self.num_draining -= 1

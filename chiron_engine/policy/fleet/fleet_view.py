"""What a global autoscaler sees of the fleet and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .request_groups import GroupWork
from .waiting_time import Throughput


@dataclass(frozen=True, slots=True)
class PoolView:
    """Interactive and mixed instances of one ITL target. instances: those loading or ready, but
    not the ones that close. busy_instances: those with an interactive request. load: sum of u, each
    up to 1. arrived_work_s, arrived_squares, arrived_load: work of the interactive requests that came
    since the last tick, in seconds of one full instance, the sum of its squares, and the u they
    take. backlog: u of what is held or over 1 on an instance, in bounds. loading: instances not
    ready yet; next_ready_s: seconds until the first of them is, or one launched now."""

    target_s: float
    instances: int
    busy_instances: int
    load: float
    arrived_work_s: float = 0.0
    arrived_squares: float = 0.0
    backlog: float = 0.0
    arrived_load: float = 0.0
    loading: int = 0
    next_ready_s: float = 0.0

    @property
    def ready(self) -> int:
        return self.instances - self.loading


@dataclass(frozen=True, slots=True)
class BatchView:
    """Batch work and what serves it. groups: in order of deadline, what runs included.
    throughput: of ready and loading batch instances and of mixed ones. queued: requests without an
    instance."""

    groups: Sequence[GroupWork]
    throughput: Throughput
    queued: int

    @property
    def instances(self) -> int:
        return len(self.throughput.ready_in)


@dataclass(frozen=True, slots=True)
class FleetView:
    """One moment. lead_s: load lead L, from deciding on an instance to having it. most: instances
    the GPU cap allows in all. least: interactive and mixed instances kept at any load."""

    now: float
    lead_s: float
    most: int
    pools: Sequence[PoolView]
    batch: BatchView
    least: int = 1


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """Instances to have for one ITL target."""

    target_s: float
    interactive: int
    mixed: int

    @property
    def total(self) -> int:
        return self.interactive + self.mixed


@dataclass(frozen=True, slots=True)
class Decision:
    """How many instances of each role to have, loading ones included, and the control quantities
    it came from. busy: D, or what else the autoscaler counts as busy; interactive_backpressure: IBP,
    that over interactive and mixed instances; batch_backpressure: BBP, late request groups."""

    pools: tuple[PoolTarget, ...]
    batch: int
    busy: float
    theta: float
    interactive_backpressure: float
    batch_backpressure: int


class GlobalAutoscaler(Protocol):
    """Called once a tick. It remembers what it needs of the past."""

    def decide(self, view: FleetView) -> Decision: ...

"""Baselines: the global autoscaler as the paper has it (section 5, Algorithm 2), repaired and to the
letter.

Both report as busy the instances that run any interactive request, and IBP as their share. Both keep
`min_instances` for each ITL target, and know neither load times nor how many batch instances would
do: every tick with a late group asks for one more than there are, loading ones included, and an
empty queue for none.
"""

from __future__ import annotations

import math

from .fleet_view import BatchView, Decision, FleetView, PoolTarget, PoolView
from .waiting_time import late_groups

THETA = 1.0 / 3.0
"""The paper's example: spikes of three times the usual load."""
DEAD_BAND = 0.25
"""Instances of load by which it must have fallen below a whole number before instances go."""


class PaperAutoscaler:
    """Algorithm 2 in closed form, N = ceil(busy / Theta), with a dead band downwards and Theta fixed.
    Instances that run an interactive request are more under spreading, so N is
    set by ceil(sum of u) instead: how many it would take, packed."""

    def decide(self, view: FleetView) -> Decision:
        return _decide(view, [self._pool(pool, view.least) for pool in view.pools])

    def _pool(self, pool: PoolView, least: int) -> PoolTarget:
        load = pool.load + pool.backlog
        busy = math.ceil(load)
        total = max(_wanted(load), min(pool.instances, _wanted(load + DEAD_BAND)), least)
        interactive = min(busy, total - 1)
        return PoolTarget(pool.target_s, interactive, total - interactive)


class PaperLiteralAutoscaler:
    """Algorithm 2 to the letter: an instance is busy when it runs any interactive request, and one
    instance is added or removed a tick while IBP is over or under Theta. It flips for ever unless
    1 / Theta divides the count, and under spreading it climbs to the cap."""

    def decide(self, view: FleetView) -> Decision:
        return _decide(view, [self._pool(pool, view.least) for pool in view.pools])

    def _pool(self, pool: PoolView, least: int) -> PoolTarget:
        total = max(least, step_by_one(pool.busy_instances, pool.instances))
        interactive = min(pool.busy_instances, total - 1)
        return PoolTarget(pool.target_s, interactive, total - interactive)


def _wanted(load: float) -> int:
    return math.ceil(math.ceil(load) / THETA)


def step_by_one(busy: int, instances: int, theta: float = THETA) -> int:
    """One instance more while IBP is over Theta, one less while it is under."""
    if not instances:
        return 1
    pressure = busy / instances
    if math.isclose(pressure, theta):
        return instances
    return instances + 1 if pressure > theta else instances - 1


def _decide(view: FleetView, targets: list[PoolTarget]) -> Decision:
    instances = sum(pool.instances for pool in view.pools)
    busy = sum(pool.busy_instances for pool in view.pools)
    late = late_groups(view.batch.groups, view.batch.throughput, view.now)
    return Decision(
        pools=tuple(targets),
        batch=_batch(view.batch, late),
        busy=float(busy),
        theta=THETA,
        interactive_backpressure=busy / instances if instances else 0.0,
        batch_backpressure=late,
    )


def _batch(batch: BatchView, late: int) -> int:
    if not batch.queued:
        return 0
    return batch.instances + 1 if late else batch.instances

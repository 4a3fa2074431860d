"""Baseline: a fixed number of mixed instances."""

from __future__ import annotations

from .fleet_view import Decision, FleetView, PoolTarget


class StaticAutoscaler:
    """N mixed instances at any load, all for the tightest ITL target, which serves every request.
    Batch runs in what interactive work leaves of them. Reports the sum of u as busy."""

    def __init__(self, instances: int) -> None:
        self._instances = instances

    def decide(self, view: FleetView) -> Decision:
        total = sum(pool.instances for pool in view.pools)
        busy = sum(pool.load + pool.backlog for pool in view.pools)
        pools = tuple(
            PoolTarget(pool.target_s, 0, 0 if place else self._instances)
            for place, pool in enumerate(view.pools)
        )
        return Decision(pools, 0, busy, 1.0, busy / total if total else 0.0, 0)

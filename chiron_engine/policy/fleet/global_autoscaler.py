"""The global autoscaler (section 5, Algorithm 2), with demand counted in shares of instances,
Theta learned, and batch instances sized by deadlines.

Interactive side: keep IBP = D / N at Theta by its closed form N* = D / Theta; stepping by one
would flip for ever. Batch side: keep BBP, the number of late request groups, at 0 with the least
instances that do.
"""

from __future__ import annotations

import math
from collections import deque

from .config import FleetConfig
from .demand import InteractiveDemand
from .fleet_view import BatchView, Decision, FleetView, PoolTarget, PoolView
from .theta import Theta
from .waiting_time import late_groups, least_instances

DEAD_BAND = 0.3
DEAD_BAND_SHARE = 0.03
"""Instances, and share of them, by which D / Theta must pass the number decided before to be
followed: a steady Poisson load makes the 60 s mean of D wander by some percent within minutes."""
DECREASE_WINDOW_S = 240.0
"""Demand is remembered for this long at least before instances go. Over one load time alone a steady
Poisson load would still send an instance away, and launch it again, about once an hour."""
SAFE_TICKS = 2
"""Ticks for which fewer batch instances must be enough, on top of L, before any go."""


class SlidingMax:
    """The largest value of the last `window_s` seconds."""

    def __init__(self) -> None:
        self._falling: deque[tuple[float, float]] = deque()

    def push(self, value: float, now: float, window_s: float) -> float:
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now, value))
        while self._falling[0][0] < now - window_s:
            self._falling.popleft()
        return self._falling[0][1]


class PoolScaling:
    """Number of interactive and mixed instances for one ITL target."""

    def __init__(self, config: FleetConfig, is_loosest: bool) -> None:
        self._is_loosest = is_loosest
        self._least = 0
        self.demand = InteractiveDemand(config.tick_s)
        self.theta = Theta(config.tick_s)
        self._by_theta = SlidingMax()
        self._by_demand = SlidingMax()
        """The two terms of N*, at the upper edge of their bands."""
        self._lowest_demand = SlidingMax()
        """Of -D: the largest of that is the lowest D."""
        self._target = -1
        """N* of the last tick; negative before the first."""

    def decide(self, pool: PoolView, now: float, lead_s: float, least: int) -> PoolTarget:
        """N* = max(D / Theta, ceil(D) + 1): the first from the mean D that Theta is a ratio to, the
        second from D now, a spare instance over it. An increase is followed at once, a decrease
        when no D of the window contradicts it; both only until they are within the dead band.

        Interactive-only are those that D of the whole window keeps full; the others lend what they
        have left to batch. (One that is full now and then would do so too, so ceil(D) is too many.)
        """
        self._least = least if self._is_loosest else 0
        if self._target < 0:
            # What the operator starts with stands until there was time to see what is needed.
            self._target = pool.instances
            self._by_demand.push(pool.instances, now, 0.0)
        demand = self.demand
        demand.observe(pool)
        self.theta.observe(demand.smooth, demand.mean, lead_s)
        window_s = max(lead_s, DECREASE_WINDOW_S)
        by_theta = demand.mean * self.theta.ratio
        band = DEAD_BAND + DEAD_BAND_SHARE * self._target
        if not self._target:
            band = 0.0  # any demand is too much for no instance, which would leave it held for ever
        slack = 0.5 * band if demand.recent > 0 else 0.0
        by_demand = self._with_spare(demand.recent - slack)
        most_by_theta = self._by_theta.push(by_theta + band if by_theta > 0 else 0.0, now, window_s)
        most_by_demand = self._by_demand.push(self._with_spare(demand.recent + slack), now, window_s)
        always_busy = -self._lowest_demand.push(-demand.smooth, now, window_s)
        if max(by_theta - band, by_demand) > self._target:
            self._target = max(_ceil(by_theta - band), by_demand)
        elif max(most_by_theta, most_by_demand) <= self._target - 1:
            self._target = max(_ceil(most_by_theta), int(most_by_demand))
        self._target = max(self._target, self._least)
        interactive = max(0, min(int(always_busy), self._target - 1))
        return PoolTarget(pool.target_s, interactive, self._target - interactive)

    def _with_spare(self, demand: float) -> int:
        """ceil(D) + 1, or what is kept at any load."""
        return _ceil(demand) + 1 if demand > 0 else self._least


def _ceil(instances: float) -> int:
    """Rounded up, but for what the rounding of sums adds."""
    return math.ceil(instances - 1e-6)


class ChironAutoscaler:
    """Interactive and mixed instances by Theta, batch instances by deadlines."""

    def __init__(self, config: FleetConfig) -> None:
        loosest = config.itl_targets_s[-1]
        self._pools = {target: PoolScaling(config, target == loosest) for target in config.itl_targets_s}
        self._tick_s = config.tick_s
        self._batch_held = SlidingMax()

    def decide(self, view: FleetView) -> Decision:
        targets = tuple(
            self._pools[pool.target_s].decide(pool, view.now, view.lead_s, view.least) for pool in view.pools
        )
        batch, pressure = self._decide_batch(view, sum(target.total for target in targets))
        busy = sum(scaling.demand.smooth for scaling in self._pools.values())
        instances = sum(pool.instances for pool in view.pools)
        # Each pool has its Theta; the gauge shows that of the largest.
        busiest = max(self._pools.values(), key=lambda scaling: scaling.demand.mean)
        return Decision(
            pools=targets,
            batch=batch,
            busy=busy,
            theta=busiest.theta.value,
            interactive_backpressure=busy / instances if instances else 0.0,
            batch_backpressure=pressure,
        )

    def _decide_batch(self, view: FleetView, others: int) -> tuple[int, int]:
        """(instances, BBP). What is not needed any more is held for L and two ticks (ski rental:
        keeping one that long costs what loading it again would)."""
        most = max(0, view.most - others)
        needed, pressure = batch_instances(view.batch, view.now, view.lead_s, most)
        held = self._batch_held.push(needed, view.now, view.lead_s + SAFE_TICKS * self._tick_s)
        # What is held beyond the need is what exists: a launch not made yet is not made any more.
        return min(max(needed, min(int(held), view.batch.instances)), most), pressure


def batch_instances(batch: BatchView, now: float, lead_s: float, most: int) -> tuple[int, int]:
    """The least k, ready at now + L, with no late group, and BBP.

    An instance is launched when waiting another L with it would leave some group late or take
    more of them later: until then mixed instances may do the work for nothing, and arrivals may
    still come to fill it. So BBP counts the groups that would be late if it were left for later.
    """
    if not batch.groups:
        return 0, 0
    throughput = batch.throughput
    needed = least_instances(batch.groups, throughput, lead_s, most, now)
    existing = batch.instances
    later = least_instances(batch.groups, throughput, lead_s, most, now, delay_s=lead_s)
    if existing < needed < most and later <= needed:
        return existing, 0
    return needed, late_groups(batch.groups, throughput, now)

"""D, the interactive demand in instances: what the paper counts as busy ones (section 5), by how
full they are."""

from __future__ import annotations

import math
from collections import deque

from .fleet_view import PoolView

SHORT_S = (2.0, 5.0)
"""Times over which a step in the flow is looked for."""
LONG_S = 60.0
"""Time over which D is averaged."""
SIGNIFICANT = 6.0
"""Standard deviations of a Poisson stream that a flow must lie over the mean to be a step."""
MOST_BACKLOG = 0.5
"""Of the load that fits, how much of what does not fit counts as load. A queue is requests that came
too fast for a while, not a rate: an instance for each of its shares would come when it is long
served."""


class InteractiveDemand:
    """D = max(flow demand, sum of u over packed instances).

    The sum of u alone says little about how much more would fit: with short steps requests leave
    sooner, so that an instance at half its greatest rate holds a fifth of what it can hold, and
    doubling the rate takes five times the u. Flow demand is linear in the arrival rate: work that
    arrives per second over the work that one full instance does in a second. The sum of u stays
    as a floor, for the day when the step model is wrong and work piles up.

    smooth: D with the flow of the last 5 s. mean: of `smooth` over the last 60 s. Both are rates that
    come again, which headroom is kept for: a backlog is no part of them, neither while it waits nor
    while instances work it off.

    recent: what there must be instances for now. The mean, but where the flow of the last 2 or 5 s
    lies more than six standard deviations of a Poisson stream over it, that flow: a step in the
    load is seen within these, noise is not. And the work that is there, backlog included, or will
    be once the next instances are ready: at a step more is ordered at once, not as the backlog grows.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._long = max(1, round(LONG_S / tick_s))
        self._shorts = [max(1, round(seconds / tick_s)) for seconds in SHORT_S]
        self._work: deque[float] = deque(maxlen=self._long)
        self._squares: deque[float] = deque(maxlen=self._long)
        self._arrived_loads: deque[float] = deque(maxlen=self._long)
        self._loads: deque[float] = deque(maxlen=self._long)
        self._backlogs: deque[float] = deque(maxlen=self._long)
        self._smooths: deque[float] = deque(maxlen=self._long)
        self.smooth = 0.0
        self.mean = 0.0
        self.recent = 0.0

    def observe(self, pool: PoolView) -> None:
        """One tick."""
        self._work.append(pool.arrived_work_s)
        self._squares.append(pool.arrived_squares)
        self._arrived_loads.append(pool.arrived_load)
        self._loads.append(pool.load)
        self._backlogs.append(pool.backlog)
        flows = [self._flow(ticks) for ticks in self._shorts]
        # Where some waited, instances may be working that off: only what stays of their load comes again.
        lasting = min(self._loads) if any(self._backlogs) else pool.load
        self.smooth = max(lasting, flows[-1])
        self._smooths.append(self.smooth)
        self.mean = sum(self._smooths) / len(self._smooths)
        rate = max(self.mean, *self._significant(flows))
        self.recent = max(rate, pool.load + pool.backlog, self._to_come(pool, rate))

    def _to_come(self, pool: PoolView, rate: float) -> float:
        """Sum of u once the next instances are ready, where the ready ones serve less than comes: they
        are full by then, and requests of the work left over wait, with the u that such requests take."""
        work = sum(self._work)
        if rate <= pool.ready or not work:
            return 0.0
        piling = (rate - pool.ready) * sum(self._arrived_loads) / work
        backlog = pool.backlog + piling * pool.next_ready_s
        return pool.ready + min(backlog, MOST_BACKLOG * max(1.0, pool.ready))

    def _flow(self, ticks: int) -> float:
        """Mean work per second over the last ticks; time before the start counts as idle."""
        first = max(0, len(self._work) - ticks)
        return sum(self._work[place] for place in range(first, len(self._work))) / (ticks * self._tick_s)

    def _significant(self, flows: list[float]) -> list[float]:
        variance = sum(self._squares) / (len(self._squares) * self._tick_s)
        found = [0.0]
        for ticks, flow in zip(self._shorts, flows, strict=True):
            deviation = math.sqrt(variance / (ticks * self._tick_s))
            if flow > self.mean + SIGNIFICANT * deviation:
                found.append(flow)
        return found

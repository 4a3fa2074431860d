"""D, the interactive demand in instances: what the paper counts as busy ones (section 5), by how
full they are."""

from __future__ import annotations

import math
from collections import deque

SHORT_S = (2.0, 5.0)
LONG_S = 60.0
SIGNIFICANT = 6.0


class InteractiveDemand:
    """D = max(sum of u over packed instances, flow demand).

    The sum of u alone says little about how much more would fit: with short steps requests leave
    sooner, so that an instance at half its greatest rate holds a fifth of what it can hold, and
    doubling the rate takes five times the u. Flow demand is linear in the arrival rate: work that
    arrives per second over the work that one full instance does in a second. The sum of u stays
    as a floor, for the day when the step model is wrong and work piles up.

    smooth: D with the flow of the last 5 s. mean: of `smooth` over the last 60 s. recent: the
    mean, but where the flow of the last 2 or 5 s lies more than six standard deviations of a
    Poisson stream over it, that flow: a step in the load is seen within these, noise is not. A
    backlog counts in `recent` alone: it is work to be done now, not a rate that comes again, and no
    spike that headroom would be kept for.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._long = max(1, round(LONG_S / tick_s))
        self._shorts = [max(1, round(seconds / tick_s)) for seconds in SHORT_S]
        self._work: deque[float] = deque(maxlen=self._long)
        self._squares: deque[float] = deque(maxlen=self._long)
        self._smooths: deque[float] = deque(maxlen=self._long)
        self.smooth = 0.0
        self.mean = 0.0
        self.recent = 0.0

    def observe(self, load: float, backlog: float, arrived_work_s: float, arrived_squares: float) -> None:
        """One tick: the sum of u, that of what does not fit, and the work of the requests that arrived
        since the last one with the sum of its squares."""
        self._work.append(arrived_work_s)
        self._squares.append(arrived_squares)
        flows = [self._flow(ticks) for ticks in self._shorts]
        self.smooth = max(load, flows[-1])
        self._smooths.append(self.smooth)
        self.mean = sum(self._smooths) / len(self._smooths)
        self.recent = max(load + backlog, self.mean, *self._significant(flows))

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

"""How many instances one would have who knew all arrivals, in whole numbers: a schedule that can be run."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.fleet_view import Decision, FleetView, PoolTarget
from chiron_engine.policy.fleet.messages import InstanceSpec

from .bound import Bound
from .interval_program import Ints
from .sim_policy import SimPolicy


@dataclass(frozen=True, slots=True)
class Schedule:
    """steps: (time, instances ready from then on), from time 0, times ascending."""

    steps: tuple[tuple[float, int], ...]

    @property
    def initial(self) -> int:
        return self.steps[0][1]

    def most_between(self, start: float, end: float) -> int:
        """The largest number ready at any time of [start, end]; the last step holds for ever."""
        first = max(0, bisect_right(self.steps, start, key=lambda step: step[0]) - 1)
        last = bisect_right(self.steps, end, key=lambda step: step[0])
        return max(count for _, count in self.steps[first : max(last, first + 1)])


def clairvoyant_schedule(bound: Bound, load_time_s: float, headroom: float = 1.0) -> Schedule:
    """The counts of the bound's program, which serve all requests in time if work is spread and cut at
    will, times `headroom`, rounded up; at least one instance. Where fewer would be needed for less than
    the time it takes to load one, it is kept: that costs less than to start it again.

    Real instances pack less well than the program takes them to. The least headroom at which a run
    attains its objectives shows how far the bound is from what can be done. Raises ValueError for a
    headroom below 1.
    """
    if not (math.isfinite(headroom) and headroom >= 1):
        raise ValueError(f"headroom is {headroom}; it must be at least 1")
    counts = np.maximum(1, np.ceil(np.array(bound.counts) * headroom - 1e-3)).astype(np.int64)
    counts = _without_short_dips(counts, math.floor(load_time_s / bound.bucket_s))
    changes = np.flatnonzero(np.diff(counts, prepend=-1))
    return Schedule(tuple((float(place * bound.bucket_s), int(counts[place])) for place in changes))


def _without_short_dips(counts: Ints, longest: int) -> Ints:
    """Numbers with every dip of at most `longest` places filled to the lower of its rims."""
    filled = counts.copy()
    for level in range(1, int(counts.max()) + 1):
        high = np.flatnonzero(filled >= level)
        for left, right in pairwise(high):
            if 1 < right - left <= longest + 1:
                filled[left + 1 : right] = np.maximum(filled[left + 1 : right], level)
    return filled


class ClairvoyantAutoscaler:
    """A global autoscaler that follows a schedule: instances are launched one load lead before they are
    needed and closed when the schedule has fewer. As many as interactive work needs now, and one, are
    mixed, the rest batch."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def decide(self, view: FleetView) -> Decision:
        total = min(view.most, self._schedule.most_between(view.now, view.now + view.lead_s))
        busy = sum(pool.load for pool in view.pools)
        mixed = total if not view.batch.groups else min(total, math.ceil(busy) + 1)
        pools = tuple(
            PoolTarget(pool.target_s, 0, 0 if place else mixed) for place, pool in enumerate(view.pools)
        )
        return Decision(pools, total - mixed, busy, 1.0, busy / total, 0)


def clairvoyant_policy(schedule: Schedule, local_autoscaler: str = "adaptive") -> SimPolicy:
    """Run it in a world that starts with `schedule.initial` instances."""

    def make_fleet(spec: InstanceSpec, config: FleetConfig) -> FleetState:
        return FleetState(spec, config, ClairvoyantAutoscaler(schedule))

    return SimPolicy("clairvoyant", local_autoscaler, make_fleet)

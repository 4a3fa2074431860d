"""When queued batch work will be done, and how many instances it takes to be in time (section 5).

The estimator is QLM's, W ~ Normal(q mu / T, q sigma^2 / T^2) with q requests ahead of output length
mu +- sigma and T tokens per second. Work stands for tokens here, in seconds of one full instance
(`CapacityModel.work_s`), as prompts and long contexts cost time too; T is then the number of full
instances, and may change with time.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .request_groups import GroupWork

QUANTILE = 1.645
"""Standard normal deviate at 95 %."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Batch work per second of the fleet over time, steps as instances become ready.

    spare: what mixed instances deliver. rate: what one batch instance delivers, 1 by the step model.
    ready_in: seconds until each batch instance is ready, 0 for those that are, ascending. cv:
    coefficient of variation of the throughput itself.
    """

    spare: float
    rate: float
    ready_in: tuple[float, ...] = ()
    cv: float = 0.0

    def time_for(self, work_s: float) -> float:
        """Solves integral of T = work; infinite where T stays 0."""
        speed, time, left = self.spare, 0.0, work_s
        for ready in self.ready_in:
            if left <= speed * (ready - time):
                break
            left -= speed * (ready - time)
            time = ready
            speed += self.rate
        if left <= 0:
            return time
        return time + left / speed if speed > 0 else math.inf


def waiting_time(work_s: float, variance: float, throughput: Throughput) -> float:
    """W at 95 %: Normal, with variance sum sigma^2 / T^2 + (W cv_T)^2, as work over throughput."""
    return throughput.time_for(conservative(work_s, variance, throughput.cv))


def conservative(work_s: float, variance: float, cv: float) -> float:
    """The 95th percentile of work, that of the throughput counted as if it were the work's."""
    return work_s + QUANTILE * math.sqrt(variance + (cv * work_s) ** 2)


def late_groups(groups: Sequence[GroupWork], throughput: Throughput, now: float) -> int:
    """BBP, batch backpressure: groups for which now + W at 95 % + own service > deadline."""
    return sum(
        now + waiting_time(work, variance, throughput) + group.service_s > group.due
        for group, work, variance in _work_ahead(groups)
    )


def least_instances(
    groups: Sequence[GroupWork],
    throughput: Throughput,
    lead_s: float,
    most: int,
    now: float,
    delay_s: float = 0.0,
) -> int:
    """The least number of batch instances with no late group: the soonest ready first, those not
    launched yet from now + lead + delay on. A group late whatever is launched sets no deadline, as
    none is kept: its work is only done before that of the others, by what exists, and by one
    instance at least. Where its deadline is so far that an instance would work for it longer than
    it loads, part of its requests can be saved, and it asks for `most`."""
    supply, at_once = _Supply(throughput, lead_s + delay_s), _Supply(throughput, lead_s)
    without_launches = min(most, max(1, len(throughput.ready_in)))
    count = 0
    for group, work_s, variance in _work_ahead(groups):
        work = conservative(work_s, variance, throughput.cv)
        horizon = group.due - now - group.service_s
        # By launches at once, whatever the delay: what waiting would lose must not look cheap.
        can_be_saved = at_once.delivered(most, horizon) >= work
        most_for_it = most if can_be_saved or horizon > 2 * lead_s else without_launches
        while count < most_for_it and supply.delivered(count, horizon) < work:
            count += 1
    return count


class _Supply:
    """What the first n batch instances and the spare of mixed ones deliver by a time."""

    def __init__(self, throughput: Throughput, lead_s: float) -> None:
        self._throughput = throughput
        self._lead_s = lead_s
        self._ready_sums = [0.0, *accumulate(throughput.ready_in)]

    def delivered(self, count: int, horizon: float) -> float:
        if horizon <= 0:
            return 0.0
        throughput = self._throughput
        existing = min(count, len(throughput.ready_in))
        ready = bisect_left(throughput.ready_in, horizon, 0, existing)
        seconds = ready * horizon - self._ready_sums[ready]
        seconds += (count - existing) * max(0.0, horizon - self._lead_s)
        return throughput.spare * horizon + throughput.rate * seconds


def _work_ahead(groups: Sequence[GroupWork]) -> Iterator[tuple[GroupWork, float, float]]:
    """Each group with the work of all up to and including it, and the variance of that."""
    work = variance = 0.0
    for group in groups:
        work += group.work_s
        variance += group.variance
        yield group, work, variance

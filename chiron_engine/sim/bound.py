"""GPU-hours that no policy can do without."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from chiron_engine.policy.iteration.request import SloClass

from .interval_program import Floats, IntervalProgram, IntervalSolution, Ints, work_inside
from .profile import Profile
from .traces.columns import arrivals_of, outputs_of
from .work import Work, least_work
from .workload import Stream, Workload

BUCKETS = 480
IMPROVEMENTS = 4
_NUMERIC_SLACK = 1e-6


@dataclass(frozen=True, slots=True)
class Bound:
    """gpu_hours: no policy that attains `attainment` of each class uses less. work_gpu_hours: work of
    all requests, were no instance ever idle or loading. bucket_s: length of time buckets; counts: instances
    in each, in the program's solution that serves all requests."""

    gpu_hours: float
    work_gpu_hours: float
    attainment: float
    bucket_s: float
    counts: tuple[float, ...]


def lower_bound(
    workload: Workload,
    profile: Profile,
    load_time_s: float,
    attainment: float = 0.99,
    buckets: int = BUCKETS,
) -> Bound:
    """The least GPU-hours by which a share `attainment` of each class can attain its objectives.

    With w the least work of a request (`least_work`), r its release and d when it is due (interactive:
    arrival + TTFT SLO + (n - 1) ITL SLO; batch: its deadline): minimise the integral of N + L x starts,
    where over every interval [s, e] the integral of N is at least the work released after s and due
    before e. Instances there from t = 0 cost no start. Why this is a bound:

    - Time is cut in buckets, N(t) replaced by its means over them. Only intervals between bucket
      boundaries are constrained, which a real N fulfils, too; a request belongs to those that hold all
      of its time from r to d. The rises of the means add up to no more than those of N. And N may be any
      real number, and work be spread over instances as if it could be cut at will.
    - A policy may miss 1 % of each class, and it may be best to miss others than the heaviest: those
      of a peak that only they need instances for. By duality the prices of intervals that solve the program
      for some work bound it for all: for work W less that of any set M of missed requests, the least
      cost is at least sum of price x W(interval) - sum over M of w x (prices of the intervals it is in).
      So the bound takes away the requests that matter most *at these prices*, which is right
      whatever the prices are. `IMPROVEMENTS` times the program is solved for the work without a mean of
      those taken so far; the best bound counts.

    `load_time_s` is the least time from a launch to readiness that can occur. Step times are taken
    without noise. Raises ValueError if no step is within the interactive ITL SLO.
    """
    work = least_work(workload, profile)
    program = _Program(workload, work, load_time_s, attainment, buckets)
    best, solution = program.best()
    hours = profile.gpus / 3600.0
    return Bound(
        gpu_hours=max(0.0, best * (1 - _NUMERIC_SLACK)) * hours,
        work_gpu_hours=work.total_s * hours,
        attainment=attainment,
        bucket_s=program.bucket_s,
        counts=tuple(solution.counts.tolist()),
    )


def due_times(stream: Stream) -> Floats:
    """When the last token of each request is due."""
    arrivals = arrivals_of(stream.trace)
    if stream.slo_class is SloClass.INTERACTIVE:
        return arrivals + stream.slo.ttft_s + (outputs_of(stream.trace) - 1) * stream.slo.itl_s
    return arrivals + stream.completion_s


@dataclass(frozen=True, slots=True)
class _Jobs:
    """Requests of one class: bucket of release, boundary when due, work, and how many may be missed."""

    released: Ints
    due: Ints
    seconds: Floats
    may_miss: int

    def heaviest(self, worth: Floats) -> Ints:
        """The requests of highest worth, as many as may be missed."""
        if not self.may_miss:
            return np.zeros(0, dtype=np.int64)
        return np.argpartition(worth, -self.may_miss)[-self.may_miss :]


class _Program:
    def __init__(
        self, workload: Workload, work: Work, load_time_s: float, attainment: float, buckets: int
    ) -> None:
        horizon = max(float(due_times(stream).max()) for stream in workload.streams)
        self.bucket_s = max(horizon, 1e-9) / buckets
        self._buckets = buckets
        self._program = IntervalProgram(buckets, self.bucket_s, load_time_s)
        self._jobs = [
            self._jobs_of(stream, seconds, attainment)
            for stream, seconds in zip(workload.streams, work.by_stream, strict=True)
        ]
        self._all = self._inside([np.arange(len(jobs.seconds)) for jobs in self._jobs])

    def best(self) -> tuple[float, IntervalSolution]:
        """The highest bound found in instance-seconds, and the solution that serves all."""
        missed = self._inside([jobs.heaviest(jobs.seconds) for jobs in self._jobs])
        best = 0.0
        for improvement in range(1, IMPROVEMENTS + 1):
            solution = self._program.solve(np.maximum(self._all - missed, 0.0))
            value, worst = self._bound_at(solution)
            best = max(best, value)
            missed += (worst - missed) * (1.0 / (improvement + 1))
        return best, self._program.solve(self._all)

    def _bound_at(self, solution: IntervalSolution) -> tuple[float, Floats]:
        """The bound these prices give, and the work of the requests they take away."""
        covering = solution.covering()
        value = float((solution.weights * self._all).sum())
        taken = []
        for jobs in self._jobs:
            worth = jobs.seconds * covering[jobs.released, jobs.due]
            rows = jobs.heaviest(worth)
            value -= float(worth[rows].sum())
            taken.append(rows)
        return value, self._inside(taken)

    def _inside(self, rows: list[Ints]) -> Floats:
        parts = [
            work_inside(jobs.released[chosen], jobs.due[chosen], jobs.seconds[chosen], self._buckets)
            for jobs, chosen in zip(self._jobs, rows, strict=True)
        ]
        return np.sum(parts, axis=0)

    def _jobs_of(self, stream: Stream, seconds: Floats, attainment: float) -> _Jobs:
        released = np.floor(arrivals_of(stream.trace) / self.bucket_s).astype(np.int64)
        due = np.ceil(due_times(stream) / self.bucket_s).astype(np.int64)
        due = np.clip(due, 1, self._buckets)
        may_miss = math.floor((1 - attainment) * len(seconds) + 1e-9)
        return _Jobs(np.clip(released, 0, self._buckets - 1), due, seconds, may_miss)

"""The least instance-seconds that serve work between its release and when it is due: a linear program."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 1e-4
MAX_ROUNDS = 40


@dataclass(frozen=True, slots=True)
class IntervalSolution:
    """counts: instances in the mean of each bucket. weights[s, e]: dual price of the interval from the
    start of bucket s to the end of bucket e - 1, per second of work that must be done in it."""

    counts: Floats
    weights: Floats

    def covering(self) -> Floats:
        """[i, j]: sum of the prices of all intervals that work released in bucket i and due by boundary
        j must be done in, which is what one second of it adds to the bound."""
        later = self.weights[:, ::-1].cumsum(axis=1)[:, ::-1]
        return later.cumsum(axis=0)


def work_inside(released: Ints, due: Ints, seconds: Floats, buckets: int) -> Floats:
    """[s, e]: seconds of work released in bucket s or later and due by boundary e or earlier."""
    grid = np.bincount(released * (buckets + 1) + due, weights=seconds, minlength=buckets * (buckets + 1))
    by_cell = grid.astype(np.float64).reshape(buckets, buckets + 1)
    return by_cell[::-1].cumsum(axis=0)[::-1].cumsum(axis=1)


class IntervalProgram:
    """minimise sum n_b dt + L sum (n_b - n_{b-1})+ subject to n >= 0 and, for all boundaries s < e,
    sum of n_b dt over [s, e) >= work[s, e].

    n_0 costs no start. In terms of X_b = sum of n up to boundary b every constraint on an interval has
    two entries. There are many, and few matter: those violated most are added until none is by more
    than 1e-4 of all work. Constraints found stay for further calls with other work.
    """

    def __init__(self, buckets: int, bucket_s: float, start_cost_s: float) -> None:
        self._buckets = buckets
        self._bucket_s = bucket_s
        self._start_cost_s = start_cost_s
        self._intervals = {(0, buckets): None}

    def solve(self, work: Floats) -> IntervalSolution:
        """work[s, e] as of `work_inside`."""
        for _ in range(MAX_ROUNDS):
            done, weights = self._solve_with_known(work)
            missing = self._most_violated(work, done)
            if not missing:
                break
            self._intervals |= dict.fromkeys(missing)
        return IntervalSolution(np.diff(done) / self._bucket_s, weights)

    def _most_violated(self, work: Floats, done: Floats) -> list[tuple[int, int]]:
        """For every start and every end the interval that lacks most, where that is much."""
        lack = np.triu(work - (done[None, :] - done[:-1, None]), k=1)
        enough = TOLERANCE * max(work[0, -1], 1e-12)
        by_start = [(s, int(e)) for s, e in enumerate(lack.argmax(axis=1))]
        by_end = [(int(s), e) for e, s in enumerate(lack.argmax(axis=0))]
        found = dict.fromkeys(pair for pair in [*by_start, *by_end] if lack[pair] > enough)
        return [pair for pair in found if pair not in self._intervals]

    def _solve_with_known(self, work: Floats) -> tuple[Floats, Floats]:
        """X at every boundary, and the dual prices. Variables: X_1 ... X_B, then a start for b >= 1.
        X_0 is 0. In units of the work there is, for the solver's tolerances."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, hstack, vstack

        buckets, intervals = self._buckets, np.array(list(self._intervals))
        unit = max(float(work[0, -1]), 1e-12)
        steps = csr_array(np.eye(buckets) - np.eye(buckets, k=-1))
        rises = (steps[1:] - steps[:-1]) / self._bucket_s
        starts, covered = csr_array(np.eye(buckets - 1)), _interval_rows(intervals, buckets)
        nothing = csr_array((len(intervals), buckets - 1))
        still = csr_array((buckets, buckets - 1))
        constraints = vstack([hstack([covered, nothing]), hstack([-rises, starts]), hstack([steps, still])])
        limits = np.zeros(constraints.shape[0])
        limits[: len(intervals)] = work[intervals[:, 0], intervals[:, 1]] / unit
        cost = np.concatenate([np.zeros(buckets - 1), [1.0], np.full(buckets - 1, self._start_cost_s)])
        found = linprog(cost, A_ub=-constraints, b_ub=-limits, bounds=(0, None), method="highs")
        if found.status != 0:
            raise RuntimeError(f"the program of intervals was not solved: {found.message}")
        weights = np.zeros_like(work)
        prices = np.maximum(0.0, -found.ineqlin.marginals[: len(intervals)])
        weights[intervals[:, 0], intervals[:, 1]] = prices
        done = np.concatenate([[0.0], found.x[:buckets] * unit])
        return done, weights


def _interval_rows(intervals: Ints, buckets: int):  # type: ignore[no-untyped-def]
    """X_e - X_s of each interval, as rows over X_1 ... X_B."""
    from scipy.sparse import csr_array

    rows = np.arange(len(intervals))
    inner = intervals[:, 0] > 0
    entries = np.concatenate([np.ones(len(rows)), -np.ones(inner.sum())])
    row = np.concatenate([rows, rows[inner]])
    column = np.concatenate([intervals[:, 1] - 1, intervals[inner, 0] - 1])
    return csr_array((entries, (row, column)), shape=(len(rows), buckets))

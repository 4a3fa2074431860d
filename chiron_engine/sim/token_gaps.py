"""Gaps between the tokens of interactive requests, at a cost per step and not per request."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from math import log

from .run_result import ITL_BINS, ITL_FIRST_S, ITL_RATIO, ItlHistogram

TOLERANCE = 1.0 + 1e-9
"""A gap is the difference of two times, and rounds."""
_PER_BIN = 1.0 / log(ITL_RATIO)


def add_gap(histogram: ItlHistogram, gap: float, requests: int) -> None:
    place = int(log(gap / ITL_FIRST_S) * _PER_BIN) if gap > ITL_FIRST_S else 0
    histogram.counts[min(place, ITL_BINS - 1)] += requests


class TokenGaps:
    """Late steps of one engine. Every request that decodes sees the gap of each step, so the late
    gaps of a stream are the late steps between its first token and its last."""

    __slots__ = ("_histogram", "_late_at", "_limit_s")

    def __init__(self, itl_slo_s: float, histogram: ItlHistogram) -> None:
        self._limit_s = itl_slo_s * TOLERANCE
        self._histogram = histogram
        self._late_at = array("d")

    def step(self, now: float, gap: float, requests: int) -> None:
        """A step committed `now` gave each of these interactive requests a token, `gap` after the
        one before."""
        add_gap(self._histogram, gap, requests)
        if gap > self._limit_s:
            self._late_at.append(now)

    def interruption(self, gap: float) -> int:
        """One stream went on after a gap of its own; returns the late gaps in it, 0 or 1."""
        add_gap(self._histogram, gap, 1)
        return int(gap > self._limit_s)

    def late_between(self, first_token: float, last_token: float) -> int:
        """Late gaps of a stream that ran from its token at `first_token` to that at `last_token`."""
        late = self._late_at
        if not late or late[-1] <= first_token:
            return 0
        return bisect_right(late, last_token) - bisect_right(late, first_token)

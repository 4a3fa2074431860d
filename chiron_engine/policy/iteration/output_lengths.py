"""How long outputs get, learned from those that finished on one engine.

For admission: too low a guess costs evictions, so it is a high one. The fleet's estimate
(`fleet/output_estimate.py`) is for sums of work, and a mean.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

WINDOW = 512
MIN_SAMPLES = 16
PRIOR_TOKENS = 256


class OutputLengths:
    """Lengths of the last finished outputs, sorted."""

    __slots__ = ("_recent", "_sorted")

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def observe(self, length: int) -> None:
        self._recent.append(length)
        insort(self._sorted, length)
        if len(self._recent) > WINDOW:
            self._sorted.pop(bisect_right(self._sorted, self._recent.popleft()) - 1)

    def remaining(self, produced: int, most: int) -> int:
        """Tokens still to come for an output of `produced` tokens that may have `most` more.

        The third quartile of what longer outputs had left; without enough of those, as much again
        as was produced, and at least a prior.
        """
        first = bisect_right(self._sorted, produced)
        longer = len(self._sorted) - first
        if longer < MIN_SAMPLES:
            return min(most, max(PRIOR_TOKENS, produced))
        return min(most, self._sorted[first + 3 * longer // 4] - produced)

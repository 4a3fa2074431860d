"""How far steps stray above the model: the 99th percentile of their ratio to it."""

from __future__ import annotations

import math
from array import array

WINDOW = 2000
TRUSTED = 1000
"""Samples from which the measured percentile is used."""
PERCENT = 99

NORMAL_PERCENTILE = 2.33
PRIOR_SIGMA = 0.10
MOST_DEVIATION = 3 * PRIOR_SIGMA
"""What a sample counts for sigma, at most: a few far off, as when something else takes the machine, say
nothing of the others, and engines that step slowly take minutes to have samples enough."""
PRIOR_WEIGHT = 50
"""Samples that the prior's sigma counts for."""

BIN = 0.0025
"""Width of a bin in the logarithm of the ratio."""
HALF_BINS = 600
"""On either side of a ratio of 1: up to four and a half times the model's time, or down to that part."""
BINS = 2 * HALF_BINS


class StepTail:
    """Ratios of step times to the model's, over the last WINDOW steps shown to it. O(1) a step: a
    histogram, the ring of what is in it, and a cursor that follows the percentile."""

    __slots__ = ("_above", "_bins", "_cursor", "_next", "_ring", "_squares", "samples")

    def __init__(self) -> None:
        self._bins = [0] * BINS
        self._ring = array("H", bytes(2 * WINDOW))
        self._next = 0
        self._cursor = HALF_BINS
        self._above = 0
        self._squares = 0.0
        self.samples = 0
        """Steps seen so far."""

    def observe(self, ratio: float) -> None:
        """Take in one step's ratio (> 0)."""
        deviation = math.log(ratio)
        index = min(max(int(deviation / BIN + HALF_BINS), 0), BINS - 1)
        position = self._next
        if self.samples >= WINDOW:
            old = self._ring[position]
            self._bins[old] -= 1
            self._above -= old > self._cursor
        elif self.samples < TRUSTED:
            clipped = max(-MOST_DEVIATION, min(deviation, MOST_DEVIATION))
            self._squares += clipped * clipped
        self._ring[position] = index
        self._bins[index] += 1
        self._above += index > self._cursor
        self._next = position + 1 if position + 1 < WINDOW else 0
        self.samples += 1

    @property
    def rho99(self) -> float:
        """What to multiply the model's time by for a time that 99 % of steps keep."""
        if self.samples < TRUSTED:
            variance = (PRIOR_WEIGHT * PRIOR_SIGMA**2 + self._squares) / (PRIOR_WEIGHT + self.samples)
            return math.exp(NORMAL_PERCENTILE * math.sqrt(variance))
        return math.exp((self._percentile_bin() + 1 - HALF_BINS) * BIN)

    def _percentile_bin(self) -> int:
        """The lowest bin with at most 1 % of the samples above it."""
        allowed = min(self.samples, WINDOW) * (100 - PERCENT) // 100
        bins, cursor, above = self._bins, self._cursor, self._above
        while above > allowed:
            cursor += 1
            above -= bins[cursor]
        while cursor > 0 and above + bins[cursor] <= allowed:
            above += bins[cursor]
            cursor -= 1
        self._cursor, self._above = cursor, above
        return cursor

"""Theta, the interactive backpressure to keep (section 5): the share of interactive and mixed
instances that may be busy, so that a spike inside one load time finds the others free."""

from __future__ import annotations

from collections import deque

PRIOR_RATIO = 2.0
LEARNED_LEADS = 20
"""Load leads of history from which on the ratios are believed in full."""
LEAST_RATIO = 1.1
MOST_RATIO = 4.0
QUANTILE = 0.99
BIN = 0.01
"""Width of a bin of ratios."""
SETTLING_S = 120.0
"""Left out of history: the means of a fleet that starts up."""
LEAST_DEMAND = 0.05
"""Mean D, in instances, under which a ratio says nothing."""


class Theta:
    """1 / r, with r the spike ratio: the 99th percentile over history of the largest D within one
    load lead after a moment, over the mean D of the 60 s before it (the paper's example: r = 3, so
    Theta = 1/3). r is within [1.1, 4]. It starts at 2; until 20 L of history exist, what was learned
    lowers it in proportion to the history there is, and raises it at once.

    A moment weighs as much as its demand, for SLOs are attained by requests, not by seconds: when
    next to nothing runs, a few requests more are a large ratio, and headroom for that ratio at
    full load would double the fleet. The ratios are kept as weights in bins of 1 %, so a tick
    costs the same after a day. The first two minutes, whose 60 s mean is that of a fleet
    starting up, are left out.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._weights = [0.0] * (round((MOST_RATIO - 1.0) / BIN) + 1)
        self._total = 0.0
        self._means: deque[float] = deque()
        self._peaks: deque[tuple[int, float]] = deque()
        self._ticks = 0
        self.ratio = PRIOR_RATIO

    @property
    def value(self) -> float:
        return 1.0 / self.ratio

    def observe(self, demand: float, mean: float, lead_s: float) -> None:
        """One tick: D now, its mean over the last 60 s, and the load lead L."""
        lead_ticks = max(1, round(lead_s / self._tick_s))
        self._push_peak(demand, lead_ticks)
        self._ticks += 1
        if self._ticks * self._tick_s <= SETTLING_S:
            return
        self._means.append(mean)
        while len(self._means) > lead_ticks:
            self._weigh(self._peaks[0][1], self._means.popleft())
        if self._total:
            learned = min(max(self._quantile(), LEAST_RATIO), MOST_RATIO)
            known = min(1.0, self._ticks / (LEARNED_LEADS * lead_ticks))
            self.ratio = max(learned, PRIOR_RATIO + known * (learned - PRIOR_RATIO))

    def _push_peak(self, demand: float, lead_ticks: int) -> None:
        """Keeps the falling maxima of the last L: the first of them is the largest D."""
        while self._peaks and self._peaks[-1][1] <= demand:
            self._peaks.pop()
        self._peaks.append((self._ticks, demand))
        while self._peaks[0][0] <= self._ticks - lead_ticks:
            self._peaks.popleft()

    def _weigh(self, peak: float, mean: float) -> None:
        if mean < LEAST_DEMAND:
            return
        place = int((peak / mean - 1.0) / BIN) + 1 if peak > mean else 0
        self._weights[min(place, len(self._weights) - 1)] += mean
        self._total += mean

    def _quantile(self) -> float:
        above = (1.0 - QUANTILE) * self._total
        place = len(self._weights) - 1
        while place > 0 and self._weights[place] <= above:
            above -= self._weights[place]
            place -= 1
        return 1.0 + place * BIN

"""L, how long it takes from deciding on an instance to having it. The paper takes the load time of
the model; here slow launches count, and the tick that a decision waits for."""

from __future__ import annotations

from collections import deque

SAMPLES = 64


class LoadLead:
    """L: 95th percentile of decision-to-ready over the last launches, plus one tick. Until one was
    seen, the spec's word."""

    def __init__(self, prior_s: float, tick_s: float) -> None:
        self._recent: deque[float] = deque(maxlen=SAMPLES)
        self._prior_s = prior_s
        self._tick_s = tick_s
        self.seconds = prior_s + tick_s

    def observe(self, load_s: float) -> None:
        self._recent.append(load_s)
        ordered = sorted(self._recent)
        self.seconds = ordered[int(0.95 * (len(ordered) - 1) + 0.5)] + self._tick_s

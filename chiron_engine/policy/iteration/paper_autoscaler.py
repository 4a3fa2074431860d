"""Algorithm 1 of the paper (section 4): as printed, and repaired.

    LBP = ITL observed / ITL SLO
    TBP = throughput of the interval before / throughput of this one
    BP = max(LBP, TBP)
    BP < 1:  B <- alpha (B / BP) + (1 - alpha) B
    else:    B <- max(1, B / 2)

The paper leaves open the first B, the interval and the ITL statistic. Here B starts at INITIAL_B, an
interval is INTERVAL_STEPS steps in which requests decoded, and ITL is the mean over the tokens of the
interval. (The growth line is also read as B + alpha / BP; as an average of B and B / BP its units
are right.) The algorithm sets no prompt budget: a step may take as many tokens as it is given.
"""

from __future__ import annotations

from .autoscaler_inputs import EngineCapacity, ItlTargets
from .limits import Limits, Shrink
from .step_stats import StepStats

ALPHA = 0.5
INITIAL_B = 8.0
INTERVAL_STEPS = 64
"""Enough for a mean, and short against how long a request runs."""
MOST_B = 1e12
"""Only keeps the unclipped B of the literal rule a finite number."""
FIRST_NOISE = 0.1
"""Relative change of throughput from one interval to the next while B stays; then measured."""
NOISE_SMOOTHING = 0.25
NOISE_DEVIATIONS = 2.0
"""TBP counts beyond 1 + this many times the noise."""


class Interval:
    """What one interval saw."""

    __slots__ = ("gaps_s", "kv_tokens", "seconds", "steps", "tokens", "was_full")

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self.gaps_s = 0.0
        self.kv_tokens = 0
        self.was_full = True
        """B bound in every step: as many ran as may."""

    def add(self, stats: StepStats) -> None:
        n = stats.decode_requests
        self.steps += 1
        self.tokens += n
        self.seconds += stats.itl_s
        self.gaps_s += stats.itl_s * n
        self.kv_tokens += stats.kv_tokens
        # The count is taken after the commit: what finished in the step ran in it.
        self.was_full &= stats.running + stats.finished >= stats.max_running

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def itl_s(self) -> float:
        return self.gaps_s / self.tokens

    @property
    def kv_per_request(self) -> float:
        return max(1.0, self.kv_tokens / self.tokens)


class PaperLiteralAutoscaler:
    """Algorithm 1 as printed. Kept because its pathologies are what the repair is measured against."""

    def __init__(
        self, capacity: EngineCapacity, targets: ItlTargets, token_budget: int | None = None
    ) -> None:
        self._capacity = capacity
        self._targets = targets
        self._token_budget = token_budget or capacity.max_step_tokens
        self._interval = Interval()
        self._throughput_before: float | None = None
        self.batch_size = INITIAL_B
        """B, unclipped."""
        self.latency_backpressure = 0.0
        self.throughput_backpressure = 0.0
        self._serves_interactive = False
        self.limits = self._limits()

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        if not stats.decode_requests or stats.itl_s <= 0.0:
            return None
        self._serves_interactive = stats.interactive_requests > 0 or stats.itl_interactive > 0
        self._interval.add(stats)
        if self._interval.steps < INTERVAL_STEPS:
            return None
        interval, self._interval = self._interval, Interval()
        self._end_interval(interval)
        return self._changed()

    def on_interactive(self, now: float) -> Limits | None:
        """Algorithm 1 knows only intervals."""
        return None

    def set_targets(self, targets: ItlTargets) -> Limits | None:
        self._targets = targets
        return None

    def _end_interval(self, interval: Interval) -> None:
        self._measure(interval)
        bp = max(self.latency_backpressure, self._counted_tbp(interval))
        self.batch_size = min(self._next_b(bp), MOST_B)

    def _measure(self, interval: Interval) -> None:
        """LBP and TBP of the interval that ends."""
        self.latency_backpressure = interval.itl_s / self._itl_slo
        before, self._throughput_before = self._throughput_before, interval.throughput
        # Nothing came before the first interval: it neither rose nor fell.
        self.throughput_backpressure = before / interval.throughput if before is not None else 0.0

    def _counted_tbp(self, interval: Interval) -> float:
        """TBP where it counts, else 0: as printed, it always does."""
        return self.throughput_backpressure

    def _next_b(self, bp: float) -> float:
        if bp < 1.0:
            return ALPHA * (self.batch_size / bp) + (1.0 - ALPHA) * self.batch_size
        return max(1.0, self.batch_size / 2.0)

    @property
    def _itl_slo(self) -> float:
        return self._targets.interactive_s if self._serves_interactive else self._targets.batch_s

    @property
    def _shrink(self) -> Shrink:
        return "drain"

    def _limits(self) -> Limits:
        max_running = min(int(self.batch_size), self._capacity.max_slots)
        return Limits(max_running, max(self._token_budget, max_running), self._shrink)

    def _changed(self) -> Limits | None:
        limits = self._limits()
        if limits == self.limits:
            return None
        self.limits = limits
        return limits


class PaperAutoscaler(PaperLiteralAutoscaler):
    """Algorithm 1, repaired.

    TBP counts only in the interval after B was *raised* (by a whole request), only above 1 + noise, and
    only where B bound throughout: a fall in arrivals, or the halving itself, is no overload. B is
    clipped at what the KV cache and the slots hold. Each ITL target keeps its own B, so that an
    interactive arrival among batch work finds the B that fits it; batch then gives way at once.
    """

    def __init__(
        self, capacity: EngineCapacity, targets: ItlTargets, token_budget: int | None = None
    ) -> None:
        super().__init__(capacity, targets, token_budget)
        self._noise = FIRST_NOISE
        self._b_rose = False
        self._b_stayed = False
        """What the last interval did to B, in whole requests."""
        self._other_b = INITIAL_B
        """B of the ITL target that is not in force."""

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        if self._serves_interactive and not (stats.interactive_requests or stats.itl_interactive):
            self._switch(interactive=False)
            return self._changed()
        if not self._serves_interactive and stats.itl_interactive:
            self._switch(interactive=True)
        return super().on_step(stats, now) or self._changed()

    def on_interactive(self, now: float) -> Limits | None:
        if not self._serves_interactive:
            self._switch(interactive=True)
        return self._changed()

    def _switch(self, interactive: bool) -> None:
        """Go on with the other target's B; the interval under way is neither's."""
        self._serves_interactive = interactive
        self.batch_size, self._other_b = self._other_b, self.batch_size
        self._interval = Interval()
        self._throughput_before = None
        self._b_rose = self._b_stayed = False

    def _end_interval(self, interval: Interval) -> None:
        b = int(self.batch_size)
        super()._end_interval(interval)
        fits = self._capacity.kv_capacity_tokens / interval.kv_per_request
        self.batch_size = max(1.0, min(self.batch_size, fits, self._capacity.max_slots))
        self._b_rose = int(self.batch_size) > b
        self._b_stayed = int(self.batch_size) == b

    def _counted_tbp(self, interval: Interval) -> float:
        tbp = self.throughput_backpressure
        if self._b_stayed and tbp and interval.was_full:
            self._noise += NOISE_SMOOTHING * (abs(tbp - 1.0) - self._noise)
        counts = self._b_rose and interval.was_full and tbp > 1.0 + NOISE_DEVIATIONS * self._noise
        return tbp if counts else 0.0

    @property
    def _shrink(self) -> Shrink:
        return "preempt" if self._serves_interactive else "drain"

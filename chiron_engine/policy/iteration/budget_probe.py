"""Now and then one step with more prompt tokens, to see what the model cannot."""

from __future__ import annotations

from .autoscaler_inputs import EngineCapacity
from .limits import Limits

SOONEST = 64
LATEST = 2048
"""Steps between two probes: twice as many after each that found nothing."""
SHARE = 0.25
LEAST_BLOCKS = 2
"""What a probe adds to the token budget: this share of it, and at least so many blocks."""
SURPRISE = 0.05
"""Share by which a probe must take less than expected."""
PATIENCE = 4
"""Steps that the probe waits for prompts to fill its budget."""


class BudgetProbe:
    """Real step times are stairs: a few more tokens may cost much, and as many again nothing. A fit to
    steps that all sit at the foot of a stair takes it for a slope, and the budget would stay there.
    While prompts wait and fill the budget, one step in many tries a larger one.
    """

    __slots__ = ("_age", "_every", "_left", "_most", "_smallest", "before", "found_more", "was_surprised")

    def __init__(self, capacity: EngineCapacity) -> None:
        self._most = capacity.max_step_tokens
        self._smallest = LEAST_BLOCKS * capacity.block_size
        self._every = SOONEST
        self._left = SOONEST
        self._age = 0
        self.before: Limits | None = None
        """The limits that a probe under way departs from."""
        self.was_surprised = False
        """Whether the last probe took less than expected."""
        self.found_more = False
        """Whether, besides, it took no more than it may."""

    def is_due(self, limits: Limits, queued_tokens: int) -> bool:
        """Called after each step that filled its budget."""
        return self._left <= 0 and limits.token_budget < self._most and queued_tokens > limits.token_budget

    def pass_steps(self, steps: int) -> None:
        self._left -= steps

    def begin(self, limits: Limits) -> Limits:
        """The limits to probe with."""
        self.before = limits
        self._age = 0
        more = max(self._smallest, int(SHARE * limits.token_budget))
        return Limits(limits.max_running, min(limits.token_budget + more, self._most), limits.shrink)

    def cancel(self) -> Limits | None:
        """Give up the probe under way: the limits it departed from, None where there is none."""
        before, self.before = self.before, None
        if before is not None:
            self._left = self._every
        return before

    def is_over(self, tokens: int, seconds: float, expected: float, allowance: float) -> bool:
        """Take in a step of `tokens` under the limits of the probe; whether the probe has ended."""
        assert self.before is not None
        is_seen = tokens > self.before.token_budget
        self._age += 1
        if not is_seen and self._age < PATIENCE:
            return False
        self.was_surprised = is_seen and seconds < (1.0 - SURPRISE) * expected
        self.found_more = self.was_surprised and seconds <= allowance
        self._every = SOONEST if self.found_more else min(2 * self._every, LATEST)
        self._left = self._every
        self.before = None
        return True

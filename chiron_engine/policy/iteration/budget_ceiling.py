"""A token budget that made steps late is not tried again for a while."""

from __future__ import annotations

LATE_STEPS = 2
"""Late steps in a row that no chance explains."""
SHORTEST_HOLD = 256
LONGEST_HOLD = 2048
"""Steps that a ceiling holds: twice as many each time it is to be set anew."""
NO_CEILING = 1 << 30


class BudgetCeiling:
    """Real step times are stairs. A fit to the steps before a stair sees none, leads over it, learns
    what it costs, withdraws, forgets, and leads over it again; the ceiling remembers."""

    __slots__ = ("_hold", "_late", "_left", "tokens")

    def __init__(self) -> None:
        self._late = 0
        self._hold = SHORTEST_HOLD // 2
        self._left = 0
        self.tokens = NO_CEILING
        """Most tokens of a step."""

    def is_hit(self, is_late: bool) -> bool:
        """Called after each step that filled its budget; whether that has to shrink at once."""
        self._late = self._late + 1 if is_late else 0
        return self._late >= LATE_STEPS

    def lower(self, tokens: int) -> None:
        if self._left <= 0:
            self._hold = min(2 * self._hold, LONGEST_HOLD)
        self.tokens = tokens
        self._late = 0
        self._left = self._hold

    def pass_steps(self, steps: int) -> None:
        self._left -= steps
        if self._left <= 0:
            self.lift()

    def lift(self) -> None:
        self.tokens = NO_CEILING

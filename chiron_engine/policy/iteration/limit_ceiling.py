"""A limit that made steps late is not tried again for a while."""

from __future__ import annotations

LATE_STEPS = 2
"""Late steps in a row that chance does not explain."""
SHORTEST_HOLD = 256
LONGEST_HOLD = 2048
"""Steps that a ceiling holds: twice as many each time it is to be set anew."""
NO_CEILING = 1 << 30


class LimitCeiling:
    """Real step times are stairs. A fit to the steps before a stair sees none, leads over it, learns
    what it costs, withdraws, forgets, and leads over it again; the ceiling remembers."""

    __slots__ = ("_hold", "_left", "limit")

    def __init__(self) -> None:
        self._hold = SHORTEST_HOLD // 2
        self._left = 0
        self.limit = NO_CEILING

    def lower(self, limit: int) -> None:
        if self._left <= 0:
            self._hold = min(2 * self._hold, LONGEST_HOLD)
        self.limit = limit
        self._left = self._hold

    def pass_steps(self, steps: int) -> None:
        self._left -= steps
        if self._left <= 0:
            self.lift()

    def lift(self) -> None:
        self._left = 0
        self.limit = NO_CEILING

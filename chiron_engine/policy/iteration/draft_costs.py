"""What guesses add to the seconds of a step, learned from steps that had some."""

from __future__ import annotations

DECAY = 0.98
"""Of what is known, with each step with guesses: it looks back on some fifty."""
FIRST_ROWS = 7
FIRST_WEIGHT = 2.0
"""What is thought at first counts for so many steps, of one request with FIRST_ROWS guesses."""


class DraftCosts:
    """extra = d D + g G for D requests with guesses, G in all: least squares of the extra time relative
    to the time without guesses, so that long steps count no more than short ones."""

    __slots__ = ("_draft_s", "_first", "_row_s", "_sums")

    def __init__(self, row_s: float) -> None:
        """row_s: what a guess is thought to add at first."""
        self._draft_s = 0.0
        self._row_s = row_s
        self._first = row_s
        self._sums = [0.0] * 5
        """Decayed, of D D, D G, G G, D y and G y, for extra seconds y, each over the squared seconds of
        the step without guesses."""

    def seconds(self, drafts: int, guesses: int) -> float:
        return self._draft_s * drafts + self._row_s * guesses

    def observe(self, drafts: int, guesses: int, extra_s: float, plain_s: float) -> None:
        """A step took `extra_s` longer than the `plain_s` > 0 it takes without guesses."""
        most = plain_s * (drafts + guesses)  # no row takes longer than a step
        extra_s = max(-plain_s, min(extra_s, most))
        weight = 1.0 / plain_s**2
        terms = (drafts * drafts, drafts * guesses, guesses * guesses, drafts * extra_s, guesses * extra_s)
        self._sums = [DECAY * s + weight * term for s, term in zip(self._sums, terms, strict=True)]
        self._solve(FIRST_WEIGHT * weight)

    def _solve(self, weight: float) -> None:
        """Neither of the two negative; where one would be, the other explains all."""
        dd, dg, gg, dy, gy = self._sums
        dd += weight
        gg += weight * FIRST_ROWS**2
        gy += weight * FIRST_ROWS**2 * self._first
        determinant = dd * gg - dg * dg
        self._draft_s = (dy * gg - gy * dg) / determinant
        self._row_s = (gy * dd - dy * dg) / determinant
        if self._draft_s < 0.0:
            self._draft_s, self._row_s = 0.0, max(0.0, gy / gg)
        elif self._row_s < 0.0:
            self._draft_s, self._row_s = max(0.0, dy / dd), 0.0

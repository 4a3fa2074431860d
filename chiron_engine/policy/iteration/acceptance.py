"""How often guesses hold, by how many tokens agree before them.

A guess that is not computed is judged all the same, by the token that comes: what is known of a request
stays up to date while nothing is drafted, and costs no step.
"""

from __future__ import annotations

from .prompt_lookup import LONGEST, SHORTEST

FIRST_GUESSES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Share that is taken to hold at first, for SHORTEST to LONGEST tokens that agree."""
ENGINE_MEMORY = 500.0
REQUEST_MEMORY = 30.0
"""Guesses that a share looks back on."""
FIRST_WEIGHT = 4.0
"""Guesses that the first share counts for."""


class Acceptance:
    """Shares that decay, one for each length. over: those that it starts from, the engine's for a request."""

    __slots__ = ("_decay", "_over", "_right", "_seen")

    def __init__(self, over: Acceptance | None = None) -> None:
        self._over = over
        self._decay = 1.0 - 1.0 / (ENGINE_MEMORY if over is None else REQUEST_MEMORY)
        self._right = [0.0] * len(FIRST_GUESSES)
        self._seen = [0.0] * len(FIRST_GUESSES)

    def observe(self, length: int, is_right: bool) -> None:
        """A guess after `length` tokens that agree held, or did not."""
        place = min(length, LONGEST) - SHORTEST
        self._right[place] = self._decay * self._right[place] + is_right
        self._seen[place] = self._decay * self._seen[place] + 1.0
        if self._over is not None:
            self._over.observe(length, is_right)

    def share(self, length: int) -> float:
        """Of guesses after `length` tokens that agree, those that hold."""
        place = min(length, LONGEST) - SHORTEST
        first = FIRST_GUESSES[place] if self._over is None else self._over.share(length)
        return (self._right[place] + FIRST_WEIGHT * first) / (self._seen[place] + FIRST_WEIGHT)

    def held(self, length: int, count: int) -> list[float]:
        """Chance of each of `count` guesses in a row to hold with all before it."""
        chances: list[float] = []
        chance = 1.0
        for number in range(count):
            chance *= self.share(length + number)
            chances.append(chance)
        return chances

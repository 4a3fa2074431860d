"""Guesses at the tokens to come, looked up in the tokens there are.

Text that is copied, quoted or edited repeats itself: what followed the last tokens where they stood
before often follows them again. The last two tokens are looked up among the earlier pairs; of the
latest CANDIDATES places where they stand, the one counts before which most tokens agree as well, up
to LONGEST, and the latest of equals.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

SHORTEST = 2
"""Tokens that agree before a guess."""
LONGEST = 8
"""Tokens that agree, counted up to here: more say no more."""
CANDIDATES = 8
"""Places looked at."""
NONE = -1


class PromptLookup:
    """The tokens of one sequence with their pairs, each token looked at once.

    tokens: all of them. source: position whose token is the guess for the next one, NONE without any.
    length: tokens that agree before it, SHORTEST to LONGEST; 0 without a guess.
    """

    __slots__ = ("_before", "_latest", "length", "source", "tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self.source = NONE
        self.length = 0
        self._latest: dict[int, int] = {}
        """By pair, the position after its latest place."""
        self._before = array("i")
        """By position, the one after the place before of the pair that ends there; NONE without."""
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens that follow those known."""
        known, latest, before = self.tokens, self._latest, self._before
        start = len(known)
        known.extend(tokens)
        last = known[start - 1] if start else 0
        for position in range(start, len(known)):
            token = known[position]
            pair = last << 32 | token
            last = token
            before.append(latest.get(pair, NONE) if position else NONE)
            if position:
                latest[pair] = position + 1
        if len(known) > start:
            self._find()

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens that may come next, none where nothing agrees. Where they reach the end of
        what is known they go on with themselves."""
        if self.source == NONE:
            return []
        found = self.tokens[self.source : self.source + count]
        while found and len(found) < count:
            found += found[: count - len(found)]
        return found

    def _find(self) -> None:
        tokens, before = self.tokens, self._before
        self.source, self.length = NONE, 0
        end = len(tokens)
        place = before[-1]
        for _ in range(CANDIDATES):
            if place == NONE:
                return
            length = SHORTEST
            most = min(LONGEST, place)
            while length < most and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > self.length:
                self.source, self.length = place, length
                if length == LONGEST:
                    return
            place = before[place - 1]


def guesses(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that may follow these."""
    return PromptLookup(tokens).guess(count)

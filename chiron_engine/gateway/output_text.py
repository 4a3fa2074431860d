"""Tokens of one request to the text its client sees: detokenised, and ended at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from .detokenizer import Detokenizer
from .stop_strings import StopStrings


class OutputText:
    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int = 0) -> None:
        """min_tokens: stop strings are looked for only in the text after so many."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._free = min_tokens

    @property
    def is_stopped(self) -> bool:
        """A stop string came; nothing after it is shown."""
        return self._stops.matched is not None

    def feed(self, token_id: int) -> str:
        text = self._detokenizer.feed(token_id)
        if self._free > 0:
            self._free -= 1
            return text
        return self._stops.feed(text)

    def feed_all(self, tokens: Sequence[int], ends_with_stop_token: bool) -> tuple[str, int]:
        """The text of these tokens up to a stop string, and how many it took. The token with which an
        engine stopped is an id, not text."""
        shown = len(tokens) - 1 if ends_with_stop_token else len(tokens)
        pieces, taken = [], 0
        for place, token in enumerate(tokens):
            taken += 1
            if place < shown:
                pieces.append(self.feed(token))
            if self.is_stopped:
                break
        return "".join(pieces), taken

    def finish(self) -> str:
        """What was held back, unless a stop string ends in it."""
        return self._stops.feed(self._detokenizer.finish()) + self._stops.finish()

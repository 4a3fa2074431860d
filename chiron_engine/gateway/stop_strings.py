"""Ends a text at the first stop string, wherever the borders between its pieces fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to a stop string, and holds back an end that may yet become one.

    The match that is complete first wins; of two complete at the same character, the longer. So
    the result depends on the text alone, not on how it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, and for one string in place of a list."""
        if isinstance(stops, str):
            raise ValueError(f"stop is the string {stops!r}; it must be a list of strings")
        if "" in stops:
            raise ValueError("a stop string is empty; it must hold at least one character")
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is safe to show. After a match `matched` is set and nothing more comes."""
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        self._held += text
        found = self._first_match()
        if found is not None:
            start, self.matched = found
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._possible_beginning()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The text that was held back for a match that did not come."""
        shown, self._held = self._held, ""
        return shown

    def _first_match(self) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, start, stop)
        for stop in self._stops:
            start = self._held.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _possible_beginning(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(self._held), len(self._stops[0]) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

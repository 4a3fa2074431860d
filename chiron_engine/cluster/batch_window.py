"""Which of the batch lines that wait are in memory: the first ones, in order of when they are due."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .batch_records import PendingLine

Place = tuple[float, int]
FIRST: Place = (-math.inf, 0)
LAST: Place = (math.inf, 0)


@dataclass(frozen=True, slots=True)
class WindowChange:
    """enter: lines that are in memory from now on, in order. leave: lines that are not any more."""

    enter: list[PendingLine]
    leave: list[PendingLine]


class BatchWindow:
    """Invariant: every line of the store that waits, with a place up to `horizon`, is here. So the line
    to run next is, though there may be millions after it."""

    def __init__(self, size: int) -> None:
        """size: lines to which it is filled; it holds at most twice as many."""
        self.size = size
        self.horizon = FIRST
        self._lines: dict[int, PendingLine] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, line_id: int) -> bool:
        return line_id in self._lines

    @property
    def wants_more(self) -> bool:
        """Whether the lines after the horizon are to be read: there are some, and it is half empty."""
        return self.horizon != LAST and 2 * len(self._lines) <= self.size

    def extend(self, page: Sequence[PendingLine], is_last: bool) -> WindowChange:
        """The next lines of the store after the horizon. is_last: there are no more."""
        if is_last:
            self.horizon = LAST
        elif page:
            self.horizon = page[-1].place
        return WindowChange(self._take_in(page), [])

    def offer(self, lines: Iterable[PendingLine]) -> WindowChange:
        """New lines of the store. Those due before the horizon come in; where that makes too many, the
        last ones go out, which moves the horizon."""
        early = [line for line in lines if line.place <= self.horizon]
        if len(self._lines) + len(early) <= 2 * self.size:
            return WindowChange(self._take_in(early), [])
        before = self._lines
        ordered = sorted({**before, **{line.line_id: line for line in early}}.values(), key=_place)
        kept, dropped = ordered[: self.size], ordered[self.size :]
        self.horizon = kept[-1].place
        self._lines = {line.line_id: line for line in kept}
        return WindowChange(
            [line for line in kept if line.line_id not in before],
            [line for line in dropped if line.line_id in before],
        )

    def remove(self, line_id: int) -> None:
        """The line waits no more: it was started, or has its end."""
        self._lines.pop(line_id, None)

    def _take_in(self, lines: Iterable[PendingLine]) -> list[PendingLine]:
        entering = sorted((line for line in lines if line.line_id not in self._lines), key=_place)
        self._lines.update((line.line_id, line) for line in entering)
        return entering


def _place(line: PendingLine) -> Place:
    return line.place

"""Which waiting lines are in memory: always the first ones, however lines come and go."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.cluster.batch_records import LineState, PendingLine
from chiron_engine.cluster.batch_window import LAST, BatchWindow, WindowChange

SIZE, PAGE = 4, 3


def pending(line_id: int, due: float) -> PendingLine:
    return PendingLine(line_id, "b", line_id, LineState.QUEUED, 3, 5, 3600.0, 2.0, 0.0, due, 0)


def ids(change: WindowChange) -> tuple[list[int], list[int]]:
    return [line.line_id for line in change.enter], [line.line_id for line in change.leave]


class Store:
    """Waiting lines in their order, as the window reads them."""

    def __init__(self) -> None:
        self.lines: dict[int, PendingLine] = {}

    def page(self, after: tuple[float, int]) -> list[PendingLine]:
        rest = sorted((line.place, line) for line in self.lines.values() if line.place > after)
        return [line for _, line in rest[:PAGE]]


def fill(window: BatchWindow, store: Store, known: set[int]) -> None:
    while window.wants_more:
        page = store.page(window.horizon)
        apply(window.extend(page, len(page) < PAGE), known)


def apply(change: WindowChange, known: set[int]) -> None:
    entering, leaving = ids(change)
    assert not known & set(entering), "a line came in twice"
    assert set(leaving) <= known, "a line went out that was not in"
    known.difference_update(leaving)
    known.update(entering)


def test_a_short_queue_is_whole_in_memory() -> None:
    window = BatchWindow(SIZE)
    assert window.wants_more
    assert ids(window.extend([pending(1, 5.0), pending(2, 6.0)], is_last=True)) == ([1, 2], [])
    assert (window.horizon, window.wants_more) == (LAST, False)
    assert ids(window.offer([pending(3, 1.0)])) == ([3], [])


def test_an_urgent_line_comes_in_and_pushes_the_last_ones_out() -> None:
    window = BatchWindow(2)
    window.extend([pending(n, 10.0 + n) for n in range(4)], is_last=True)
    assert ids(window.offer([pending(9, 1.0), pending(8, 99.0)])) == ([9], [1, 2, 3])
    assert (window.horizon, len(window)) == ((10.0, 0), 2)
    assert ids(window.offer([pending(7, 11.0)])) == ([], [])  # after the horizon: read later
    window.remove(9)
    assert window.wants_more


DUE = st.integers(0, 9).map(float)


@given(st.lists(st.one_of(st.lists(DUE, max_size=15), st.integers(0, 20)), max_size=30))
def test_what_is_in_memory_is_the_front_of_the_queue(steps: list[list[float] | int]) -> None:
    """A list submits lines so due; a number starts so many of the first ones."""
    window, store = BatchWindow(SIZE), Store()
    known: set[int] = set()
    next_id = 1
    for step in steps:
        if isinstance(step, list):
            new = [pending(next_id + n, due) for n, due in enumerate(step)]
            next_id += len(new)
            store.lines.update((line.line_id, line) for line in new)
            apply(window.offer(new), known)
        else:
            first = sorted((store.lines[line_id] for line_id in known), key=lambda line: line.place)
            for line in first[:step]:
                known.discard(line.line_id)
                del store.lines[line.line_id]
                window.remove(line.line_id)
        fill(window, store, known)
        assert len(window) == len(known) <= 2 * SIZE + PAGE
        waiting = sorted(store.lines.values(), key=lambda line: line.place)
        assert {line.line_id for line in waiting[: len(known)]} == known
        assert len(known) >= min(len(waiting), SIZE // 2)
        assert math.isinf(window.horizon[0]) or len(known) <= len(waiting)

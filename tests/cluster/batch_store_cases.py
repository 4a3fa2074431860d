"""Batches to store in tests."""

from __future__ import annotations

from chiron_engine.cluster.batch_records import NewLine, PendingLine, ResultPage
from chiron_engine.cluster.batch_store import BatchStore
from chiron_engine.cluster.batch_window import FIRST

NOW = 1_000_000.0


def new_line(custom_id: str = "a", request: bytes = b"prompt", **fields: object) -> NewLine:
    values = {"prompt_tokens": 3, "max_tokens": 5, "ttft_slo_s": 3600.0, "itl_slo_s": 2.0, **fields}
    return NewLine(custom_id, request, **values)  # type: ignore[arg-type]


def new_lines(count: int) -> list[NewLine]:
    return [new_line(f"line-{place}", b"request %d" % place) for place in range(count)]


def results_of(store: BatchStore, batch_id: str, limit: int = 1000) -> ResultPage:
    """All pages in one."""
    found, after = [], -1
    while True:
        page = store.results(batch_id, after, limit)
        found += page.results
        if page.next_after is None:
            return ResultPage(tuple(found), None)
        after = page.next_after


def recovered(store: BatchStore, now: float = NOW, page_lines: int = 1000) -> list[PendingLine]:
    """All lines that wait after a new start."""
    store.recover(now)
    found: list[PendingLine] = []
    while page := store.waiting(found[-1].place if found else FIRST, page_lines):
        found += page
    return found

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chiron_engine.cluster.batch_errors import BatchNotFound, BatchStoreFull, BatchStoreLocked
from chiron_engine.cluster.batch_records import LineState, NewBatch
from chiron_engine.cluster.batch_store import BatchStore
from chiron_engine.cluster.batch_store_thread import BatchStoreClosed, BatchStoreThread
from tests.cluster.batch_store_cases import NOW, new_line, new_lines


def in_loop(directory: Path, scenario: Callable[[BatchStoreThread], Awaitable[None]]) -> None:
    async def run() -> None:
        store = await BatchStoreThread.open(directory)
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(run())


def submit(batch_id: str, request: bytes = b"x") -> Callable[[BatchStore], object]:
    return lambda store: store.submit(NewBatch(batch_id), [new_line(request=request)], NOW)


def test_calls_that_wait_together_are_one_commit_and_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = 0

    async def scenario(store: BatchStoreThread) -> None:
        def count(statement: str) -> None:
            nonlocal commits
            commits += statement == "COMMIT"

        await store.call(lambda opened: opened._db.set_trace_callback(count))
        calls = [store.call(submit(f"b{number}")) for number in range(20)]
        calls.insert(7, store.call(lambda opened: opened.get("nothing")))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(outcomes.pop(7), BatchNotFound)
        assert not any(isinstance(outcome, BaseException) for outcome in outcomes)
        assert commits <= 3
        assert len(await store.call(lambda opened: opened.list(100))) == 20

    in_loop(tmp_path, scenario)


def test_on_a_full_disk_what_fits_is_stored(tmp_path: Path) -> None:
    async def scenario(store: BatchStoreThread) -> None:
        def leave_pages(opened: BatchStore) -> None:
            pages = opened._db.execute("PRAGMA page_count").fetchone()[0]
            opened._db.execute(f"PRAGMA max_page_count = {pages + 3}")

        await store.call(leave_pages)
        calls = [store.call(submit("small")), store.call(submit("large", bytes(99_000)))]
        small, large = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(large, BatchStoreFull) and not isinstance(small, BaseException)
        assert [batch.batch_id for batch in await store.call(lambda opened: opened.list())] == ["small"]

    in_loop(tmp_path, scenario)


def test_a_call_of_a_cancelled_caller_is_made_and_others_go_on(tmp_path: Path) -> None:
    async def scenario(store: BatchStoreThread) -> None:
        caller = asyncio.create_task(store.call(submit("left")))
        await asyncio.sleep(0)
        caller.cancel()
        await store.call(submit("stays"))
        assert [b.batch_id for b in await store.call(lambda opened: opened.list())] == ["stays", "left"]

    in_loop(tmp_path, scenario)


def test_close_finishes_what_was_called(tmp_path: Path) -> None:
    async def scenario(store: BatchStoreThread) -> None:
        with pytest.raises(BatchStoreLocked):
            await BatchStoreThread.open(tmp_path)
        call = asyncio.create_task(store.call(lambda s: s.submit(NewBatch("b"), new_lines(3), NOW)))
        await asyncio.sleep(0)
        await store.close()
        assert (await call).is_new
        await store.close()
        with pytest.raises(BatchStoreClosed):
            await store.call(lambda opened: opened.list())

    in_loop(tmp_path, scenario)
    with BatchStore(tmp_path) as store:
        assert store.get("b").counts[LineState.QUEUED] == 3

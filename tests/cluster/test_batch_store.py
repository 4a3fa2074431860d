from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chiron_engine.cluster.batch_checks import BatchLimits
from chiron_engine.cluster.batch_errors import (
    BatchConflict,
    BatchInvalid,
    BatchNotFound,
    BatchStoreError,
    BatchTooLarge,
)
from chiron_engine.cluster.batch_records import BatchStatus, LineState, NewBatch, Progress, RunningLine
from chiron_engine.cluster.batch_store import BatchStore
from chiron_engine.cluster.batch_window import FIRST
from tests.cluster.batch_store_cases import NOW, new_line, new_lines, recovered, results_of

LIMITS = BatchLimits(max_lines=4000, max_line_bytes=1000, max_batch_bytes=60_000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BatchStore]:
    with BatchStore(tmp_path / "state", LIMITS) as store:
        yield store


def submit(store: BatchStore, count: int = 1, batch_id: str = "b", **fields: object) -> list[int]:
    batch = NewBatch(batch_id, **fields)  # type: ignore[arg-type]
    return [line.line_id for line in store.submit(batch, new_lines(count), NOW).lines]


def running(store: BatchStore, count: int = 1, batch_id: str = "b", **fields: object) -> list[int]:
    ids = submit(store, count, batch_id, **fields)
    assert [claim.attempt for claim in store.claim(ids, NOW)] == [1] * count
    return ids


def state_counts(store: BatchStore, batch_id: str = "b") -> dict[str, int]:
    return {state.value: count for state, count in store.get(batch_id).counts.items() if count}


def test_a_batch_is_stored_whole(store: BatchStore) -> None:
    batch = NewBatch("b", "night run", {"team": "é"}, deadline=NOW + 50, expires_at=NOW + 99)
    submitted = store.submit(batch, [new_line("x"), new_line("y", deadline=NOW + 7)], NOW)
    stored = store.get("b")
    assert submitted.is_new and submitted.batch == stored
    assert (stored.name, stored.metadata, stored.total) == ("night run", {"team": "é"}, 2)
    assert (stored.created, stored.deadline, stored.expires_at) == (NOW, NOW + 50, NOW + 99)
    assert stored.counts == dict.fromkeys(LineState, 0) | {LineState.QUEUED: 2}
    assert stored.status is BatchStatus.IN_PROGRESS
    first, second = submitted.lines
    assert (first.line_no, first.deadline, second.line_no, second.deadline) == (0, NOW + 50, 1, NOW + 7)
    assert recovered(store) == [second, first]


def test_files_are_for_their_owner_only(store: BatchStore, tmp_path: Path) -> None:
    submit(store)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    files = list((tmp_path / "state").iterdir())
    assert len(files) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_line_runs_to_its_end(store: BatchStore) -> None:
    (line,) = submit(store)
    (claim,) = store.claim([line], NOW + 1)
    assert (claim.attempt, claim.request, list(claim.produced)) == (1, b"request 0", [])
    assert store.claim([line], NOW + 1) == ()
    assert state_counts(store) == {"running": 1}
    assert store.finish(line, 1, b"output", NOW + 2)
    (result,) = results_of(store, "b").results
    assert (result.custom_id, result.state, result.output) == ("line-0", LineState.DONE, b"output")
    assert (result.error_code, result.ended_at) == ("", NOW + 2)
    assert (store.get("b").status, store.get("b").finished_at) == (BatchStatus.COMPLETED, NOW + 2)
    assert not store.finish(line, 1, b"again", NOW + 3)
    assert not store.fail(line, 1, "late", "late", NOW + 3)
    assert results_of(store, "b").results == (result,)


def test_reports_of_an_old_attempt_are_ignored(store: BatchStore) -> None:
    (line,) = running(store)
    assert store.requeue(line, 1, NOW) is LineState.QUEUED
    store.claim([line], NOW)
    assert not store.finish(line, 1, b"old", NOW)
    assert not store.fail(line, 1, "old", "old", NOW)
    assert store.evict(line, 1, [7], NOW) is None
    assert store.requeue(line, 1, NOW) is None
    assert store.stopped(line, 1, NOW) is None
    store.checkpoint([Progress(line, 1, [1, 2, 3])])
    assert state_counts(store) == {"running": 1}
    assert store.requeue(line, 2, NOW) is LineState.QUEUED
    assert list(store.claim([line], NOW)[0].produced) == []


def test_an_evicted_line_resumes_from_its_tokens(store: BatchStore) -> None:
    (line,) = running(store)
    store.checkpoint([Progress(line, 1, [1, 2])])
    assert store.evict(line, 1, [1, 2, 2**32 - 1], NOW) is LineState.EVICTED
    assert recovered(store)[0].produced == 3
    (claim,) = store.claim([line], NOW)
    assert (claim.attempt, list(claim.produced)) == (2, [1, 2, 2**32 - 1])
    store.checkpoint([Progress(line, 2, [1])])  # late: it has more by now
    assert store.requeue(line, 2, NOW) is LineState.QUEUED
    assert list(store.claim([line], NOW)[0].produced) == [1, 2, 2**32 - 1]


def test_a_failed_line_says_why(store: BatchStore) -> None:
    (line,) = running(store)
    assert store.fail(line, 1, "engine_lost", "three engines were lost with it", NOW)
    (result,) = results_of(store, "b").results
    assert result.state is LineState.FAILED
    assert (result.error_code, result.error_message) == ("engine_lost", "three engines were lost with it")
    assert store.get("b").status is BatchStatus.COMPLETED


def test_cancel(store: BatchStore) -> None:
    ids = running(store, 4)
    store.evict(ids[0], 1, [5], NOW)
    store.finish(ids[1], 1, b"done", NOW)
    withdrawn = store.cancel("b", NOW + 1)
    assert withdrawn.ended == (ids[0],)
    assert withdrawn.to_stop == (RunningLine(ids[2], 1), RunningLine(ids[3], 1))
    assert store.get("b").status is BatchStatus.CANCELLING
    assert store.cancel("b", NOW + 2).to_stop == withdrawn.to_stop
    assert store.finish(ids[2], 1, b"just in time", NOW + 3)
    assert store.stopped(ids[3], 1, NOW + 4) is LineState.CANCELLED
    assert store.stopped(ids[3], 1, NOW + 4) is None
    batch = store.get("b")
    assert (batch.status, batch.cancelled_at, batch.finished_at) == (
        BatchStatus.CANCELLED,
        NOW + 1,
        NOW + 4,
    )
    assert [result.state.value for result in results_of(store, "b").results] == [
        "cancelled",
        "done",
        "done",
        "cancelled",
    ]
    assert results_of(store, "b").results[0].error_code == "batch_cancelled"
    after = store.cancel("b", NOW + 9)
    assert (after.ended, after.to_stop, store.get("b")) == ((), (), batch)


@pytest.mark.parametrize("how", ["evict", "requeue", "recover"])
def test_a_line_to_be_stopped_does_not_come_back(store: BatchStore, how: str) -> None:
    (line,) = running(store)
    store.cancel("b", NOW)
    if how == "evict":
        assert store.evict(line, 1, [1], NOW) is LineState.CANCELLED
    elif how == "requeue":
        assert store.requeue(line, 1, NOW) is LineState.CANCELLED
    else:
        assert recovered(store) == []
    assert state_counts(store) == {"cancelled": 1}


def test_nobody_stops_a_line_that_was_not_withdrawn(store: BatchStore) -> None:
    (line,) = running(store)
    assert store.stopped(line, 1, NOW) is None
    assert state_counts(store) == {"running": 1}


def test_expiry(store: BatchStore) -> None:
    ids = running(store, 3, expires_at=NOW + 10)
    store.requeue(ids[0], 1, NOW)
    store.finish(ids[1], 1, b"done", NOW)
    keeps_waiting = submit(store, 1, "patient", deadline=NOW + 5)
    assert store.expire(NOW + 9).ended == ()
    withdrawn = store.expire(NOW + 10)
    assert (withdrawn.ended, withdrawn.to_stop) == ((ids[0],), (RunningLine(ids[2], 1),))
    assert store.expire(NOW + 11).to_stop == ()
    assert store.stopped(ids[2], 1, NOW + 11) is LineState.EXPIRED
    assert store.get("b").status is BatchStatus.EXPIRED
    results = results_of(store, "b").results
    assert [result.error_code for result in results] == ["batch_expired", "", "batch_expired"]
    assert [line.line_id for line in recovered(store, NOW + 12)] == keeps_waiting


def test_lines_that_wait_come_in_order_of_deadlines_and_in_pages(store: BatchStore) -> None:
    offsets = [40.0, 10.0, 30.0, 10.0, 20.0, 10.0, 50.0, None]
    lines = [
        new_line(f"{i}", deadline=None if offset is None else NOW + offset)
        for i, offset in enumerate(offsets)
    ]
    ids = [line.line_id for line in store.submit(NewBatch("b"), lines, NOW).lines]
    store.claim(ids[:4], NOW)
    store.finish(ids[2], 1, b"", NOW)
    assert [line.line_no for line in store.waiting(FIRST, 9)] == [5, 4, 6, 7]
    assert [line.line_no for line in recovered(store, page_lines=3)] == [1, 3, 5, 4, 0, 6, 7]
    assert store.get("b").counts[LineState.RUNNING] == 0
    second = store.waiting(FIRST, 2)[1]
    assert [line.line_no for line in store.waiting(second.place, 2)] == [5, 4]


def test_listing_pages_from_the_newest(store: BatchStore) -> None:
    for number in range(5):
        submit(store, 1, f"b{number}")
    assert [batch.batch_id for batch in store.list(2)] == ["b4", "b3"]
    assert [batch.batch_id for batch in store.list(2, after="b3")] == ["b2", "b1"]
    assert [batch.batch_id for batch in store.list(9, after="b1")] == ["b0"]
    with pytest.raises(BatchNotFound, match="no batch with the id 'nothing'"):
        store.list(after="nothing")


def test_results_are_paged_by_lines_and_by_bytes(store: BatchStore) -> None:
    ids = running(store, 6)
    for line in (ids[0], ids[2], ids[3], ids[5]):
        store.finish(line, 1, b"x" * 100, NOW)
    page = store.results("b", limit=2)
    assert ([r.line_no for r in page.results], page.next_after) == ([0, 2], 2)
    assert [r.line_no for r in store.results("b", after=2, limit=2).results] == [3, 5]
    assert store.results("b", after=2, limit=2).next_after is None
    assert store.results("b", after=3, max_bytes=1).results[0].line_no == 5
    assert [r.line_no for r in store.results("b", max_bytes=150).results] == [0, 2]
    assert [r.line_no for r in results_of(store, "b", 1).results] == [0, 2, 3, 5]


def test_submitting_again_changes_nothing(store: BatchStore) -> None:
    batch, lines = NewBatch("b", deadline=NOW + 10), new_lines(2)
    first = store.submit(batch, lines, NOW)
    again = store.submit(replace(batch, deadline=NOW + 14), lines, NOW + 4)
    assert (again.is_new, again.lines, again.batch) == (False, (), first.batch)
    made = [replace(line, content=line.request, request=b"made") for line in lines]
    assert not store.submit(batch, made, NOW).is_new
    others = [
        (replace(batch, name="other"), lines),
        (replace(batch, metadata={"a": "b"}), lines),
        (replace(batch, deadline=NOW + 11), lines),
        (replace(batch, expires_at=NOW + 11), lines),
        (batch, lines[:1]),
        (batch, lines[::-1]),
        (batch, [lines[0], replace(lines[1], request=b"other")]),
        (batch, [lines[0], replace(lines[1], max_tokens=6)]),
        (batch, [lines[0], replace(lines[1], deadline=NOW + 3)]),
    ]
    for other, other_lines in others:
        with pytest.raises(BatchConflict, match="id b exists and has other content"):
            store.submit(other, other_lines, NOW)
    assert store.get("b") == first.batch


def test_delete(store: BatchStore) -> None:
    ids = running(store, 2)
    with pytest.raises(BatchConflict, match="cancel it"):
        store.delete("b")
    for line in ids:
        store.finish(line, 1, b"", NOW)
    store.delete("b")
    for operation in (store.get, store.results, store.delete, lambda name: store.cancel(name, NOW)):
        with pytest.raises(BatchNotFound):
            operation("b")
    assert not any(store.counts().values())
    assert min(submit(store, 1)) > max(ids)  # late reports of a deleted line find no other one


def test_counts_over_batches(store: BatchStore) -> None:
    assert store.counts() == dict.fromkeys(LineState, 0)
    ids = running(store, 3)
    submit(store, 2, "c")
    store.finish(ids[0], 1, b"", NOW)
    counts = store.counts()
    assert (counts[LineState.QUEUED], counts[LineState.RUNNING], counts[LineState.DONE]) == (2, 2, 1)
    assert sum(counts.values()) == 5


def test_no_time_stamp_moves_back(store: BatchStore) -> None:
    first, second = running(store, 2)
    store.finish(first, 1, b"", NOW + 100)
    store.finish(second, 1, b"", NOW - 3600)
    assert [result.ended_at for result in results_of(store, "b").results] == [NOW + 100, NOW]
    assert store.get("b").finished_at == NOW + 100


BAD_BATCHES = [
    (NewBatch("b", deadline=NOW), [new_line()], "deadline is 0.000 s in the past"),
    (NewBatch("b", expires_at=NOW - 2), [new_line()], "expires_at is 2.000 s in the past"),
    (NewBatch("b", deadline=math.nan), [new_line()], "deadline is nan"),
    (NewBatch("b/../c"), [new_line()], r"batch_id is 'b/../c'; it must be 1 to 128"),
    (NewBatch(""), [new_line()], "batch_id is ''"),
    (NewBatch("b", "n" * 257), [new_line()], "name has 257 bytes"),
    (NewBatch("b", metadata={str(i): "" for i in range(17)}), [new_line()], "metadata has 17 pairs"),
    (NewBatch("b", metadata={"k": "v" * 513}), [new_line()], r"metadata\['k'\] has 513 bytes"),
    (NewBatch("b"), [], "the batch has no lines"),
    (NewBatch("b"), [new_line("")], "custom_id of line 0 is empty"),
    (NewBatch("b"), [new_line("c" * 257)], "custom_id of line 0 has 257 bytes"),
    (NewBatch("b"), [new_line("\ud800")], "no valid Unicode"),
    (NewBatch("b"), [new_line("a"), new_line("b"), new_line("a")], "lines 0 and 2 have the same custom_id"),
    (NewBatch("b"), [new_line(deadline=NOW - 1)], "the deadline of line 0 is 1.000 s in the past"),
    (NewBatch("b"), [new_line(deadline=math.inf)], "the deadline of line 0 is inf"),
    (NewBatch("b"), [new_line(prompt_tokens=0)], "prompt_tokens of line 0 is 0"),
    (NewBatch("b"), [new_line(max_tokens=-1)], "max_tokens of line 0 is -1"),
    (NewBatch("b"), [new_line(itl_slo_s=-1.0)], "itl_slo_s of line 0 is -1.0"),
    (NewBatch("b"), [new_line(ttft_slo_s=math.nan)], "ttft_slo_s of line 0 is nan"),
]
TOO_LARGE = [
    ([new_line("big", b"x" * 1001)], r"request of line 0 \('big'\) takes 1001 bytes; at most 1000"),
    (new_lines(4001), "the batch has 4001 lines; at most 4000"),
    ([new_line(str(i), b"x" * 1000) for i in range(61)], "take 61000 bytes; at most 60000"),
]


@pytest.mark.parametrize(("batch", "lines", "says"), BAD_BATCHES)
def test_bad_batches_are_named_and_not_stored(store: BatchStore, batch, lines, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BatchInvalid, match=says):
        store.submit(batch, lines, NOW)
    assert store.list() == () and not any(store.counts().values())


@pytest.mark.parametrize(("lines", "says"), TOO_LARGE)
def test_large_batches_are_named_and_not_stored(store: BatchStore, lines, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BatchTooLarge, match=says):
        store.submit(NewBatch("b"), lines, NOW)
    assert store.list() == ()


def test_several_calls_are_one_transaction(store: BatchStore) -> None:
    first, second = running(store, 2)
    with pytest.raises(RuntimeError, match="no more"), store.transaction():
        assert store.finish(first, 1, b"", NOW)
        store.cancel("b", NOW)
        raise RuntimeError("no more")
    assert state_counts(store) == {"running": 2}
    with store.transaction():
        store.finish(first, 1, b"", NOW)
        store.finish(second, 1, b"", NOW)
    assert state_counts(store) == {"done": 2}


def test_a_block_within_a_block_is_undone_alone(store: BatchStore) -> None:
    first, second = running(store, 2)
    with store.transaction():
        store.finish(first, 1, b"", NOW)
        with pytest.raises(RuntimeError), store.transaction():
            store.finish(second, 1, b"", NOW)
            raise RuntimeError
    assert state_counts(store) == {"done": 1, "running": 1}


def test_an_undone_transaction_does_not_go_on(store: BatchStore) -> None:
    (line,) = running(store)
    with pytest.raises(BatchStoreError), store.transaction():
        store._db.execute("ROLLBACK")
        store.finish(line, 1, b"", NOW)
    assert state_counts(store) == {"running": 1}
    assert store.finish(line, 1, b"", NOW)

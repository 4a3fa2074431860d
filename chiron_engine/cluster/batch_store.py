"""The durable queue of batch requests: one SQLite file, one writer.

A batch is a list of lines, each one request. A line is QUEUED, is claimed (RUNNING, with a new
attempt), may come back (EVICTED, or QUEUED when its engine was lost) with the tokens it has, and
ends once: DONE, FAILED, EXPIRED or CANCELLED. Reports of a running line name the attempt they are
about; those of an earlier attempt are ignored, so that a line has exactly one result, whichever
engines still hold copies of it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .batch_checks import BatchLimits, check_batch, check_times, digest, shown
from .batch_errors import BatchConflict, BatchNotFound, BatchStoreError, translated_errors
from .batch_insert import insert_batch
from .batch_records import (
    Batch,
    Claim,
    LineResult,
    LineState,
    NewBatch,
    NewLine,
    PendingLine,
    Progress,
    ResultPage,
    RunningLine,
    Submitted,
    Withdrawn,
    pack_tokens,
    unpack_tokens,
)
from .batch_schema import open_database
from .state_lock import StateLock

DATABASE_NAME = "batch.sqlite3"
ERRORS = {
    LineState.CANCELLED: ("batch_cancelled", "This request was cancelled with its batch."),
    LineState.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}
BATCH_COLUMNS = (
    "batch_no, batch_id, name, metadata, created, deadline, expires_at, cancelled_at, finished_at, total"
)


class BatchStore:
    """Synchronous, for one thread: the one that opens it makes every call and closes it (any other
    gets sqlite3.ProgrammingError). Every call that changes something is one transaction, on the disk
    when it returns; `transaction` makes one of several.

    `now` is wall time. A clock that jumps back moves no time stamp back.

    Any call may raise BatchStoreFull (undone; repeat it once there is space), BatchStoreCorrupt
    or BatchStoreError.
    """

    def __init__(self, directory: Path, limits: BatchLimits | None = None) -> None:
        """directory: made where it is missing; held exclusively until `close`.

        Raises BatchStoreLocked where another process holds it, BatchStoreCorrupt for a damaged file
        or one of an unknown version, which is left as it is, and OSError.
        """
        self.limits = limits or BatchLimits()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = StateLock(directory)
        self._is_open = False
        try:
            with translated_errors():
                self._db = open_database(directory / DATABASE_NAME)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory back. Safe to call twice."""
        self._db.close()
        self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls within one transaction: all of them or, when it raises, none. What they
        return may be told to others only after the end of the block. A block within a block that
        raises is undone alone, where the outer one goes on."""
        if self._is_open:
            with self._savepoint():
                yield
            return
        with translated_errors():
            self._db.execute("BEGIN IMMEDIATE")
            self._is_open = True
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                raise
            finally:
                self._is_open = False

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        # SQLite undoes the whole transaction on some errors; going on would commit the rest of it.
        if not self._db.in_transaction:
            raise BatchStoreError("the transaction was undone after an error; leave its block")
        with translated_errors():
            self._db.execute("SAVEPOINT nested")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK TO nested")
                    self._db.execute("RELEASE nested")
                raise
            self._db.execute("RELEASE nested")

    # Batches.

    def submit(self, batch: NewBatch, lines: Sequence[NewLine], now: float) -> Submitted:
        """Store the whole batch, its lines QUEUED and numbered from 0. Submitting it again changes
        nothing.

        Raises BatchInvalid (nothing stored) and BatchConflict where the id has other content.
        """
        check_batch(batch, lines, self.limits)
        content = digest(batch, lines, now)
        with self.transaction():
            known = self._one("SELECT digest FROM batch WHERE batch_id = ?", batch.batch_id)
            if known is not None:
                if known[0] != content:
                    raise BatchConflict(f"a batch with the id {batch.batch_id} exists and has other content")
                return Submitted(self.get(batch.batch_id), (), is_new=False)
            check_times(batch, lines, now)
            pending = insert_batch(self._db, batch, lines, content, now)
            return Submitted(self.get(batch.batch_id), pending, is_new=True)

    def get(self, batch_id: str) -> Batch:
        """Raises BatchNotFound."""
        with translated_errors():
            return self._batch(self._batch_row(batch_id))

    def list(self, limit: int = 20, after: str | None = None) -> tuple[Batch, ...]:
        """Batches, the newest first; those submitted before batch `after`. Raises BatchNotFound."""
        with translated_errors():
            before = self._batch_row(after)[0] if after is not None else 2**63 - 1
            query = f"SELECT {BATCH_COLUMNS} FROM batch WHERE batch_no < ? ORDER BY batch_no DESC LIMIT ?"
            return tuple(self._batch(row) for row in self._all(query, before, limit))

    def results(
        self, batch_id: str, after: int = -1, limit: int = 1000, max_bytes: int = 4 << 20
    ) -> ResultPage:
        """Results of lines numbered over `after`, by number. A page ends after `limit` lines or with
        the one that brings its outputs to `max_bytes`. While the batch is in progress, later pages
        may have ended more; what a page held once it holds for ever. Raises BatchNotFound."""
        with translated_errors():
            batch_no = self._batch_row(batch_id)[0]
            found: list[LineResult] = []
            size = 0
            for row in self._db.execute(
                "SELECT line_no, custom_id, state, output, error_code, error_message, ended_at"
                " FROM line JOIN result USING (line_id) WHERE batch_no = ? AND line_no > ?"
                " ORDER BY line_no LIMIT ?",
                (batch_no, after, limit + 1),
            ):
                if found and (len(found) == limit or size >= max_bytes):
                    return ResultPage(tuple(found), found[-1].line_no)
                found.append(LineResult(row[0], row[1], LineState(row[2]), *row[3:]))
                size += len(found[-1].output)
            return ResultPage(tuple(found), None)

    def cancel(self, batch_id: str, now: float) -> Withdrawn:
        """Waiting lines are CANCELLED at once; running ones are for the caller to stop. A second
        cancel names those that still run; one of a finished batch does nothing.
        Raises BatchNotFound."""
        with self.transaction():
            batch_no = self._batch_row(batch_id)[0]
            self._db.execute(
                "UPDATE batch SET cancelled_at = max(changed_at, ?)"
                " WHERE batch_no = ? AND cancelled_at IS NULL AND finished_at IS NULL",
                (now, batch_no),
            )
            ended = self._end_waiting(batch_no, LineState.CANCELLED, now)
            to_stop = self._all(
                "UPDATE line SET ending = 'cancelled' WHERE batch_no = ? AND state = 'running'"
                " RETURNING line_id, attempt",
                batch_no,
            )
            return Withdrawn(ended, tuple(RunningLine(*row) for row in to_stop))

    def expire(self, now: float) -> Withdrawn:
        """Give up the unfinished lines of batches whose `expires_at` has come: as `cancel`, but they
        end EXPIRED. A running line is named once."""
        ended: list[int] = []
        to_stop: list[RunningLine] = []
        due = "SELECT batch_no FROM batch WHERE expires_at <= ? AND finished_at IS NULL"
        if not self._read(due, now):
            return Withdrawn((), ())
        with self.transaction():
            for (batch_no,) in self._all(due, now):
                ended += self._end_waiting(batch_no, LineState.EXPIRED, now)
                rows = self._all(
                    "UPDATE line SET ending = 'expired' WHERE batch_no = ? AND state = 'running'"
                    " AND ending IS NULL RETURNING line_id, attempt",
                    batch_no,
                )
                to_stop += (RunningLine(*row) for row in rows)
        return Withdrawn(tuple(ended), tuple(to_stop))

    def delete(self, batch_id: str) -> None:
        """Remove a finished batch with its results. Raises BatchNotFound, and BatchConflict while
        lines are unfinished."""
        with self.transaction():
            batch = self.get(batch_id)
            if batch.finished_at is None:
                raise BatchConflict(f"batch {batch_id} has unfinished lines; cancel it before deleting it")
            self._db.execute("DELETE FROM batch WHERE batch_id = ?", (batch_id,))

    def counts(self) -> dict[LineState, int]:
        """Lines of all batches by state, every state named."""
        rows = self._read("SELECT state, sum(lines) FROM tally GROUP BY state")
        return dict.fromkeys(LineState, 0) | {LineState(state): lines for state, lines in rows}

    # Lines.

    def claim(self, line_ids: Iterable[int], now: float) -> tuple[Claim, ...]:
        """Take waiting lines to run them, each with a new attempt. Lines that do not wait (any more)
        are left out."""
        with self.transaction():
            claims = (self._claim(line_id, now) for line_id in line_ids)
            return tuple(claim for claim in claims if claim is not None)

    def checkpoint(self, progress: Iterable[Progress]) -> None:
        """Keep the tokens that running lines have. Reports of old attempts, and shorter ones than
        what is kept, are ignored."""
        with self.transaction():
            self._db.executemany(
                "UPDATE line SET produced = ?1 WHERE line_id = ?2 AND attempt = ?3 AND state = 'running'"
                " AND length(produced) < length(?1)",
                ((pack_tokens(line.produced), line.line_id, line.attempt) for line in progress),
            )

    def evict(self, line_id: int, attempt: int, produced: Iterable[int], now: float) -> LineState | None:
        """The engine handed the line back. Returns its state now: EVICTED, or the end it was to be
        stopped for; None where the attempt is not the running one, and nothing changed."""
        return self._hand_back(line_id, attempt, produced, LineState.EVICTED, now)

    def requeue(
        self, line_id: int, attempt: int, now: float, produced: Iterable[int] = ()
    ) -> LineState | None:
        """As `evict`, for a line whose engine was lost: it is QUEUED, with the longer of `produced`
        and what was kept."""
        return self._hand_back(line_id, attempt, produced, LineState.QUEUED, now)

    def finish(self, line_id: int, attempt: int, output: bytes, now: float) -> bool:
        """The line is DONE. False where the attempt is not the running one, and nothing changed."""
        with self.transaction():
            return self._end(line_id, attempt, LineState.DONE, now, output=output)

    def fail(self, line_id: int, attempt: int, error_code: str, error_message: str, now: float) -> bool:
        """The line is FAILED. False where the attempt is not the running one, and nothing changed."""
        with self.transaction():
            return self._end(line_id, attempt, LineState.FAILED, now, error=(error_code, error_message))

    def stopped(self, line_id: int, attempt: int, now: float) -> LineState | None:
        """A line that `cancel` or `expire` named has been stopped. Returns the end it has now; None
        where the attempt is not the running one or nobody asked for a stop, and nothing changed."""
        with self.transaction():
            ending = self._ending(line_id, attempt)
            if ending is None or not self._end(line_id, attempt, ending, now, error=ERRORS[ending]):
                return None
            return ending

    def recover(self, now: float) -> None:
        """For the start, when nothing runs: lines that ran are QUEUED again with the tokens kept, or
        ended where they were to be stopped."""
        with self.transaction():
            for line_id, attempt in self._all("SELECT line_id, attempt FROM line WHERE state = 'running'"):
                self.requeue(line_id, attempt, now)

    def waiting(self, after: tuple[float, int], limit: int) -> tuple[PendingLine, ...]:
        """Lines that wait to be run whose `PendingLine.place` is over `after`, in that order."""
        rows = self._read(
            "SELECT line_id, batch_id, line_no, state, prompt_tokens, max_tokens, ttft_slo_s, itl_slo_s,"
            " created, line.deadline, length(produced) / 4 FROM line JOIN batch USING (batch_no)"
            " WHERE ended_at IS NULL AND state <> 'running' AND (due, line_id) > (?, ?)"
            " ORDER BY due, line_id LIMIT ?",
            *after,
            limit,
        )
        return tuple(_pending_line(row) for row in rows)

    def _claim(self, line_id: int, now: float) -> Claim | None:
        row = self._one(
            "UPDATE line SET state = 'running', attempt = attempt + 1, changed_at = max(changed_at, ?1),"
            " started_at = coalesce(started_at, max(changed_at, ?1))"
            " WHERE line_id = ?2 AND state IN ('queued', 'evicted') RETURNING attempt, produced",
            now,
            line_id,
        )
        if row is None:
            return None
        request = self._one("SELECT message FROM request WHERE line_id = ?", line_id)
        return Claim(line_id, row[0], request[0], unpack_tokens(row[1]))

    def _hand_back(
        self, line_id: int, attempt: int, produced: Iterable[int], state: LineState, now: float
    ) -> LineState | None:
        with self.transaction():
            ended = self.stopped(line_id, attempt, now)
            if ended is not None:
                return ended
            changed = self._db.execute(
                "UPDATE line SET state = ?1, changed_at = max(changed_at, ?2),"
                " produced = CASE WHEN length(produced) < length(?3) THEN ?3 ELSE produced END"
                " WHERE line_id = ?4 AND attempt = ?5 AND state = 'running'",
                (state, now, pack_tokens(produced), line_id, attempt),
            ).rowcount
            return state if changed else None

    def _ending(self, line_id: int, attempt: int) -> LineState | None:
        row = self._one(
            "SELECT ending FROM line WHERE line_id = ? AND attempt = ? AND state = 'running'",
            line_id,
            attempt,
        )
        return None if row is None or row[0] is None else LineState(row[0])

    def _end(
        self,
        line_id: int,
        attempt: int,
        state: LineState,
        now: float,
        output: bytes = b"",
        error: tuple[str, str] = ("", ""),
    ) -> bool:
        changed = self._db.execute(
            "UPDATE line SET state = ?1, ending = NULL, produced = x'', changed_at = max(changed_at, ?2),"
            " ended_at = max(changed_at, ?2) WHERE line_id = ?3 AND attempt = ?4 AND state = 'running'",
            (state, now, line_id, attempt),
        ).rowcount
        if changed:
            self._db.execute("INSERT INTO result VALUES (?, ?, ?, ?)", (line_id, output, *error))
        return bool(changed)

    def _end_waiting(self, batch_no: int, state: LineState, now: float) -> tuple[int, ...]:
        rows = self._all(
            "UPDATE line SET state = ?1, produced = x'', changed_at = max(changed_at, ?2),"
            " ended_at = max(changed_at, ?2) WHERE batch_no = ?3 AND state IN ('queued', 'evicted')"
            " RETURNING line_id",
            state,
            now,
            batch_no,
        )
        results = ((line_id, b"", *ERRORS[state]) for (line_id,) in rows)
        self._db.executemany("INSERT INTO result VALUES (?, ?, ?, ?)", results)
        return tuple(line_id for (line_id,) in rows)

    def _batch_row(self, batch_id: str) -> Any:
        row = self._one(f"SELECT {BATCH_COLUMNS} FROM batch WHERE batch_id = ?", batch_id)
        if row is None:
            raise BatchNotFound(f"there is no batch with the id {shown(batch_id)}")
        return row

    def _batch(self, row: Any) -> Batch:
        batch_no, batch_id, name, metadata, *rest = row
        values: Any = (batch_id, name, json.loads(metadata), *rest, self._counts(batch_no))
        return Batch(*values)

    def _counts(self, batch_no: int) -> Mapping[LineState, int]:
        rows = self._all("SELECT state, lines FROM tally WHERE batch_no = ?", batch_no)
        return {LineState(state): lines for state, lines in rows}

    def _read(self, query: str, *values: object) -> Any:
        with translated_errors():
            return self._all(query, *values)

    def _all(self, query: str, *values: object) -> Any:
        return self._db.execute(query, values).fetchall()

    def _one(self, query: str, *values: object) -> Any:
        return self._db.execute(query, values).fetchone()


def _pending_line(row: Any) -> PendingLine:
    """From the columns that `BatchStore.waiting` asks for."""
    line_id, batch_id, line_no, state, *rest = row
    values: Any = (line_id, batch_id, line_no, LineState(state), *rest)
    return PendingLine(*values)

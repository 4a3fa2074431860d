"""Writing a new batch into the database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from .batch_records import LineState, NewBatch, NewLine, PendingLine


def insert_batch(
    db: sqlite3.Connection, batch: NewBatch, lines: Sequence[NewLine], content: bytes, now: float
) -> tuple[PendingLine, ...]:
    """Within the caller's transaction. content: the digest by which the batch is known again."""
    batch_no = db.execute(
        "INSERT INTO batch (batch_id, name, metadata, digest, created, changed_at, deadline,"
        " expires_at, total) VALUES (?1, ?2, ?3, ?4, ?5, ?5, ?6, ?7, ?8)",
        (
            batch.batch_id,
            batch.name,
            json.dumps(dict(batch.metadata)),
            content,
            now,
            batch.deadline,
            batch.expires_at,
            len(lines),
        ),
    ).lastrowid
    tally = ((batch_no, state, len(lines) if state is LineState.QUEUED else 0) for state in LineState)
    db.executemany("INSERT INTO tally VALUES (?, ?, ?)", tally)
    first_id = _next_line_id(db)
    pending = tuple(
        _pending(first_id + line_no, line_no, batch, line, now) for line_no, line in enumerate(lines)
    )
    db.executemany(
        "INSERT INTO line (line_id, batch_no, line_no, custom_id, prompt_tokens, max_tokens,"
        " ttft_slo_s, itl_slo_s, deadline, due, changed_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                new.line_id,
                batch_no,
                new.line_no,
                line.custom_id,
                line.prompt_tokens,
                line.max_tokens,
                line.ttft_slo_s,
                line.itl_slo_s,
                new.deadline,
                now + line.ttft_slo_s if new.deadline is None else new.deadline,
                now,
            )
            for new, line in zip(pending, lines, strict=True)
        ),
    )
    requests = ((new.line_id, line.request) for new, line in zip(pending, lines, strict=True))
    db.executemany("INSERT INTO request VALUES (?, ?)", requests)
    return pending


def _next_line_id(db: sqlite3.Connection) -> int:
    """Never one that a deleted line had."""
    last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'line'").fetchone()
    return 1 if last is None else int(last[0]) + 1


def _pending(line_id: int, line_no: int, batch: NewBatch, line: NewLine, now: float) -> PendingLine:
    return PendingLine(
        line_id,
        batch.batch_id,
        line_no,
        LineState.QUEUED,
        line.prompt_tokens,
        line.max_tokens,
        line.ttft_slo_s,
        line.itl_slo_s,
        now,
        batch.deadline if line.deadline is None else line.deadline,
        0,
    )

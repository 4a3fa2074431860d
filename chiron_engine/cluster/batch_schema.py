"""The batch store's database: its tables, and how a file is opened, created or refused."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from .batch_errors import BatchStoreCorrupt, BatchStoreError

APPLICATION_ID = 0x43484952  # "CHIR", in the header of every file of ours
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
MAGIC = b"SQLite format 3\0"
MIN_FILE_BYTES = 512  # the smallest page

# `line` holds what changes as a line moves; requests and outputs, written once and large, are kept
# apart so that a move does not rewrite them. `result` has the line as its key: a second result of a
# line cannot be stored. `ending` is the end a running line will have once it has been stopped.
# `due` orders lines: the deadline, else when the first token is due. `tally` counts lines by state,
# kept by the trigger, which also marks the batch as finished with its last line.
SCHEMA = (
    """
    CREATE TABLE batch (
      batch_no INTEGER PRIMARY KEY AUTOINCREMENT,
      batch_id TEXT NOT NULL UNIQUE,
      name TEXT NOT NULL,
      metadata TEXT NOT NULL,
      digest BLOB NOT NULL,
      created REAL NOT NULL,
      changed_at REAL NOT NULL,
      deadline REAL,
      expires_at REAL,
      cancelled_at REAL,
      finished_at REAL,
      total INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE line (
      line_id INTEGER PRIMARY KEY AUTOINCREMENT,
      batch_no INTEGER NOT NULL REFERENCES batch ON DELETE CASCADE,
      line_no INTEGER NOT NULL,
      custom_id TEXT NOT NULL,
      prompt_tokens INTEGER NOT NULL,
      max_tokens INTEGER NOT NULL,
      ttft_slo_s REAL NOT NULL,
      itl_slo_s REAL NOT NULL,
      deadline REAL,
      due REAL NOT NULL,
      state TEXT NOT NULL DEFAULT 'queued' CHECK (
        state IN ('queued', 'running', 'evicted', 'done', 'failed', 'expired', 'cancelled')),
      ending TEXT CHECK (ending IN ('expired', 'cancelled')),
      attempt INTEGER NOT NULL DEFAULT 0,
      produced BLOB NOT NULL DEFAULT x'',
      changed_at REAL NOT NULL,
      started_at REAL,
      ended_at REAL,
      UNIQUE (batch_no, line_no),
      UNIQUE (batch_no, custom_id)
    )
    """,
    """
    CREATE TABLE request (
      line_id INTEGER PRIMARY KEY REFERENCES line ON DELETE CASCADE,
      message BLOB NOT NULL
    )
    """,
    """
    CREATE TABLE result (
      line_id INTEGER PRIMARY KEY REFERENCES line ON DELETE CASCADE,
      output BLOB NOT NULL DEFAULT x'',
      error_code TEXT NOT NULL DEFAULT '',
      error_message TEXT NOT NULL DEFAULT ''
    )
    """,
    """
    CREATE TABLE tally (
      batch_no INTEGER NOT NULL REFERENCES batch ON DELETE CASCADE,
      state TEXT NOT NULL,
      lines INTEGER NOT NULL CHECK (lines >= 0),
      PRIMARY KEY (batch_no, state)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX line_pending ON line (due, line_id) WHERE ended_at IS NULL",
    "CREATE INDEX line_running ON line (batch_no) WHERE state = 'running'",
    "CREATE INDEX batch_expiring ON batch (expires_at) WHERE expires_at IS NOT NULL AND finished_at IS NULL",
    """
    CREATE TRIGGER line_moved AFTER UPDATE OF state ON line WHEN OLD.state <> NEW.state BEGIN
      UPDATE tally SET lines = lines - 1 WHERE batch_no = NEW.batch_no AND state = OLD.state;
      UPDATE tally SET lines = lines + 1 WHERE batch_no = NEW.batch_no AND state = NEW.state;
      UPDATE batch SET
        changed_at = max(changed_at, NEW.changed_at),
        finished_at = CASE WHEN EXISTS (
            SELECT 1 FROM tally WHERE batch_no = NEW.batch_no AND lines > 0
            AND state IN ('queued', 'running', 'evicted'))
          THEN NULL ELSE max(changed_at, NEW.changed_at) END
        WHERE batch_no = NEW.batch_no;
    END
    """,
)


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, made with our tables where there is none. The connection is the calling
    thread's own, in autocommit mode: transactions are begun and ended in so many words.

    Raises BatchStoreCorrupt for a damaged or foreign file or an unknown version, which it leaves as
    it is, and sqlite3.DatabaseError.
    """
    _refuse_other_files(path)
    # Made here so that nobody else may read it: it holds prompts. Its companions take its mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        is_new = _check_file(db, path)
        _configure(db)
        if is_new:
            _create(db)
    except BaseException:
        db.close()
        raise
    return db


def _refuse_other_files(path: Path) -> None:
    """SQLite takes very short files for empty databases and overwrites them; and with an empty
    database it deletes the log, and what was committed to the log."""
    start = _first_bytes(path)
    if start and not (start.startswith(MAGIC) and len(start) == MIN_FILE_BYTES):
        raise BatchStoreCorrupt(f"{path} is no SQLite database; move it away to start empty")
    log = path.with_name(path.name + "-wal")
    if not start and log.exists() and log.stat().st_size > 0:
        raise BatchStoreCorrupt(
            f"{path} is empty or missing but its log {log.name} is not; restore it from a copy, "
            "or move the log away to start empty"
        )


def _first_bytes(path: Path) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(MIN_FILE_BYTES)


def _check_file(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is empty. Reads only."""
    application = _pragma(db, "application_id")
    version = _pragma(db, "user_version")
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application == 0 and tables == 0:
        return True
    if application != APPLICATION_ID:
        raise BatchStoreCorrupt(f"{path} is the database of another program; choose another state directory")
    if version != SCHEMA_VERSION:
        raise BatchStoreCorrupt(
            f"{path} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
            "use the program that wrote it, or another state directory"
        )
    damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise BatchStoreCorrupt(
            f"{path} is damaged ({damage}); restore it from a copy, or move it away to start empty"
        )
    return False


def _configure(db: sqlite3.Connection) -> None:
    mode = _pragma(db, "journal_mode = WAL")
    if mode != "wal":
        raise BatchStoreError(
            f"the file system of the state directory allows no write-ahead log (journal mode {mode}); "
            "use a local disk"
        )
    # FULL: a commit is on the disk before it returns.
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")


def _create(db: sqlite3.Connection) -> None:
    """All or nothing: a file is ours, with every table, or empty."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for statement in SCHEMA:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _pragma(db: sqlite3.Connection, name: str) -> int | str:
    value: int | str = db.execute(f"PRAGMA {name}").fetchone()[0]
    return value

"""What can go wrong with the batch store, by what the caller can do about it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

# What SQLite reports when the file system takes no more bytes: no space, a quota, a file size limit.
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PRIMARY = 0xFF  # extended result codes carry the primary one in their low byte


class BatchStoreError(RuntimeError):
    """The store could not do it; what was stored before is as it was."""


class BatchStoreLocked(BatchStoreError):
    """Another process works on the state directory. `pid` is None where it could not be read."""

    def __init__(self, message: str, pid: int | None) -> None:
        super().__init__(message)
        self.pid = pid


class BatchStoreFull(BatchStoreError):
    """The disk takes no more. The operation was undone; it can be repeated once there is space."""


class BatchStoreCorrupt(BatchStoreError):
    """The file is damaged or none of ours, or of another version. It is left as it is."""


class BatchNotFound(BatchStoreError):
    """No batch has this id."""


class BatchConflict(BatchStoreError):
    """The id belongs to a batch with other content, or the batch is not in a state for this."""


class BatchInvalid(ValueError):
    """The submitted batch is wrong; nothing of it was stored."""


class BatchTooLarge(BatchInvalid):
    """The submitted batch, or a line of it, is over a size limit; nothing of it was stored."""


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise SQLite's errors as ours; a wrong thread or wrong SQL stays a programming error."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        raise _translate(error) from error


def _translate(error: sqlite3.DatabaseError) -> BatchStoreError:
    code = getattr(error, "sqlite_errorcode", 0)
    if code in _FULL:
        return BatchStoreFull("the disk of the batch store is full; free some space and try again")
    if code & _PRIMARY in _CORRUPT:
        return BatchStoreCorrupt(
            f"the batch store is damaged ({error}); restore it from a copy, or move it away to start empty"
        )
    return BatchStoreError(f"the batch store failed: {error}")

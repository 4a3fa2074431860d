"""One coordinator at a time per state directory."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from .batch_errors import BatchStoreLocked

LOCK_NAME = "lock"
# The holder writes its pid right after it has the lock; who finds none asks again for so long.
PID_PATIENCE_S = 0.5
PID_POLL_S = 0.02


class StateLock:
    """An exclusive lock on a directory, held until `release` or the end of the process.

    The lock is on an open file beside what it guards, so the kernel drops it with its process: a
    dead holder never blocks. The file stays, with the holder's pid in it, or empty.
    """

    def __init__(self, directory: Path) -> None:
        """Takes the lock at once. Raises BatchStoreLocked, naming the holder, where it is held."""
        self._path = directory / LOCK_NAME
        # Not inheritable, so that no child started by this process holds the lock after it.
        self._fd: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = self._holder(self._fd)
            self._close()
            who = "another process" if pid is None else f"process {pid}"
            message = f"{directory} is in use by {who}; stop it or choose another state directory"
            raise BatchStoreLocked(message, pid) from None
        except BaseException:
            self._close()
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back. Safe to call twice."""
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
            self._close()

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @staticmethod
    def _holder(fd: int) -> int | None:
        patience_ends = time.monotonic() + PID_PATIENCE_S
        while True:
            text = os.pread(fd, 32, 0).strip()
            if text.isdigit():
                return int(text)
            if time.monotonic() >= patience_ends:
                return None
            time.sleep(PID_POLL_S)

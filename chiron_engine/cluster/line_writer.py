"""Appends lines to a file from a thread of its own, so that a slow disk holds up nobody."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

FLUSH_S = 0.25


class LineWriter:
    """Lines reach the system within FLUSH_S of `write`, then survive a kill of this process. A write
    that fails (a full disk) is logged and ends the file; the caller goes on."""

    def __init__(self, path: Path, beginning: bytes) -> None:
        """Goes on after what the file holds, which must start with `beginning`; a line cut short is
        ended first. Raises OSError where the file cannot be written, is another writer's, or holds
        something else."""
        self._path = path
        self._file = _open(path, beginning)
        self._lines: deque[bytes] = deque()
        if _is_cut(self._file):
            self._lines.append(b"\n")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="line-writer", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """With its newline."""
        if not self._file.closed:
            self._lines.append(line)

    def close(self) -> None:
        """Returns when everything is written."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._file:
                while not self._closing.wait(FLUSH_S):
                    self._flush()
                self._flush()
        except OSError as error:
            log.error("nothing more is written to %s: %s", self._path, error.strerror)
        self._lines.clear()

    def _flush(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if lines:
            self._file.write(b"".join(lines))
            self._file.flush()


def _open(path: Path, beginning: bytes) -> BinaryIO:
    file = path.open("ab+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        found = file.read(len(beginning))
        if not beginning.startswith(found):
            raise OSError(errno.EINVAL, "it exists and holds something else")
    except BlockingIOError as error:
        file.close()
        raise OSError(error.errno, "another process writes it") from error
    except OSError:
        file.close()
        raise
    return file


def _is_cut(file: BinaryIO) -> bool:
    """Whether its last line has no end."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"

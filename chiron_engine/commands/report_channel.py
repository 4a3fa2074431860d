"""Where a headless engine writes its reports: the standard output it was started with."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from chiron_engine.cluster.engine_report import Report, encode


class ReportChannel:
    """Takes standard output for reports alone: whatever else prints goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, report: Report) -> None:
        """From any thread. A parent that is gone reads nothing, which is no error here."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            print(encode(report), file=self._file, flush=True)

"""Where a headless engine writes its reports: the standard output it was started with."""

from __future__ import annotations

import contextlib
import os
import sys

from chiron_engine.cluster.engine_report import Report, encode


class ReportChannel:
    """Takes standard output for reports alone: whatever else prints goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def send(self, report: Report) -> None:
        """From any thread. A parent that is gone reads nothing, which is no error here; nothing is kept
        that would be written later."""
        line = (encode(report) + "\n").encode()
        with contextlib.suppress(BrokenPipeError):
            while line:
                line = line[os.write(self._descriptor, line) :]

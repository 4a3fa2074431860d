"""What a command shows on standard error: load phases and progress. Standard output is data."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class LoadPhases:
    """Shows the phases of loading a model, one line each with the time it took.

    Call it with (phase, fraction done). On a terminal the current line counts up in percent.
    """

    def __init__(self, label: str = "", stream: TextIO | None = None, *, live: bool = True) -> None:
        """live: count up on a terminal; False where several share it."""
        self._prefix = f"[{label}] " if label else ""
        self._stream = stream or sys.stderr
        self._live = live and self._stream.isatty()
        self._phase: str | None = None
        self._since = 0.0
        self._percent = -1

    def __call__(self, phase: str, fraction: float) -> None:
        if phase != self._phase:
            self.done()
            if fraction >= 1.0:  # a fact about the load, not a phase that takes time
                self._stream.write(f"{self._prefix}{phase}\n")
                return
            self._phase, self._since, self._percent = phase, time.monotonic(), -1
        percent = int(100 * min(max(fraction, 0.0), 1.0))
        if self._live and percent != self._percent:
            self._percent = percent
            self._stream.write(f"\r{self._prefix}{phase} {percent}%\x1b[K")
            self._stream.flush()

    def done(self) -> None:
        """Close the current phase, if there is one."""
        if self._phase is None:
            return
        start = "\r" if self._live else ""
        end = "\x1b[K\n" if self._live else "\n"
        seconds = time.monotonic() - self._since
        self._stream.write(f"{start}{self._prefix}{self._phase} ({seconds:.1f} s){end}")
        self._stream.flush()
        self._phase = None


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

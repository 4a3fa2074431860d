"""What a command shows on standard error: load phases and progress. Standard output is data."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from .durations import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress


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


class RunProgress:
    """A bar of a run's own time on standard error, for runs over two seconds, on a terminal only."""

    QUIET_S = 2.0

    def __init__(self, label: str, until_s: float, stream: TextIO | None = None) -> None:
        """until_s: seconds of the run at the last arrival; what comes after leaves the bar full."""
        self._label = label
        self._until_s = until_s
        self._stream = stream or sys.stderr
        self._since = time.monotonic()
        self._bar: Progress | None = None

    def __call__(self, now_s: float, state: str | None = None) -> None:
        """state: what to show beside the bar, by default the time simulated."""
        if not self._stream.isatty() or time.monotonic() - self._since < self.QUIET_S:
            return
        bar = self._bar = self._bar or self._start()
        shown = f"{format_duration(now_s)} simulated" if state is None else state
        bar.update(self._task, completed=min(now_s, self._until_s), state=shown)

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._task = bar.add_task(self._label, total=self._until_s or None, state="")
        bar.start()
        return bar

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()

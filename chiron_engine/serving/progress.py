"""The progress bar of offline generation."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class GenerationProgress:
    """Requests done of all, and output tokens a second, on standard error. Nothing unless `shown`."""

    def __init__(self, total: int, shown: bool) -> None:
        self._tokens = 0
        self._bar = None
        if not shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total, tokens=0)

    def add(self, tokens: int) -> None:
        """One request is done; it has this many output tokens."""
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=1, tokens=self._tokens)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

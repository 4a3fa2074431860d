"""Errors of setting up the runtime. Imports no torch, so that a command can catch them cheaply."""

from __future__ import annotations


class OutOfMemory(MemoryError):
    """Not enough memory to start. `needed` and `available` are bytes."""

    def __init__(self, what: str, needed: int, available: int, advice: str) -> None:
        needed_mib, available_mib = needed / 2**20, max(available, 0) / 2**20
        super().__init__(
            f"{what} needs {needed_mib:,.0f} MiB; {available_mib:,.0f} MiB are available: {advice}"
        )
        self.needed = needed
        self.available = available

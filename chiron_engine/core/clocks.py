"""Where time comes from: the machine, or a simulation."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary origin; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let this much time pass."""
        ...

    def sleep_until(self, when: float) -> None:
        """Let time pass until `when`; return at once where it has passed."""
        ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def sleep_until(self, when: float) -> None:
        self.sleep(max(0.0, when - self.now()))


class VirtualClock:
    """Time that moves only when told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self._now += seconds

    def sleep_until(self, when: float) -> None:
        if when > self._now:
            self._now = when

    def advance_to(self, when: float) -> None:
        """Raises ValueError for a time in the past."""
        if when < self._now:
            raise ValueError(f"the clock is at {self._now}; it cannot go back to {when}")
        self._now = when

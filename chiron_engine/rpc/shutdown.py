"""A clean stop on the first signal, an immediate one on the second, a hard exit when neither works."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

HARD_EXIT_GRACE_S = 10.0


class Shutdown:
    """`drain` is set by the first request to stop, `now` by the second; both on one event loop.

    From the first request on a thread counts down `drain_timeout_s` plus 10 s and then ends the
    process with exit code 1, however busy the event loop is; `finished` calls it off.
    """

    def __init__(self, drain_timeout_s: float, *, hard_exit_grace_s: float = HARD_EXIT_GRACE_S) -> None:
        """Call on the event loop that waits for the events."""
        self.drain_timeout_s = drain_timeout_s
        self.drain = asyncio.Event()
        self.now = asyncio.Event()
        self.signal: int | None = None  # the first one received
        self._hard_exit_after_s = drain_timeout_s + hard_exit_grace_s
        self._loop = asyncio.get_running_loop()
        self._requests = 0
        self._finished = threading.Event()

    def install(self) -> None:
        """Handle SIGTERM and SIGINT. Main thread only.

        Plain handlers, not asyncio's: those wait for the event loop, which may never come back.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def request(self) -> None:
        """Ask for a stop, as a signal would. Callable from any thread and from signal handlers."""
        if self._finished.is_set():  # the event loop may be gone
            return
        self._requests += 1
        if self._requests == 1:
            threading.Thread(target=self._watch, name="shutdown-watchdog", daemon=True).start()
        event = self.drain if self._requests == 1 else self.now
        self._loop.call_soon_threadsafe(event.set)

    def finished(self) -> None:
        """The stop is complete, or about to be: no hard exit any more."""
        self._finished.set()

    async def wait_drained(self, *drained: asyncio.Future[Any]) -> bool:
        """Wait for all of `drained`, at most `drain_timeout_s`, and not past a second request.
        Whether all are done."""
        impatient: asyncio.Future[Any] = asyncio.create_task(self.now.wait())
        everything: asyncio.Future[Any] = asyncio.create_task(_all_done(drained))
        await asyncio.wait(
            {impatient, everything}, timeout=self.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        impatient.cancel()
        done = everything.done()
        everything.cancel()
        return done

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        self.request()

    def _watch(self) -> None:
        if not self._finished.wait(self._hard_exit_after_s):
            log.critical("still not stopped %.0f s after the request; exiting", self._hard_exit_after_s)
            os._exit(1)


async def _all_done(futures: Sequence[asyncio.Future[Any]]) -> None:
    if futures:
        await asyncio.wait(futures)

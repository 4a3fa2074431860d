"""A process that another one started: watched and ended by its pidfd, so that a pid taken again is safe."""

from __future__ import annotations

import asyncio
import os
import signal

from .engine_records import start_time


class AdoptedProcess:
    """As much of `asyncio.subprocess.Process` as can be had of a process that is no child. Linux only."""

    def __init__(self, pid: int, started: int) -> None:
        """started: its start time. Raises ProcessLookupError where that process is no more."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        if start_time(pid) != started:  # asked after the descriptor was opened: it is of this process
            os.close(self._fd)
            raise ProcessLookupError(f"process {pid} is another one by now")
        self._loop.add_reader(self._fd, self._end)

    async def wait(self) -> None:
        """Nobody but its parent learns its exit code."""
        await asyncio.shield(self._ended)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError once it has ended."""
        if self._ended.done():
            raise ProcessLookupError(f"process {self.pid} has ended")
        signal.pidfd_send_signal(self._fd, number)

    def _end(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._ended.set_result(None)

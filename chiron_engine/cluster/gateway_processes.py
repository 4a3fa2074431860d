"""Gateways beside the coordinator, a process each, on one port that the kernel spreads connections over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from typing import Any

from .line_readers import read_lines

log = logging.getLogger(__name__)

READY = "ready"
"""What a gateway writes, alone on a line of its standard output, when a request would be served."""
RESTART_S = 1.0


class GatewayProcesses:
    """One that ends is started again, for as long as this is open. Used from one event loop."""

    def __init__(self, command: Sequence[str], count: int, on_log: Callable[[int, str], None]) -> None:
        """command: of a gateway that shares its port; it is told its index and its parent's pid.
        on_log(index, line): what a gateway writes."""
        self._command = [*command, "--parent-pid", str(os.getpid())]
        self._count = count
        self._on_log = on_log
        self._ready = [asyncio.Event() for _ in range(count)]
        self._processes: dict[int, Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(self._count)]

    async def wait_ready(self) -> None:
        """Until each was ready once. Raises RuntimeError where one ends before that."""
        waiting: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(asyncio.gather(*(event.wait() for event in self._ready))),
            *self._keepers,
        }
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            future.result()

    async def drain(self) -> None:
        """Have each end once its requests have."""
        self._closing = True
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def close(self) -> None:
        """End what is left."""
        self._closing = True
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, index: int) -> None:
        while not self._closing:
            try:
                how = f"ended with exit code {await self._run(index)}"
            except OSError as error:  # too many processes or files, for one
                how = f"could not be started: {error.strerror}"
            if self._closing:
                return
            if not self._ready[index].is_set():
                raise RuntimeError(f"gateway {index} {how}, and was never ready")
            log.error("gateway %d %s; it is started again", index, how)
            await asyncio.sleep(RESTART_S)

    async def _run(self, index: int) -> int:
        """One process, to its end. A session of its own: Ctrl-C is for its parent to pass on. Raises
        OSError."""
        process = await asyncio.create_subprocess_exec(
            *self._command, "--index", str(index), stdout=PIPE, stderr=PIPE, start_new_session=True
        )
        self._processes[index] = process
        assert process.stdout is not None
        assert process.stderr is not None
        if self._closing:
            process.terminate()
        logs = asyncio.create_task(self._follow(index, process.stderr))
        async for line in read_lines(process.stdout):
            if line == READY:
                self._ready[index].set()
            else:
                self._on_log(index, line)
        await logs
        code = await process.wait()
        del self._processes[index]
        return code

    async def _follow(self, index: int, stream: asyncio.StreamReader) -> None:
        async for line in read_lines(stream):
            self._on_log(index, line)


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that holds the port, for processes of this user to share, and takes no connection. Raises
    OSError where another has it."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    reserved = socket.socket(family, kind, protocol)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError:
        reserved.close()
        raise
    return reserved

"""Engine processes on this host: start, follow, stop, and leave none behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from chiron_engine.cluster.engine_report import EngineFailed, EngineReady, LoadPhase, Report, decode

RUNTIME_ERROR = 1
CHUNK_BYTES = 1 << 16


class EngineLaunchError(RuntimeError):
    """An engine ended before it was ready. `code` is its exit code, 1 where a signal ended it."""

    def __init__(self, index: int, message: str, code: int) -> None:
        super().__init__(message)
        self.index = index
        self.code = code


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A ready engine. `exited` ends with the exit code (negative: the signal that ended it)."""

    index: int
    ready: EngineReady
    exited: asyncio.Task[int]


def threads_per_engine(engines: int) -> int:
    """An even share of the cores this process may use, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // engines)


class LocalLauncher:
    """Starts copies of one command, each of which reports on its standard output.

    command: arguments of an engine that binds a port of the system's choice; `--parent-pid` is
    added. gpus: where not empty, engine i sees only the i-th. on_phase(index, phase): load
    progress. on_log(index, line): everything else it writes.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        threads: int,
        gpus: Sequence[str] = (),
        on_phase: Callable[[int, LoadPhase], None],
        on_log: Callable[[int, str], None],
    ) -> None:
        self._command = [*command, "--parent-pid", str(os.getpid())]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._gpus = gpus
        self._on_phase = on_phase
        self._on_log = on_log
        self._processes: dict[int, Process] = {}
        self._readers: set[asyncio.Task[None]] = set()

    async def launch(self, index: int) -> RunningEngine:
        """Start engine `index` and wait until it is ready. Raises EngineLaunchError.

        A cancelled launch leaves the process to `stop`.
        """
        # A session of its own: Ctrl-C in a terminal reaches only this process, which then stops
        # its engines in order.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
            env=self._environment_of(index),
        )
        self._processes[index] = process
        verdict: asyncio.Future[EngineReady | EngineFailed] = asyncio.get_running_loop().create_future()
        self._read(self._follow_logs(index, process))
        reports = self._read(self._follow_reports(index, process, verdict))
        exited = asyncio.create_task(process.wait())
        either: list[asyncio.Future[Any]] = [verdict, exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not verdict.done():
            await reports  # the last words of a process that has just ended
        if not verdict.done():
            raise EngineLaunchError(index, *_describe_exit(await exited))
        outcome = verdict.result()
        if isinstance(outcome, EngineFailed):
            raise EngineLaunchError(index, outcome.message, outcome.code)
        return RunningEngine(index, outcome, exited)

    async def stop(self, grace_s: float) -> None:
        """End every engine: SIGTERM, and SIGKILL for what is left after `grace_s` seconds."""
        live = self._live()
        for process in live:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if live:
            await asyncio.wait([asyncio.create_task(process.wait()) for process in live], timeout=grace_s)
        self.kill()
        for process in live:
            await process.wait()
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def kill(self) -> None:
        """SIGKILL to every engine and whatever it started. Safe in any thread."""
        for process in self._live():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _environment_of(self, index: int) -> dict[str, str]:
        if not self._gpus:
            return self._environment
        return {**self._environment, "CUDA_VISIBLE_DEVICES": self._gpus[index]}

    def _live(self) -> list[Process]:
        return [process for process in self._processes.values() if process.returncode is None]

    def _read(self, reading: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(reading)
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)
        return task

    async def _follow_logs(self, index: int, process: Process) -> None:
        assert process.stderr is not None
        async for line in _lines(process.stderr):
            self._on_log(index, line)

    async def _follow_reports(
        self, index: int, process: Process, verdict: asyncio.Future[EngineReady | EngineFailed]
    ) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self._take(index, line, decode(line), verdict)

    def _take(
        self,
        index: int,
        line: str,
        report: Report | None,
        verdict: asyncio.Future[EngineReady | EngineFailed],
    ) -> None:
        if report is None:
            self._on_log(index, line)
        elif isinstance(report, LoadPhase):
            self._on_phase(index, report)
        elif not verdict.done():
            verdict.set_result(report)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length; StreamReader.readline raises on long ones."""
    rest = b""
    while chunk := await stream.read(CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _describe_exit(code: int) -> tuple[str, int]:
    """Message and exit code for an engine that said nothing before it ended."""
    if code == -signal.SIGKILL:
        return "was killed while it loaded; the system does that when memory runs out", RUNTIME_ERROR
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} while it loaded", RUNTIME_ERROR
    return f"ended with exit code {code} while it loaded", code or RUNTIME_ERROR

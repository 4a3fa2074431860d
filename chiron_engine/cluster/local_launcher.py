"""Engine processes on this host: start, follow, stop, and leave none behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from .engine_report import EngineFailed, EngineReady, LoadPhase, Report, decode
from .engines import LaunchError, RunningEngine

RUNTIME_ERROR = 1
CHUNK_BYTES = 1 << 16


def threads_per_engine(engines: int) -> int:
    """An even share of the cores this process may use, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // engines)


class LocalLauncher:
    """Starts copies of one command, each of which reports on its standard output; a `Launcher`.

    command: arguments of an engine that binds a port of the system's choice; `--instance-id` is
    added. gpus: where not empty, each engine sees only one of them, which is free again when its
    process has ended. on_phase(instance_id, phase): load progress. on_log(instance_id, line):
    everything else it writes. outlive: the engines go on when this process is killed, and end by
    themselves when no coordinator comes back for them.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        threads: int,
        gpus: Sequence[str] = (),
        on_phase: Callable[[int, LoadPhase], None],
        on_log: Callable[[int, str], None],
        outlive: bool = False,
    ) -> None:
        self._command = [*command] if outlive else [*command, "--parent-pid", str(os.getpid())]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._gpus = gpus
        self._on_phase = on_phase
        self._on_log = on_log
        self._processes: dict[int, Process] = {}
        self._gpu_of: dict[int, str] = {}
        self._readers: set[asyncio.Task[None]] = set()

    async def launch(self, instance_id: int) -> RunningEngine:
        """Raises LaunchError, also where no GPU is free. A cancelled launch leaves the process to `stop`."""
        # A session of its own: Ctrl-C in a terminal reaches only this process, which then stops
        # its engines in order.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            "--instance-id",
            str(instance_id),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            start_new_session=True,
            env=self._take_gpu(instance_id),
        )
        self._processes[instance_id] = process
        verdict: asyncio.Future[EngineReady | EngineFailed] = asyncio.get_running_loop().create_future()
        self._read(self._follow_logs(instance_id, process))
        reports = self._read(self._follow_reports(instance_id, process, verdict))
        exited = asyncio.create_task(self._wait(instance_id, process))
        either: list[asyncio.Future[Any]] = [verdict, exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not verdict.done():
            await reports  # the last words of a process that has just ended
        if not verdict.done():
            raise LaunchError(*_describe_exit(await exited))
        outcome = verdict.result()
        if isinstance(outcome, EngineFailed):
            await exited  # its GPU is free then
            raise LaunchError(outcome.message, outcome.code)
        return RunningEngine(instance_id, outcome, exited)

    async def stop(self, instance_id: int, grace_s: float) -> None:
        process = self._processes.get(instance_id)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            _kill(process)
            await process.wait()

    async def stop_all(self, grace_s: float) -> None:
        """End every engine: SIGTERM, and SIGKILL for what is left after `grace_s` seconds."""
        await asyncio.gather(*(self.stop(instance_id, grace_s) for instance_id in list(self._processes)))
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def kill(self) -> None:
        """SIGKILL to every engine and whatever it started. Safe in any thread."""
        for process in list(self._processes.values()):
            _kill(process)

    async def _wait(self, instance_id: int, process: Process) -> int:
        code = await process.wait()
        del self._processes[instance_id]
        self._gpu_of.pop(instance_id, None)
        return code

    def _take_gpu(self, instance_id: int) -> dict[str, str]:
        """The environment of an engine with a GPU of its own."""
        if not self._gpus:
            return self._environment
        free = [gpu for gpu in self._gpus if gpu not in self._gpu_of.values()]
        if not free:
            raise LaunchError(f"all {len(self._gpus)} GPUs are taken", RUNTIME_ERROR)
        self._gpu_of[instance_id] = free[0]
        return {**self._environment, "CUDA_VISIBLE_DEVICES": free[0]}

    def _read(self, reading: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(reading)
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)
        return task

    async def _follow_logs(self, instance_id: int, process: Process) -> None:
        assert process.stderr is not None
        async for line in _lines(process.stderr):
            self._on_log(instance_id, line)

    async def _follow_reports(
        self, instance_id: int, process: Process, verdict: asyncio.Future[EngineReady | EngineFailed]
    ) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self._take(instance_id, line, decode(line), verdict)

    def _take(
        self,
        instance_id: int,
        line: str,
        report: Report | None,
        verdict: asyncio.Future[EngineReady | EngineFailed],
    ) -> None:
        if report is None:
            self._on_log(instance_id, line)
        elif isinstance(report, LoadPhase):
            self._on_phase(instance_id, report)
        elif not verdict.done():
            verdict.set_result(report)


def _kill(process: Process) -> None:
    """It, and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


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

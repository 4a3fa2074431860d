"""Engine processes on this host: start, follow, take over, stop, and leave none behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import IO, Any

from .adopted_process import AdoptedProcess
from .engine_records import EngineRecord, EngineRecords, start_time
from .engine_report import EngineFailed, EngineReady, LoadPhase, Report, decode
from .engines import LaunchError, RunningEngine
from .line_readers import follow_lines, read_lines

RUNTIME_ERROR = 1
MISFIT_GRACE_S = 10.0


def threads_per_engine(engines: int) -> int:
    """An even share of the cores this process may use, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // engines)


class LocalLauncher:
    """Starts copies of one command, each of which reports on its standard output; a `Launcher`.

    command: arguments of an engine that binds a port of the system's choice; `--instance-id` is
    added. gpus: where not empty, each engine sees only one of them, which is free again when its
    process has ended. on_phase(instance_id, phase): load progress. on_log(instance_id, line):
    everything else it writes. records: where given, engines that have joined go on when this process
    is killed, for the next one to take over, and end by themselves when none comes; without, and while
    they load, they end with this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        threads: int,
        gpus: Sequence[str] = (),
        on_phase: Callable[[int, LoadPhase], None],
        on_log: Callable[[int, str], None],
        records: EngineRecords | None = None,
    ) -> None:
        self._command = tuple(command)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._gpus = gpus
        self._on_phase = on_phase
        self._on_log = on_log
        self._records = records
        self._processes: dict[int, Process | AdoptedProcess] = {}
        self._gpu_of: dict[int, str] = {}
        self._record_of: dict[int, EngineRecord] = {}
        self._survivors: list[EngineRecord] = []
        self._readers: set[asyncio.Task[None]] = set()

    @property
    def survivors(self) -> Sequence[EngineRecord]:
        return self._survivors

    async def recover(self, most: int) -> None:
        """Find what a killed coordinator has left here. Engines that were started with other arguments,
        and those beyond `most`, are ended."""
        if self._records is None:
            return
        left = self._records.survivors()
        fitting = [record for record in left if record.boot_id and self._fits(record)][:most]
        await asyncio.gather(*(_end_misfit(record) for record in left if record not in fitting))
        for record in left:
            if record not in fitting:
                self._records.remove(record.name)
        self._survivors = fitting

    def adopt(self, instance_id: int, survivor: EngineRecord) -> asyncio.Future[int | None]:
        """Raises LaunchError where it has ended."""
        self._survivors.remove(survivor)
        try:
            process = AdoptedProcess(survivor.pid, survivor.start_time)
        except OSError as error:
            raise LaunchError(f"process {survivor.pid} has ended: {error}", RUNTIME_ERROR) from None
        self._processes[instance_id] = process
        self._record_of[instance_id] = survivor
        if survivor.gpu:
            self._gpu_of[instance_id] = survivor.gpu
        exited = asyncio.create_task(self._wait(instance_id, process))
        self._follow_log_file(instance_id, survivor, exited, from_end=True)
        return exited

    async def launch(self, instance_id: int) -> RunningEngine:
        """Raises LaunchError, also where no GPU is free. A cancelled launch leaves the process to `stop`."""
        process = await self._start(instance_id)
        verdict: asyncio.Future[EngineReady | EngineFailed] = asyncio.get_running_loop().create_future()
        reports = self._read(self._follow_reports(instance_id, process, verdict))
        exited = asyncio.create_task(self._wait(instance_id, process))
        if (record := self._record_of.get(instance_id)) is not None:
            self._follow_log_file(instance_id, record, exited)
        else:
            assert process.stderr is not None
            self._read(self._follow_logs(instance_id, read_lines(process.stderr)))
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

    def joined(self, instance_id: int, boot_id: str, load_s: float) -> None:
        record = self._record_of.get(instance_id)
        if self._records is not None and record is not None and record.boot_id != boot_id:
            record = self._record_of[instance_id] = replace(record, boot_id=boot_id, load_s=load_s)
            self._records.write(record)

    async def stop(self, instance_id: int, grace_s: float) -> None:
        process = self._processes.get(instance_id)
        if process is not None:
            await _stop(process, grace_s)

    async def stop_all(self, grace_s: float) -> None:
        """End every engine: SIGTERM, and SIGKILL for what is left after `grace_s` seconds."""
        await asyncio.gather(*(self.stop(instance_id, grace_s) for instance_id in list(self._processes)))
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _start(self, instance_id: int) -> Process:
        """What outlives this process must not write into a pipe that ends here: its log is a file. The
        reports stop once it is ready."""
        records, environment = self._records, self._take_gpu(instance_id)
        command = [*self._command, "--parent-pid", str(os.getpid()), "--instance-id", str(instance_id)]
        name = "" if records is None else records.new_name(instance_id)
        log: AbstractContextManager[IO[bytes] | int] = nullcontext(PIPE)
        if records is not None:
            command.append("--outlive-parent")
            log = records.log_path(name).open("wb")
        with log as stderr:
            # A session of its own: Ctrl-C in a terminal reaches only this process, which then stops
            # its engines in order.
            process = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=PIPE, stderr=stderr, start_new_session=True, env=environment
            )
        self._processes[instance_id] = process
        if records is not None:
            gpu, started = self._gpu_of.get(instance_id, ""), start_time(process.pid) or 0
            record = EngineRecord(name, process.pid, started, self._command, gpu)
            self._record_of[instance_id] = record
            records.write(record)
        return process

    async def _wait(self, instance_id: int, process: Process | AdoptedProcess) -> int | None:
        code = await process.wait()
        del self._processes[instance_id]
        self._gpu_of.pop(instance_id, None)
        record = self._record_of.pop(instance_id, None)
        if self._records is not None and record is not None:
            self._records.remove(record.name)
        return code

    def _fits(self, record: EngineRecord) -> bool:
        return record.command == self._command and (not self._gpus or record.gpu in self._gpus)

    def _take_gpu(self, instance_id: int) -> dict[str, str]:
        """The environment of an engine with a GPU of its own."""
        if not self._gpus:
            return self._environment
        taken = {*self._gpu_of.values(), *(record.gpu for record in self._survivors)}
        free = [gpu for gpu in self._gpus if gpu not in taken]
        if not free:
            raise LaunchError(f"all {len(self._gpus)} GPUs are taken", RUNTIME_ERROR)
        self._gpu_of[instance_id] = free[0]
        return {**self._environment, "CUDA_VISIBLE_DEVICES": free[0]}

    def _read(self, reading: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(reading)
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)
        return task

    def _follow_log_file(
        self,
        instance_id: int,
        record: EngineRecord,
        exited: asyncio.Future[int | None],
        *,
        from_end: bool = False,
    ) -> None:
        assert self._records is not None
        path = self._records.log_path(record.name)
        if path.exists():
            start = path.stat().st_size if from_end else 0
            self._read(self._follow_logs(instance_id, follow_lines(path, start, exited.done)))

    async def _follow_logs(self, instance_id: int, lines: AsyncIterator[str]) -> None:
        async for line in lines:
            self._on_log(instance_id, line)

    async def _follow_reports(
        self, instance_id: int, process: Process, verdict: asyncio.Future[EngineReady | EngineFailed]
    ) -> None:
        assert process.stdout is not None
        async for line in read_lines(process.stdout):
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


async def _stop(process: Process | AdoptedProcess, grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        _kill(process)
        await process.wait()


def _kill(process: Process | AdoptedProcess) -> None:
    """It, and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(0)  # its pid is its own, and so is its group, as long as it lives
        os.killpg(process.pid, signal.SIGKILL)


async def _end_misfit(record: EngineRecord) -> None:
    with contextlib.suppress(OSError):
        await _stop(AdoptedProcess(record.pid, record.start_time), MISFIT_GRACE_S)


def _describe_exit(code: int | None) -> tuple[str, int]:
    """Message and exit code for an engine that said nothing before it ended."""
    if code == -signal.SIGKILL:
        return "was killed while it loaded; the system does that when memory runs out", RUNTIME_ERROR
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name} while it loaded", RUNTIME_ERROR
    return f"ended with exit code {code} while it loaded", code or RUNTIME_ERROR

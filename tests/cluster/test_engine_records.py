"""What is left of engines for the next coordinator, and whom it may touch."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from chiron_engine.cluster.adopted_process import AdoptedProcess
from chiron_engine.cluster.engine_records import EngineRecord, EngineRecords, start_time
from chiron_engine.cluster.engines import LaunchError
from chiron_engine.cluster.local_launcher import LocalLauncher

COMMAND = [sys.executable, "engine"]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        yield process
        process.kill()


def record_of(pid: int, name: str = "0-a", boot_id: str = "b", gpu: str = "") -> EngineRecord:
    return EngineRecord(name, pid, start_time(pid) or 0, tuple(COMMAND), gpu, boot_id, 3.0)


def launcher(records: EngineRecords, gpus: Sequence[str] = ()) -> LocalLauncher:
    def nothing(*_: object) -> None: ...

    return LocalLauncher(COMMAND, threads=1, gpus=gpus, on_phase=nothing, on_log=nothing, records=records)


def test_records_come_back_whole_and_other_files_go(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    records = EngineRecords(tmp_path)
    alive = record_of(process.pid)
    reused = replace(alive, name="1-b", start_time=alive.start_time - 1)
    for record in (alive, reused, replace(alive, name="2-c", pid=1 << 22)):
        records.write(record)
        records.log_path(record.name).write_text("line\n")
    folder = records.log_path("").parent
    (folder / "3-d.json").write_text('{"pid": "x"}')
    (folder / "4-e.json").write_text("[")
    assert records.survivors() == [alive]
    assert {path.name for path in folder.iterdir()} == {"0-a.json", "0-a.log"}


def test_a_pid_that_was_taken_again_is_not_touched(process: subprocess.Popen[bytes]) -> None:
    async def check() -> None:
        with pytest.raises(ProcessLookupError):
            AdoptedProcess(process.pid, (start_time(process.pid) or 0) + 1)

    asyncio.run(check())
    assert process.poll() is None


def test_what_does_not_fit_is_ended_and_what_fits_is_taken_over(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    async def check() -> None:
        records = EngineRecords(tmp_path)
        fitting = record_of(process.pid, gpu="1")
        records.write(fitting)
        others = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(3)]
        wrong_command = replace(record_of(others[0].pid, "1-b"), command=("other",))
        for record in (
            wrong_command,
            record_of(others[1].pid, "2-c", boot_id=""),
            record_of(others[2].pid, "3-d"),
        ):
            records.write(record)
        local = launcher(records, ["0", "1"])
        await local.recover(most=1)
        assert list(local.survivors) == [fitting]
        assert [other.wait(5) for other in others] == [-signal.SIGTERM] * 3

        exited = local.adopt(7, fitting)
        assert not local.survivors
        assert local._take_gpu(8)["CUDA_VISIBLE_DEVICES"] == "0"
        with pytest.raises(LaunchError, match="all 2 GPUs are taken"):
            local._take_gpu(9)
        asyncio.get_running_loop().call_later(0.1, process.poll)
        os.kill(process.pid, signal.SIGKILL)
        assert await asyncio.wait_for(exited, 5) is None
        assert records.survivors() == []
        assert local._take_gpu(9)["CUDA_VISIBLE_DEVICES"] == "1"
        await local.stop_all(1.0)

    asyncio.run(check())


def test_one_that_has_ended_meanwhile_cannot_be_taken_over(tmp_path: Path) -> None:
    async def check() -> None:
        records = EngineRecords(tmp_path)
        with subprocess.Popen(["sleep", "60"]) as process:
            record = record_of(process.pid)
            records.write(record)
            local = launcher(records)
            await local.recover(most=1)
            process.kill()
        with pytest.raises(LaunchError, match="has ended"):
            local.adopt(0, record)

    asyncio.run(check())

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chiron_engine.cluster.engine_report import EngineFailed, EngineReady, LoadPhase, decode, encode
from chiron_engine.cluster.engines import LaunchError
from chiron_engine.cluster.gpus import usable_gpus
from chiron_engine.cluster.local_launcher import LocalLauncher, threads_per_engine

FAKE = Path(__file__).parent / "fake_engine.py"


def fake_nvidia_smi(folder: Path, output: str, code: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("torch", "visible", "answer", "gpus"),
    [
        ("2.13.0+cpu", None, ("0\\n1\\n", 0), []),
        ("2.13.0", None, ("0\\n1\\n", 0), ["0", "1"]),
        ("2.13.0", None, ("no driver", 9), []),
        ("2.13.0", "3, GPU-ab", ("0\\n", 0), ["3", "GPU-ab"]),
        ("2.13.0", "", ("0\\n", 0), []),
        ("2.13.0", "-1", ("0\\n", 0), []),
    ],
)
def test_usable_gpus(
    torch: str,
    visible: str | None,
    answer: tuple[str, int],
    gpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_nvidia_smi(tmp_path, *answer)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("importlib.metadata.version", lambda name: torch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_gpus() == gpus


class Seen:
    def __init__(self) -> None:
        self.phases: list[tuple[int, LoadPhase]] = []
        self.logs: list[tuple[int, str]] = []

    def launcher(self, behaviour: str, gpus: tuple[str, ...] = ()) -> LocalLauncher:
        return LocalLauncher(
            [sys.executable, str(FAKE), behaviour],
            threads=3,
            gpus=gpus,
            on_phase=lambda index, phase: self.phases.append((index, phase)),
            on_log=lambda index, line: self.logs.append((index, line)),
        )


def is_alive(pid: int) -> bool:
    """Alive and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.parametrize(
    "report",
    [LoadPhase("load weights", 0.25), EngineReady("[::1]:8", 12, "/m"), EngineFailed(4, 'no "memory"\nleft')],
)
def test_reports_survive_a_line(report: LoadPhase | EngineReady | EngineFailed) -> None:
    line = encode(report)
    assert "\n" not in line
    assert decode(line) == report


@pytest.mark.parametrize(
    "line", ["", "hello", "1", "null", "[]", '{"report": "x"}', '{"report": "ready"}', "{}"]
)
def test_other_lines_are_no_reports(line: str) -> None:
    assert decode(line) is None


def test_threads_are_shared_evenly() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_engine(1) == cores
    assert threads_per_engine(10 * cores) == 1


def test_starts_follows_and_stops() -> None:
    async def scenario() -> None:
        seen = Seen()
        launcher = seen.launcher("serve")
        engines = await asyncio.gather(launcher.launch(0), launcher.launch(1))
        assert [engine.instance_id for engine in engines] == [0, 1]
        assert len({engine.ready.pid for engine in engines}) == 2
        assert engines[0].ready.model_path == "threads=3"
        assert (0, LoadPhase("load weights", 0.5)) in seen.phases
        assert (1, "a line for people") in seen.logs
        assert any(len(line) == 200_000 for _, line in seen.logs)
        await launcher.stop_all(grace_s=5)
        assert [await engine.exited for engine in engines] == [-signal.SIGTERM] * 2
        assert not any(is_alive(engine.ready.pid) for engine in engines)

    asyncio.run(scenario())


def test_each_engine_sees_its_own_gpu() -> None:
    async def scenario() -> None:
        launcher = Seen().launcher("gpu", ("5", "GPU-ab"))
        engines = await asyncio.gather(launcher.launch(0), launcher.launch(1))
        assert [engine.ready.model_path for engine in engines] == ["gpu=5", "gpu=GPU-ab"]
        with pytest.raises(LaunchError, match="all 2 GPUs are taken"):
            await launcher.launch(2)
        await launcher.stop(0, grace_s=5)
        assert (await launcher.launch(3)).ready.model_path == "gpu=5"
        await launcher.stop_all(grace_s=5)

    asyncio.run(scenario())


def test_an_engine_that_dies_is_noticed() -> None:
    async def scenario() -> None:
        launcher = Seen().launcher("serve")
        engine = await launcher.launch(0)
        os.kill(engine.ready.pid, signal.SIGKILL)
        assert await asyncio.wait_for(engine.exited, 5) == -signal.SIGKILL
        await launcher.stop_all(grace_s=1)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [("fail", 3, "no such model"), ("silent-exit", 7, "exit code 7"), ("killed", 1, "memory")],
)
def test_a_failed_load_carries_code_and_cause(behaviour: str, code: int, words: str) -> None:
    async def scenario() -> None:
        launcher = Seen().launcher(behaviour)
        with pytest.raises(LaunchError, match=words) as caught:
            await launcher.launch(5)
        assert caught.value.code == code
        await launcher.stop_all(grace_s=1)

    asyncio.run(scenario())


def test_what_ignores_sigterm_is_killed_with_its_children() -> None:
    async def scenario() -> list[int]:
        seen = Seen()
        launcher = seen.launcher("with-child")
        engine = await launcher.launch(0)
        await launcher.stop_all(grace_s=0.2)
        assert await engine.exited == -signal.SIGKILL
        (child,) = [int(line.split()[1]) for _, line in seen.logs if line.startswith("child ")]
        return [engine.ready.pid, child]

    assert all(wait_gone(pid) for pid in asyncio.run(scenario()))


PARENT = """
import asyncio, os, sys
from chiron_engine.cluster.gpus import usable_gpus
from chiron_engine.cluster.local_launcher import LocalLauncher
async def main():
    launcher = LocalLauncher([sys.executable, sys.argv[1], "deaf"], threads=1,
                             on_phase=lambda *_: None, on_log=lambda *_: None)
    engine = await launcher.launch(0)
    print(engine.ready.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_no_engine_outlives_a_killed_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(FAKE)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        parent.wait()
        assert wait_gone(pid)

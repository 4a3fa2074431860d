"""Compiling tasks side by side, each in a process that knows one version of Triton.

A compiler may end its process with a task: that is the task's answer, and a new process takes the next one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scripts.kernel_gate.compiled import Compiled, Key, NotCompiled
from scripts.kernel_gate.machine_code import MachineCode

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "kernel_gate"
SECONDS_PER_TASK = 300.0


@dataclass(frozen=True, slots=True)
class Toolchain:
    """version: of Triton. path: the folder it was installed into; None for the interpreter's own."""

    version: str
    path: Path | None = None

    def environment(self) -> dict[str, str]:
        """Of a process that compiles: never interprets, and keeps what it compiled to itself."""
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        search = [str(path) for path in (self.path, ROOT, ROOT / "kernels") if path is not None]
        return {
            **inherited,
            "PYTHONPATH": os.pathsep.join([*search, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TRITON_DEFAULT_FP_FUSION": "1",  # the default of 3.6; that of 3.9 says it will change
            "TRITON_CACHE_DIR": str(FOLDER / f"cache-{self.version}"),
        }


@dataclass(frozen=True, slots=True)
class Task:
    """module: of the case, as it is imported."""

    module: str
    case: str
    architecture: int
    toolchain: Toolchain

    @property
    def key(self) -> Key:
        return Key(self.case, self.architecture, self.toolchain.version)


class Worker:
    """A process for one toolchain, and what it wrote as errors, for when it ends by itself."""

    def __init__(self, toolchain: Toolchain) -> None:
        self.toolchain = toolchain
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.kernel_gate.worker"],
            cwd=ROOT,
            env=toolchain.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def compile(self, task: Task) -> Compiled | NotCompiled:
        """Ends the process where it takes longer than SECONDS_PER_TASK."""
        words = {"module": task.module, "case": task.case, "architecture": task.architecture}
        limit = threading.Timer(SECONDS_PER_TASK, self._process.kill)
        limit.start()
        try:
            answer = self._ask(json.dumps(words))
        finally:
            limit.cancel()
        if not answer:
            return NotCompiled(task.key, self._last_words())
        return _read_answer(task.key, json.loads(answer))

    def _ask(self, line: str) -> str:
        """The answer to a line; empty from a process that ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "nothing")
        return f"the compiler ended with {code}; last it wrote: {last[:300]}"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def _read_answer(key: Key, answer: dict[str, Any]) -> Compiled | NotCompiled:
    if "reason" in answer:
        return NotCompiled(key, answer["reason"])
    return Compiled(key, answer["threads"], answer["dynamic_shared"], MachineCode(**answer["code"]))


def compile_all(
    tasks: Sequence[Task], jobs: int, done: Callable[[Compiled | NotCompiled], None] = lambda result: None
) -> list[Compiled | NotCompiled]:
    """In the order of their keys. done: called with each as it comes, from any thread.

    Tasks of one toolchain should follow each other: a worker is replaced where the toolchain changes."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    results: list[Compiled | NotCompiled] = []

    def work() -> None:
        worker: Worker | None = None
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                break
            if worker is None or not worker.alive or worker.toolchain != task.toolchain:
                if worker is not None:
                    worker.close()
                worker = Worker(task.toolchain)
            result = worker.compile(task)
            results.append(result)
            done(result)
        if worker is not None:
            worker.close()

    with ThreadPoolExecutor(jobs) as threads:
        for future in [threads.submit(work) for _ in range(jobs)]:
            future.result()
    return sorted(results, key=lambda result: result.key)

"""A process with one engine in it, from outside: asked for one pass at a time, stopped in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiron_engine.runtime.torch_environment import SETTINGS as OUR_SETTINGS
from scripts.cpu_peers.environments import ROOT
from scripts.cpu_peers.machine import group_cpu_s

START_TIMEOUT_S = 900.0  # a first start converts the model
PASS_TIMEOUT_S = 900.0
CLOSE_TIMEOUT_S = 30.0


class WorkerError(Exception):
    """An engine did not start, ended, took too long, or gave other tokens than were asked for."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the load: its time from the first submission to the last token, and its tokens."""

    seconds: float
    outputs: list[list[int]] = field(repr=False)

    @property
    def output_tokens_per_s(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


class Worker:
    """An engine in a child process that speaks one JSON object a line (`worker_loop` is its side).

    Between its turns the child and its own children are stopped, so that no waiting thread of theirs
    takes time from the engine they are compared with.
    """

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str]) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        self.configuration: dict[str, Any] = {}
        self._child = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )

    @classmethod
    def of_module(cls, name: str, python: Path, module: str, *, ours: bool = False) -> Worker:
        """A module of this folder in an environment. A peer gets this process's settings but those that
        are made for our engine."""
        environment = {key: value for key, value in os.environ.items() if ours or key not in OUR_SETTINGS}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels")] if ours else [str(ROOT)]
        )
        return cls(name, [python, "-m", f"scripts.cpu_peers.{module}"], environment)

    def start(self, settings: dict[str, Any], timeout_s: float = START_TIMEOUT_S) -> None:
        """Make the engine ready. Raises WorkerError."""
        answer = self._ask(settings, timeout_s)
        self.versions, self.configuration = answer["versions"], answer["configuration"]

    def run(self, prompts: list[list[int]], output_tokens: int, timeout_s: float = PASS_TIMEOUT_S) -> Pass:
        """All requests at once, greedy, ends of sequence ignored. Raises WorkerError."""
        answer = self._ask({"prompts": prompts, "output_tokens": output_tokens}, timeout_s)
        lengths = {len(output) for output in answer["outputs"]}
        if len(answer["outputs"]) != len(prompts) or lengths != {output_tokens}:
            raise WorkerError(
                f"{self.name} gave {len(answer['outputs'])} outputs of {sorted(lengths)} tokens where "
                f"{len(prompts)} of {output_tokens} were asked for"
            )
        return Pass(answer["seconds"], answer["outputs"])

    @property
    def pid(self) -> int:
        """Of the child, and so of its process group."""
        return self._child.pid

    def cpu_s(self) -> float:
        """CPU time the child and its children have used."""
        return group_cpu_s(self._child.pid)

    def close(self) -> None:
        """End the child; it stops when its input ends."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._child.wait()
        self._child.stdout.close()

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._child.stdout is not None
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._child.stdout], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                self._signal(signal.SIGKILL)
                raise WorkerError(f"{self.name} gave no answer within {timeout_s:g} s")
            read = os.read(self._child.stdout.fileno(), 1 << 20)
            if not read:
                raise self._ended()
            line += read
        return line

    def _ended(self) -> WorkerError:
        return WorkerError(f"{self.name} ended with exit code {self._child.wait()}; its log is above")

    def _signal(self, number: int) -> None:
        """To the child and its own children, which share its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)


def this_python() -> Path:
    return Path(sys.executable)

"""A server of simulated engines as processes of their own, and what the system says of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROFILE = "h100/llama-3.1-8b/tp1/bf16"
STOP_S = 60.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Server:
    """`chiron serve`, ready. pid: of the coordinator, and its own gateway."""

    pid: int
    address: str


@contextmanager
def serving(*options: str, profile: str = PROFILE) -> Iterator[Server]:
    """Stopped at the end. Raises RuntimeError, with what it logged, where it does not get ready."""
    with tempfile.TemporaryDirectory(prefix="chiron-loops-") as folder:
        log = Path(folder) / "server.log"
        command = [
            *(sys.executable, "-m", "chiron_engine", "serve", "simulated", "--grpc-port", "0"),
            *("--executor", "simulated", "--profile", profile, "--log-level", "warning", *options),
        ]
        with log.open("w", encoding="utf-8") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            if not process.stdout.readline():  # its first line is the request to copy
                raise RuntimeError(f"chiron serve ended with {process.wait()}:\n{log.read_text()}")
            yield Server(process.pid, _address(log.read_text()))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(log: str) -> str:
    """From the line that says `serving MODEL on ADDRESS; try:`."""
    for line in log.splitlines():
        if line.startswith("serving ") and line.endswith("; try:"):
            return line.removesuffix("; try:").rpartition(" on ")[2]
    raise RuntimeError(f"chiron serve named no address:\n{log}")


def child_pids(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, user and system, its threads included. 0 once it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()  # from the third field on
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. resident: all pages; private: those that no other process has; proportional: shared pages
    count by the share of each process."""

    resident: int
    private: int
    proportional: int


def memory(pid: int) -> Memory:
    kib = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        kib[name.rstrip(":")] = int(value)
    return Memory(kib["Rss"] << 10, (kib["Private_Clean"] + kib["Private_Dirty"]) << 10, kib["Pss"] << 10)


def service_pids(server: Server, engines: Iterable[int]) -> list[int]:
    """The coordinator, and its gateways where they are processes of their own."""
    return [server.pid, *(set(child_pids(server.pid)) - set(engines))]


class CpuClock:
    """CPU time of processes, and how idle the whole machine was, since it was made."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._began = time.monotonic()
        self._cpu_s = self._total()
        self._idle, self._all = _machine_ticks()

    def _total(self) -> float:
        return sum(cpu_s(pid) for pid in self._pids)

    @property
    def seconds(self) -> float:
        return self._total() - self._cpu_s

    @property
    def share(self) -> float:
        """Of one core."""
        return self.seconds / (time.monotonic() - self._began)

    @property
    def idle(self) -> float:
        """Share of all cores that did nothing, for anybody."""
        idle, total = _machine_ticks()
        return (idle - self._idle) / max(1, total - self._all)


def _machine_ticks() -> tuple[int, int]:
    """Idle ones, and all."""
    first = Path("/proc/stat").read_text().splitlines()[0]
    ticks = [int(word) for word in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)

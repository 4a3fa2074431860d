"""What the machine is, and how busy it is, out of /proc."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Positions in /proc/PID/stat after the command's name, which may hold spaces.
GROUP, USER_TICKS, SYSTEM_TICKS = 2, 11, 12
# Positions in the first line of /proc/stat.
IDLE, IO_WAIT = 3, 4
# Instruction sets that decide how fast a model runs.
TELLING_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)


def group_cpu_s(group: int) -> float:
    """CPU seconds used by the living processes of a process group."""
    ticks = 0
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[GROUP]) == group:
            ticks += int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])
    return ticks / TICKS_PER_S


def busy_cpu_s() -> float:
    """CPU seconds that all cores together have not been idle, since the machine started."""
    ticks = [int(word) for word in (PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[IDLE] - ticks[IO_WAIT]) / TICKS_PER_S


def describe() -> dict[str, Any]:
    """The CPU's name and telling flags, cores this process may use, load average, kernel, Python."""
    entries: dict[str, str] = {}
    for line in (PROC / "cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    flags = set(entries.get("flags", entries.get("Features", "")).split())
    return {
        "cpu": entries.get("model name", platform.machine()),
        "cpu_family_model_stepping": [entries.get(key, "") for key in ("cpu family", "model", "stepping")],
        "cpu_flags": [flag for flag in TELLING_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }

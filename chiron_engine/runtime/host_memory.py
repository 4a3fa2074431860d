"""How much memory this process may still take on the host."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes the system can give without swapping, or what the process's control group has left,
    whichever is less. Raises OSError where the system does not say."""
    available = _meminfo_available(meminfo)
    left = _cgroup_left(cgroup)
    return available if left is None else min(available, left)


def _meminfo_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable line")


def _cgroup_left(cgroup: Path) -> int | None:
    """Limit less use, where files of a control group v2 at this mount name a limit. Pages cached
    for files count as use but can be given back."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        counters = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(int(limit) - used + int(counters.get("inactive_file", 0)), 0)

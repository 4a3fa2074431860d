"""How much memory this process may still take on the host, and what it does with what it has freed."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# mallopt's names for these (malloc.h), and what they are set to: the largest that glibc takes for the first.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_ALLOCATION = 32 << 20
KEPT_FREE = 128 << 20


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next step instead of giving it back to the system, which
    hands it out again page by page: for the logits of 64 rows that takes longer than computing them.
    Nothing happens with another malloc than glibc's, and settings of the user's stand."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_ALLOCATION)
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


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

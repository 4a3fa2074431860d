"""Which engine processes a coordinator has launched: small files that outlast it, for the next one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "engines"
START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted behind the command name."""


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """A launched engine.

    name: of its files. start_time: clock ticks from the start of the system to that of the process,
    which tell it from a later one of the same pid. command: what it was started with, but for its
    instance. gpu: empty on the CPU. boot_id: empty until it has joined; only then does it outlive
    the process that launched it. load_s: from its launch to its joining.
    """

    name: str
    pid: int
    start_time: int
    command: tuple[str, ...]
    gpu: str = ""
    boot_id: str = ""
    load_s: float = 0.0


class EngineRecords:
    """A folder with two files for each engine: its record, and its log."""

    def __init__(self, state_directory: Path) -> None:
        """Raises OSError where the folder cannot be made."""
        self._folder = state_directory / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def new_name(self, instance_id: int) -> str:
        return f"{instance_id}-{secrets.token_hex(4)}"

    def log_path(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def write(self, record: EngineRecord) -> None:
        """Whole or not at all."""
        path = self._path(record.name)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
        draft.replace(path)

    def remove(self, name: str) -> None:
        """The log stays until a coordinator starts here."""
        self._path(name).unlink(missing_ok=True)

    def survivors(self) -> list[EngineRecord]:
        """The engines of before that are alive, in the order they were started. Files of others go."""
        records = [record for path in self._folder.glob("*.json") if (record := _read(path)) is not None]
        alive = [record for record in records if start_time(record.pid) == record.start_time]
        names = {record.name for record in alive}
        for path in self._folder.iterdir():
            if path.stem not in names:
                with contextlib.suppress(OSError):
                    path.unlink()
        return sorted(alive, key=lambda record: (record.start_time, record.name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def start_time(pid: int) -> int | None:
    """Of a process that is alive; None for one that is not, a zombie too. Linux only."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[START_TIME_FIELD])


def can_outlive() -> bool:
    """Whether engines can be told from other processes after their coordinator has ended."""
    return hasattr(os, "pidfd_open") and Path("/proc/self/stat").exists()


def _read(path: Path) -> EngineRecord | None:
    """None for a file that holds no record."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        command: Sequence[str] = values.pop("command")
        record = EngineRecord(command=tuple(command), **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if isinstance(record.pid, int) and record.pid > 0 and record.name == path.stem else None

"""Every event the fleet policy was told and every effect it answered with, numbered, one JSON line each.

`chiron replay` feeds the events of such a file to the policy again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import FleetEffect, FleetEvent, InstanceSpec

FORMAT = 1


class EventLog:
    """Lines reach the file when they are written; a kill loses none but the last."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be written."""
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def begin(self, policy: str, spec: InstanceSpec, config: FleetConfig, initial: int, now: float) -> None:
        """What the policy was made of; the first line. initial: instances it was started with."""
        self._write(
            {
                "format": FORMAT,
                "policy": policy,
                "time": now,
                "initial": initial,
                "spec": as_plain(spec),
                "config": as_plain(config),
            }
        )

    def write(self, event: FleetEvent, effects: Iterable[FleetEffect], now: float) -> None:
        self._number += 1
        self._write(
            {
                "event": self._number,
                "time": now,
                "kind": type(event).__name__,
                "fields": as_plain(event),
                "effects": [
                    {"kind": type(effect).__name__, "fields": as_plain(effect)} for effect in effects
                ],
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


def as_plain(value: Any) -> Any:
    """Dataclasses as objects, enums by value, tuples as lists: what JSON can hold. Floats keep every
    bit; infinity is a string."""
    if is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

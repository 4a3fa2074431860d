"""What an engine process tells the process that started it: JSON lines on its standard output."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class LoadPhase:
    """A phase of loading and how much of it is done, from 0 to 1."""

    phase: str
    fraction: float


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine takes requests at `address` (host:port). model_path: directory of its tokenizer."""

    address: str
    pid: int
    model_path: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine ends with exit code `code`; `message` is the cause in one line."""

    code: int
    message: str


Report = LoadPhase | EngineReady | EngineFailed
_KINDS: dict[str, type[Report]] = {"phase": LoadPhase, "ready": EngineReady, "failed": EngineFailed}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(report: Report) -> str:
    """One line, without its end."""
    return json.dumps({"report": _NAMES[type(report)], **asdict(report)})


def decode(line: str) -> Report | None:
    """The report in a line; None for a line that holds none."""
    try:
        values = json.loads(line)
        return _KINDS[values.pop("report")](**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None

"""Every event the fleet policy was told and every effect it answered with, numbered, one JSON line each.

A file has a section for each life of the coordinator: a header line, which says what the policy was
made of, then the events. `chiron replay` feeds them to the policy again (`event_replay`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chiron_engine import __version__
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import FleetEffect, FleetEvent, InstanceSpec

from .event_fields import EFFECTS, EVENTS, encoder, finite, schema
from .line_writer import LineWriter

RECORDING = "fleet events"
FORMAT = 2
BEGINNING = f'{{"recording":"{RECORDING}","format":'.encode()

_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class EventLog:
    """An event is taken down before the policy handles it, as the policy goes on to change the
    requests in it, and its effects after; one without effects is what the policy failed at. A killed
    process loses the events of its last quarter of a second (`line_writer.FLUSH_S`)."""

    def __init__(self, path: Path) -> None:
        """Goes on after what an event log at `path` holds. Raises OSError where that is something
        else, or the file cannot be written."""
        self._writer = LineWriter(path, BEGINNING)
        self._number = 0
        self._event = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._event:
            self._end("null")
        self._writer.close()

    def begin(self, policy: str, spec: InstanceSpec, config: FleetConfig, initial: int, now: float) -> None:
        """Start a section with what the policy was made of. initial: instances it was started with."""
        self._number = 0
        header = {
            "recording": RECORDING,
            "format": FORMAT,
            "version": __version__,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "policy": policy,
            "time": now,
            "initial": initial,
            "spec": asdict(spec),
            "config": asdict(config),
            "fields": schema(*EVENTS.values(), *EFFECTS.values()),
        }
        self._writer.write(_to_json(header).encode() + b"\n")

    def event(self, event: FleetEvent, now: float) -> None:
        """What the policy is about to handle; `effects` follows, unless it fails."""
        if self._event:
            self._end("null")
        self._number += 1
        kind = type(event)
        fields = _as_json(encoder(kind)(event))
        self._event = (
            f'{{"event":{self._number},"time":{now!r},"kind":"{kind.__name__}","fields":{fields},"effects":'
        )

    def effects(self, effects: Sequence[FleetEffect]) -> None:
        """What the policy answered the last event with."""
        self._end(_as_json([_effect(effect) for effect in effects]) if effects else "[]")

    def _end(self, effects: str) -> None:
        self._writer.write(f"{self._event}{effects}}}\n".encode())
        self._event = ""


def _effect(effect: FleetEffect) -> tuple[str, Any]:
    kind = type(effect)
    return kind.__name__, encoder(kind)(effect)


def _as_json(value: Any) -> str:
    try:
        return _to_json(value)
    except ValueError:  # a number that is not finite, which is rare
        return _to_json(finite(value))

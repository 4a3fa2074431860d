"""Feeds the events of an event log to a fresh fleet policy, and compares what it orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chiron_engine.policy.fleet.autoscalers import make_global_autoscaler
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import FleetEffect, FleetEvent, InstanceSpec
from chiron_engine.policy.iteration.step_costs import StepCosts

from .event_fields import EFFECTS, EVENTS, Convert, decoder
from .event_log import FORMAT, RECORDING


@dataclass(frozen=True, slots=True)
class Difference:
    """where: the event at which the policy decides otherwise than it did."""

    where: str
    expected: list[str]
    got: list[str]


class EventReplay:
    """One section: `feed` its lines in order."""

    recording = RECORDING

    def __init__(self, header: Mapping[str, Any]) -> None:
        """Raises ValueError for a header that this version cannot replay."""
        if header.get("format") != FORMAT:
            raise ValueError(
                f"the format of these {RECORDING} is {header.get('format')!r}; this version reads {FORMAT}"
            )
        try:
            spec = InstanceSpec(**{**header["spec"], "costs": StepCosts(**header["spec"]["costs"])})
            config = FleetConfig(
                **{**header["config"], "itl_targets_s": tuple(header["config"]["itl_targets_s"])}
            )
            self._started, initial, policy = header["time"], header["initial"], header["policy"]
            names = header["fields"]
            self._events = {name: decoder(kind, names) for name, kind in EVENTS.items() if name in names}
            self._effects = {name: decoder(kind, names) for name, kind in EFFECTS.items() if name in names}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the header is not one of {RECORDING}: {error!r}") from error
        self.title = f"policy {policy}, started {header.get('started')}"
        self._fleet = FleetState(spec, config, make_global_autoscaler(policy, config, spec))
        self._fleet.start(initial, self._started)
        self._last = self._started
        self._num_events = 0
        self._by_event: Counter[str] = Counter()
        self._by_effect: Counter[str] = Counter()

    def feed(self, line: Mapping[str, Any]) -> Difference | None:
        """Handle a line's event. Raises ValueError for a line that is none of these."""
        number, now, event, expected = self._read(line)
        if number != self._num_events + 1:
            raise ValueError(f"event {number} follows event {self._num_events}")
        got: list[FleetEffect] | None = None
        failure = ""
        try:
            got = self._fleet.handle(event, now)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        if got != expected:
            where = f"event {number}, {now - self._started:.3f} s: {event}"
            return Difference(where, _told(expected), [f"raised {failure}"] if got is None else _told(got))
        self._num_events, self._last = number, now
        self._by_event[line["kind"]] += 1
        self._by_effect.update(type(effect).__name__ for effect in got or ())
        return None

    def summary(self) -> dict[str, Any]:
        return {
            "events": self._num_events,
            "decisions": self._by_effect.total(),
            "span_s": self._last - self._started,
            "events_by_kind": dict(self._by_event.most_common()),
            "decisions_by_kind": dict(self._by_effect.most_common()),
        }

    def _read(self, line: Mapping[str, Any]) -> tuple[int, float, FleetEvent, list[FleetEffect] | None]:
        try:
            number, now, effects = line["event"], line["time"], line["effects"]
            event: FleetEvent = _message(self._events, line["kind"], line["fields"])
            if effects is not None:
                effects = [_message(self._effects, kind, values) for kind, values in effects]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no event: {error!r}") from error
        return number, now, event, effects


def _message(decoders: Mapping[str, Convert], kind: str, values: Any) -> Any:
    decode = decoders.get(kind)
    if decode is None:
        raise ValueError(f"{kind!r} is no kind of event or effect that the header describes")
    return decode(values)


def _told(effects: list[FleetEffect] | None) -> list[str]:
    """An effect a line. None: the policy failed."""
    return ["an exception"] if effects is None else [str(effect) for effect in effects]

"""What a simulation needs of a policy: the seam to the fleet and to the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import FleetEffect, FleetEvent, FleetGauges, InstanceSpec, Launch


class Fleet(Protocol):
    """A fleet policy: events in, effects out."""

    def start(self, instances: int, now: float) -> Iterable[Launch]:
        """Instances that are there from the start: they are ready at once."""
        ...

    def handle(self, event: FleetEvent, now: float) -> Iterable[FleetEffect]: ...

    def gauges(self, now: float) -> FleetGauges: ...


@dataclass(frozen=True, slots=True)
class SimPolicy:
    """local_autoscaler: by name, on every engine. make_fleet builds the fleet policy for instances
    of a kind. static_instances: how many there are from the start to the end, None where their
    number is decided."""

    name: str
    local_autoscaler: str
    make_fleet: Callable[[InstanceSpec, FleetConfig], Fleet]
    static_instances: int | None = None

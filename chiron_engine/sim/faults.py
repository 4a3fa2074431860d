"""What goes wrong in a simulated fleet, drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

LARGEST_SLOW_FACTOR = 1000.0


@dataclass(frozen=True, slots=True)
class FaultSettings:
    """losses_per_hour: how often a ready instance dies, on average, in an hour of its life.
    slow_launches, failed_launches: share of launches. slow_factor: how many times the usual load
    time a slow one takes. detection_s: from the death of an instance to the fleet knowing of it."""

    losses_per_hour: float = 0.0
    slow_launches: float = 0.0
    slow_factor: float = 4.0
    failed_launches: float = 0.0
    detection_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("slow_launches", "failed_launches"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is {share}; it must be a share between 0 and 1")
        for name in ("losses_per_hour", "detection_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        if not 1.0 <= self.slow_factor <= LARGEST_SLOW_FACTOR:
            raise ValueError(
                f"slow_factor is {self.slow_factor}; it must be from 1 to {LARGEST_SLOW_FACTOR:g}"
            )


@dataclass(frozen=True, slots=True)
class LaunchFate:
    """seconds: from the launch decision to ready, or to the failure."""

    seconds: float
    fails: bool


class FaultDice:
    """The fate of launches and of ready instances, in the order they are asked for.

    load_jitter: half width of the uniform spread of load times, as a share.
    """

    def __init__(self, settings: FaultSettings, load_time_s: float, load_jitter: float, seed: int) -> None:
        self._settings = settings
        self._load_time_s = load_time_s
        self._load_jitter = load_jitter
        self._random = Random(f"faults {seed}")

    def launch(self) -> LaunchFate:
        settings, dice = self._settings, self._random
        spread, slow, fails, share = dice.random(), dice.random(), dice.random(), dice.random()
        seconds = self._load_time_s * (1.0 + self._load_jitter * (2.0 * spread - 1.0))
        if slow < settings.slow_launches:
            seconds *= settings.slow_factor
        if fails < settings.failed_launches:
            return LaunchFate(seconds * share, fails=True)
        return LaunchFate(seconds, fails=False)

    def life_s(self) -> float:
        """Seconds a ready instance lives if nobody ends it; infinite without losses."""
        if not self._settings.losses_per_hour:
            return math.inf
        return self._random.expovariate(self._settings.losses_per_hour / 3600.0)

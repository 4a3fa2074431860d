"""What the operator fixes about a fleet."""

from __future__ import annotations

import math
from dataclasses import dataclass

ADMISSIONS = ("hold", "strict")


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """max_gpus: devices that may be taken, loading and draining instances included. min_instances:
    interactive and mixed instances kept at any load. itl_targets_s: the ITL targets on offer, each
    instance has one of them; batch_itl_s: the one batch work is sized by. itl_margin: share of a
    target that plans may use, the rest is for the tail of step times. prior_output_tokens: expected
    output before any request has finished. window_s: least time over which throughput is measured.

    Raises ValueError for a value that makes no fleet.
    """

    max_gpus: int = 50
    tick_s: float = 1.0
    min_instances: int = 1
    itl_targets_s: tuple[float, ...] = (0.2,)
    batch_itl_s: float = 2.0
    itl_margin: float = 0.95
    prior_output_tokens: float = 256.0
    window_s: float = 300.0
    admission: str = "hold"

    def __post_init__(self) -> None:
        for name in ("max_gpus", "min_instances"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("tick_s", "batch_itl_s", "itl_margin", "prior_output_tokens", "window_s"):
            _require_positive(name, getattr(self, name))
        if self.admission not in ADMISSIONS:
            raise ValueError(f"admission is {self.admission!r}; it must be one of {', '.join(ADMISSIONS)}")
        if self.itl_margin > 1:
            raise ValueError(f"itl_margin is {self.itl_margin}; it must be at most 1")
        if not self.itl_targets_s:
            raise ValueError("itl_targets_s is empty; give at least one ITL target in seconds")
        for target in self.itl_targets_s:
            _require_positive("an entry of itl_targets_s", target)
        if list(self.itl_targets_s) != sorted(set(self.itl_targets_s)):
            raise ValueError(f"itl_targets_s is {self.itl_targets_s}; give each once, the tightest first")


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}; it must be finite and over 0")

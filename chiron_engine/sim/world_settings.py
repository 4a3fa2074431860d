"""How a simulated fleet is set up, besides its workload, its profile and its policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .faults import FaultSettings

NO_FAULTS = FaultSettings()

# Beyond these a run would not end, or its figures would be rounding errors.
LARGEST = {"load_time_s": 86400.0, "rpc_delay_s": 60.0, "tick_s": 3600.0, "step_noise": 2.0}
SHORTEST_PERIOD_S = 1e-3


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """Durations in seconds.

    max_gpus: devices there are. load_time_s: from launch decision to ready; load_jitter: half width
    of its uniform spread, as a share. rpc_delay_s: one way, between an engine and whoever talks to
    it, tokens included. initial_instances: ready at the start; None means what the interactive
    demand of the first load time needs, and one. host_kv_share: host memory for saved KV, as a
    multiple of the device's. max_output_tokens: cap of a request, None for what the context leaves.
    step_noise: deviation of the logarithm of step times. fast_forward: whether decode steps that
    change nothing run without an event each, which changes no result.
    """

    max_gpus: int = 50
    load_time_s: float = 45.0
    load_jitter: float = 0.0
    rpc_delay_s: float = 1e-3
    telemetry_s: float = 1.0
    tick_s: float = 1.0
    initial_instances: int | None = None
    block_size: int = 64
    host_kv_share: float = 1.0
    max_output_tokens: int | None = None
    step_noise: float = 0.0
    faults: FaultSettings = NO_FAULTS
    fast_forward: bool = True

    def __post_init__(self) -> None:
        for name in ("max_gpus", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("telemetry_s", "tick_s"):
            _require_finite(name, getattr(self, name))
            if getattr(self, name) < SHORTEST_PERIOD_S:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {SHORTEST_PERIOD_S}")
        for name in ("load_time_s", "rpc_delay_s", "host_kv_share", "step_noise"):
            _require_finite(name, getattr(self, name))
        for name, most in LARGEST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be at most {most:g}")
        if not 0.0 <= self.load_jitter <= 1.0:
            raise ValueError(f"load_jitter is {self.load_jitter}; it must be between 0 and 1")
        if self.initial_instances is not None and self.initial_instances < 0:
            raise ValueError(f"initial_instances is {self.initial_instances}; it must not be negative")
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise ValueError(f"max_output_tokens is {self.max_output_tokens}; it must be at least 1")


def _require_finite(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; it must be finite and not negative")

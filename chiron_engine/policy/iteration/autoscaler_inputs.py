"""What a local autoscaler is built from: what the engine can hold, and what it must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ItlTargets:
    """Inter-token latency to keep, in seconds: while interactive requests are in the engine, and while
    there is only batch work."""

    interactive_s: float
    batch_s: float

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be finite and positive")


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """The fixed capacity of an engine. Limits stay within max_slots and max_step_tokens.

    block_size: tokens of a KV block. kv_capacity_tokens: tokens whose KV the device holds.
    """

    max_slots: int
    max_step_tokens: int
    block_size: int
    kv_capacity_tokens: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_step_tokens < self.max_slots:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}; it must be at least max_slots "
                f"({self.max_slots}), one token for each running request"
            )

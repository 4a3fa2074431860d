"""What a simulated instance is: capacity, step times, and what they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from chiron_engine.policy.iteration.step_costs import StepCosts


class StepTimes(Protocol):
    """Seconds of a step, without copies between tiers. `extrapolated` counts the evaluations so far
    that lay beyond what was measured."""

    extrapolated: int

    def seconds(self, requests: int, kv_tokens: int, prompt_tokens: int, prompt_context: int) -> float:
        """n decoding requests with K tokens of KV in all, P prompt tokens, and C, the sum over
        prompt chunks of count x KV length at the chunk's end. Raises ValueError above the profile's
        capacities."""
        ...


@dataclass(frozen=True, slots=True)
class Profile:
    """One hardware, model, parallelism and precision, named `GPU/MODEL/tpN/precision`.

    step_times: the plant. fit: a linear model near it, the prior of policies. envelope: a linear
    model nowhere above it, for lower bounds. copy_s_per_kv_token: seconds to move the KV of one
    token between device and host. source: attribution.
    """

    name: str
    gpus: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    max_slots: int
    max_step_tokens: int
    max_model_len: int
    step_times: StepTimes
    fit: StepCosts
    envelope: StepCosts
    copy_s_per_kv_token: float
    source: str

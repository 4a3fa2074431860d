"""A profile whose plant is a linear model, for cases that can be worked out by hand."""

from __future__ import annotations

from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.sim.linear_step_times import LinearStepTimes
from chiron_engine.sim.profile import Profile


def linear_profile(
    costs: StepCosts,
    kv_capacity: int = 10_000,
    max_slots: int = 64,
    max_step_tokens: int = 1024,
    gpus: int = 1,
) -> Profile:
    return Profile(
        name="test/linear/tp1/none",
        gpus=gpus,
        kv_capacity_tokens=kv_capacity,
        kv_bytes_per_token=1,
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        max_model_len=kv_capacity,
        step_times=LinearStepTimes(costs),
        fit=costs,
        envelope=costs,
        copy_s_per_kv_token=0.0,
        source="made up",
    )

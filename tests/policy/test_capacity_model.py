"""What the fleet learns of step times, and what it does not."""

from __future__ import annotations

import pytest

from chiron_engine.policy.fleet.capacity import MOST_DRIFT, CapacityModel, target_out_of_reach
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import InstanceSpec, MeasuredStep
from chiron_engine.policy.iteration.step_costs import StepCosts

PRIOR = StepCosts(6e-3, 1e-5, 4e-8, 1.5e-5)
TARGET_S = 0.0093
CONFIG = FleetConfig(itl_targets_s=(TARGET_S,))


def model() -> CapacityModel:
    return CapacityModel(InstanceSpec(PRIOR, 400_000, 512, 32_768), CONFIG)


def step(costs: StepCosts, requests: int, prompt: int = 0) -> MeasuredStep:
    kv_tokens, context = 1250 * requests, 800 * prompt
    return MeasuredStep(
        costs.seconds(requests, kv_tokens, prompt, context), requests, kv_tokens, prompt, context
    )


def learn(of: CapacityModel, seen: MeasuredStep, interactive_load: float = 1.0) -> None:
    for _ in range(500):
        of.learn(seen, interactive_load)


def test_slower_steps_leave_less_room() -> None:
    found = model()
    before = found.room_s(TARGET_S)
    learn(found, step(PRIOR.scaled(1.2), 20))
    assert found.costs.base_s == pytest.approx(1.2 * PRIOR.base_s)
    assert found.room_s(TARGET_S) < before


def test_prompts_in_the_steps_are_no_slowness() -> None:
    """Steps are compared at what was in them; their time alone, or a fit that takes prompts which come
    in every step for the base, would leave the ITL target no room."""
    found = model()
    learn(found, step(PRIOR, 20, 150))
    assert found.costs.base_s == pytest.approx(PRIOR.base_s)


def test_steps_of_batch_work_say_nothing_of_those_at_the_target() -> None:
    found = model()
    learn(found, step(PRIOR.scaled(1.5), 200, 4000), interactive_load=0.0)
    assert found.costs == PRIOR
    assert found.batch_costs.base_s == pytest.approx(1.5 * PRIOR.base_s)


def test_what_is_learned_is_bounded() -> None:
    found = model()
    learn(found, step(PRIOR.scaled(50.0), 20))
    assert found.costs.base_s == pytest.approx(MOST_DRIFT * PRIOR.base_s)


def test_a_target_out_of_reach_is_named_and_still_leaves_room() -> None:
    """Otherwise a machine slower than the target would serve nobody."""
    config = FleetConfig(itl_targets_s=(PRIOR.base_s / 2, 10.0))
    spec = InstanceSpec(PRIOR, 400_000, 512, 32_768)
    reason = target_out_of_reach(spec, config)
    assert reason is not None
    assert "the best on offer is" in reason
    model = CapacityModel(spec, config)
    assert model.share(PRIOR.per_request_s, 100.0, PRIOR.base_s / 2) < 0.1
    assert target_out_of_reach(spec, FleetConfig(itl_targets_s=(10.0,))) is None

"""Skipping the events of steps that change nothing changes no result."""

from __future__ import annotations

from dataclasses import fields

import pytest

from chiron_engine.policy.fleet.messages import Drain
from chiron_engine.sim.event_heap import EventHeap
from chiron_engine.sim.faults import FaultSettings
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from tests.sim.plain_fleet import plain_policy
from tests.sim.small_world import mixed_workload, small_profile, small_run


def plain_with_drains() -> SimPolicy:
    return plain_policy(size=3, script={6.0: [Drain(0)]})


POLICIES = {
    "plain": plain_with_drains,
    "chiron": lambda: make_policy("chiron"),
    "paper": lambda: make_policy("paper"),
    "static": lambda: make_policy("static:3"),
}


def assert_same(one: RunResult, other: RunResult) -> None:
    for field in fields(RunResult):
        if field.name not in ("workload", "instances", "requests"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    for field in fields(one.requests):
        mine, theirs = getattr(one.requests, field.name), getattr(other.requests, field.name)
        assert mine == theirs, field.name
    assert repr(one.instances) == repr(other.instances)  # exits that never were are not equal to themselves


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_fast_forward_equals_plain_stepping(policy: str, seed: int) -> None:
    faults = FaultSettings(losses_per_hour=60.0, failed_launches=0.1)
    results = [
        small_run(
            mixed_workload(seed, 30, 20, 40.0),
            POLICIES[policy](),
            small_profile(kv_tokens=4096),
            seed=seed,
            faults=faults,
            fast_forward=fast_forward,
        )
        for fast_forward in (True, False)
    ]
    assert_same(*results)


def test_fast_forward_equals_plain_stepping_with_noise() -> None:
    results = [
        small_run(mixed_workload(9), plain_policy(size=2), step_noise=0.1, fast_forward=fast_forward)
        for fast_forward in (True, False)
    ]
    assert_same(*results)


def test_fast_forward_spares_events(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0
    run_next = EventHeap.run_next

    def counted(events: EventHeap) -> None:
        nonlocal runs
        runs += 1
        run_next(events)

    monkeypatch.setattr(EventHeap, "run_next", counted)
    fast = small_run(mixed_workload(9), plain_policy(size=2))
    fast_runs, runs = runs, 0
    plain = small_run(mixed_workload(9), plain_policy(size=2), fast_forward=False)
    assert fast.steps == plain.steps
    assert fast_runs < 0.7 * runs

"""Skipping the events of steps that change nothing changes no result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest

from chiron_engine.policy.fleet.messages import Drain
from chiron_engine.sim.event_heap import EventHeap
from chiron_engine.sim.faults import FaultSettings
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from chiron_engine.sim.workload import Workload, make_workload
from tests.sim.plain_fleet import plain_policy
from tests.sim.small_world import (
    INTERACTIVE_SLO,
    mixed_workload,
    random_trace,
    small_profile,
    small_run,
    trace_of,
)


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


def interactive_workload(seed: int) -> Workload:
    return make_workload(random_trace(seed, 60, 60.0, output=150), None, INTERACTIVE_SLO)


def assert_same_stepped(workload: Workload, make: Callable[[], SimPolicy], **settings: object) -> RunResult:
    fast = small_run(workload, make(), small_profile(kv_tokens=4096), **settings)
    assert_same(
        fast, small_run(workload, make(), small_profile(kv_tokens=4096), fast_forward=False, **settings)
    )
    return fast


FAULTS = FaultSettings(losses_per_hour=60.0, failed_launches=0.1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_fast_forward_equals_plain_stepping(policy: str, seed: int) -> None:
    workload = mixed_workload(seed, 30, 20, 40.0)
    assert_same_stepped(workload, POLICIES[policy], seed=seed, faults=FAULTS)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_interactive_work_alone_equals_plain_stepping(policy: str, seed: int) -> None:
    """Here engines coast: their steps wait until somebody looks."""
    assert_same_stepped(interactive_workload(seed), POLICIES[policy], seed=seed, faults=FAULTS)


def test_fast_forward_equals_plain_stepping_with_noise() -> None:
    assert_same_stepped(mixed_workload(9), lambda: plain_policy(size=2), step_noise=0.1)


def test_interactive_requests_preempted_for_want_of_blocks_equal_plain_stepping() -> None:
    """Outputs outgrow the KV, which nobody could foresee."""
    workload = make_workload(trace_of(*[(0.0, 100, 100)] * 20, *[(15.0, 60, 500)] * 12), None)
    result = assert_same_stepped(workload, lambda: plain_policy(local_autoscaler="fixed"))
    assert result.preemptions > 0


def count_events(monkeypatch: pytest.MonkeyPatch, workload: Workload, fast_forward: bool) -> int:
    runs = 0
    run_next = EventHeap.run_next

    def counted(events: EventHeap) -> None:
        nonlocal runs
        runs += 1
        run_next(events)

    with monkeypatch.context() as patch:
        patch.setattr(EventHeap, "run_next", counted)
        small_run(workload, plain_policy(size=2), fast_forward=fast_forward)
    return runs


@pytest.mark.parametrize(("workload", "share"), [(mixed_workload(9), 0.7), (interactive_workload(9), 0.35)])
def test_fast_forward_spares_events(
    monkeypatch: pytest.MonkeyPatch, workload: Workload, share: float
) -> None:
    plain = count_events(monkeypatch, workload, fast_forward=False)
    assert count_events(monkeypatch, workload, fast_forward=True) < share * plain

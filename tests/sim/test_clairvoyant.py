"""The schedule of whole instances that knows the future, and the bound beside runs of the simulator."""

from __future__ import annotations

import pytest

from chiron_engine.sim.bound import Bound, lower_bound
from chiron_engine.sim.clairvoyant import Schedule, clairvoyant_policy, clairvoyant_schedule
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.run_result import RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from chiron_engine.sim.summary import summary
from chiron_engine.sim.traces.load import load_trace
from chiron_engine.sim.workload import ClassSlo, Workload, make_workload
from chiron_engine.sim.world import World
from chiron_engine.sim.world_settings import WorldSettings

H100 = "h100/llama-3.1-8b/tp1/bf16"


def schedule_of(counts: list[float], load_time_s: float = 10.0, headroom: float = 1.0) -> Schedule:
    bound = Bound(1.0, 1.0, 0.99, 10.0, tuple(counts))
    return clairvoyant_schedule(bound, load_time_s, headroom)


def test_counts_are_rounded_up_and_never_none() -> None:
    assert schedule_of([0.0, 1.2, 1.9, 3.0001, 0.5]).steps == ((0.0, 1), (10.0, 2), (30.0, 3), (40.0, 1))
    assert schedule_of([2.0, 2.0], headroom=1.3).steps == ((0.0, 3),)
    with pytest.raises(ValueError, match=r"headroom is 0\.5"):
        schedule_of([1.0], headroom=0.5)


def test_instances_are_kept_over_dips_shorter_than_a_start() -> None:
    assert schedule_of([3, 1, 3, 1, 1, 1, 2]).steps == ((0.0, 3), (30.0, 1), (60.0, 2))
    assert schedule_of([3, 2, 1, 3], load_time_s=20.0).steps == ((0.0, 3),)


def test_what_is_ready_must_cover_the_time_until_a_launch_would_be() -> None:
    schedule = Schedule(((0.0, 2), (100.0, 5), (200.0, 1)))
    assert schedule.initial == 2
    assert schedule.most_between(0.0, 99.0) == 2
    assert schedule.most_between(60.0, 105.0) == 5
    assert schedule.most_between(199.0, 240.0) == 5
    assert schedule.most_between(200.0, 245.0) == 1


def run(workload: Workload, policy: SimPolicy, initial: int) -> tuple[RunResult, dict]:
    result = World(workload, load_profile(H100), policy, WorldSettings(initial_instances=initial), 1).run(
        None
    )
    return result, summary(result, None, policy=policy.name, profile=H100, wall_s=0.0)


def test_the_bound_is_close_below_an_instance_that_is_always_full() -> None:
    """Batch requests at once on one instance: hardly better can be done."""
    trace = load_trace("burst:count=1500,lengths=azure-conv", seed=1)
    workload = make_workload(None, trace, batch_slo=ClassSlo(600.0, 2.0, 600.0))
    bound = lower_bound(workload, load_profile(H100), 45.0, attainment=1.0)
    result, figures = run(workload, make_policy("static:1"), 1)
    assert figures["slo_attainment"]["batch"] == 1.0
    assert 0.75 * figures["gpu_hours"] < bound.gpu_hours <= figures["gpu_hours"]
    assert bound.work_gpu_hours * 3600 <= result.end_s


def test_the_schedule_runs_and_takes_more_than_the_bound() -> None:
    trace = load_trace("step:rate=20,factor=3,at=80,duration=150", seed=1)
    workload = make_workload(trace, None, ClassSlo(10.0, 0.0186))
    bound = lower_bound(workload, load_profile(H100), 45.0)
    schedule = clairvoyant_schedule(bound, 45.0, headroom=1.5)
    assert schedule.initial < schedule.most_between(80.0, 140.0)
    result, figures = run(workload, clairvoyant_policy(schedule), schedule.initial)
    assert figures["gpu_hours"] >= bound.gpu_hours
    assert figures["peak_instances"] == schedule.most_between(0.0, 300.0)
    late = [life for life in result.instances if life.launched_s > 0]
    assert late and all(life.ready_s <= 81.0 for life in late)

"""The lower bound against every schedule there is, where there are few."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.sim.bound import due_times, lower_bound
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.step_prices import SHARE
from chiron_engine.sim.traces.columns import make_trace
from chiron_engine.sim.traces.load import load_trace
from chiron_engine.sim.workload import ClassSlo, Workload, make_workload
from tests.sim.linear_profile import linear_profile

# A prompt token takes a second and all else next to nothing: work in seconds is the prompt's length.
SECONDS = linear_profile(StepCosts(1e-9, 1e-9, 1e-12, 1.0), kv_capacity=200, max_slots=4, max_step_tokens=100)
HOUR = 3600.0

Job = tuple[float, int]  # arrival, seconds of work


def batch_of(jobs: list[Job], completion_s: float) -> Workload:
    arrivals, work = zip(*sorted(jobs), strict=True)
    trace = make_trace("jobs", arrivals, work, [1] * len(jobs))
    return make_workload(None, trace, batch_slo=ClassSlo(completion_s, 1.0, completion_s))


def bound_s(workload: Workload, load_s: float, attainment: float = 1.0, buckets: int = 60) -> float:
    return lower_bound(workload, SECONDS, load_s, attainment, buckets).gpu_hours * HOUR / SHARE


def serves(counts: tuple[int, ...], jobs: list[Job], completion_s: float) -> bool:
    """Whether work that can be cut at will fits in between release and deadline."""
    edges = sorted({arrival for arrival, _ in jobs} | {arrival + completion_s for arrival, _ in jobs})
    for start, end in combinations(edges, 2):
        needed = sum(work for arrival, work in jobs if arrival >= start and arrival + completion_s <= end)
        if needed > sum(counts[int(start) : int(end)]):
            return False
    return True


def cost(counts: tuple[int, ...], load_s: float) -> float:
    return sum(counts) + load_s * sum(max(0, after - before) for before, after in pairwise(counts))


def least_cost(jobs: list[Job], completion_s: int, load_s: float, may_miss: int, most: int = 3) -> float:
    """Every schedule of whole instances over whole seconds, every choice of requests missed."""
    horizon = int(max(arrival for arrival, _ in jobs)) + completion_s
    subsets = list(combinations(jobs, len(jobs) - may_miss))
    schedules = sorted(product(range(most + 1), repeat=horizon), key=lambda counts: cost(counts, load_s))
    for counts in schedules:
        if any(serves(counts, list(kept), completion_s) for kept in subsets):
            return cost(counts, load_s)
    return float("inf")


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 3).map(float), st.integers(1, 3)), min_size=1, max_size=4),
    completion_s=st.integers(1, 3),
    load_s=st.sampled_from([0.0, 0.5, 3.0]),
    may_miss=st.integers(0, 1),
)
def test_no_schedule_is_cheaper_than_the_bound(
    jobs: list[Job], completion_s: int, load_s: float, may_miss: int
) -> None:
    may_miss = min(may_miss, len(jobs) - 1)
    attainment = 1 - may_miss / len(jobs)
    best = least_cost(jobs, completion_s, load_s, may_miss)
    assert bound_s(batch_of(jobs, completion_s), load_s, attainment, 24) <= best * (1 + 1e-3)


def test_steady_work_costs_just_itself() -> None:
    jobs = [(float(second), 2) for second in range(20)]
    assert bound_s(batch_of(jobs, 5.0), 45.0) == pytest.approx(40.0, rel=0.01)


def test_a_late_peak_costs_a_start_or_idle_time() -> None:
    """1 s of work a second, and at 10 s a burst of 30 s of work due within 5: 6 more instances."""
    jobs = [(float(second), 1) for second in range(20)] + [(10.0, 30)]
    workload = batch_of(jobs, 5.0)
    cheap, dear = bound_s(workload, 0.01), bound_s(workload, 1.0)
    assert cheap == pytest.approx(50, rel=0.02)
    assert 52 < dear <= 50 + 6.5


def test_bound_of_one_job_is_exact() -> None:
    assert bound_s(batch_of([(0.0, 12)], 6.0), 100.0) == pytest.approx(12.0, rel=1e-3)


def test_what_may_be_missed_is_what_helps_most() -> None:
    """The one small request that alone needs a second start is missed rather than the heaviest."""
    jobs = [(0.0, 30), (100.0, 4)]
    everything = bound_s(batch_of(jobs, 10.0), 0.0)
    assert everything == pytest.approx(34.0, rel=0.01)
    assert bound_s(batch_of(jobs, 10.0), 0.0, attainment=0.5) == pytest.approx(4.0, rel=0.02)
    crowd = [(float(second), 2) for second in range(0, 60, 2)]
    peak = [(30.5, 1)] * 3
    missing_peak = bound_s(batch_of(crowd, 2.0), 50.0)
    allowed = bound_s(batch_of([*crowd, *peak], 2.0), 50.0, attainment=1 - 3 / 33, buckets=248)
    assert allowed <= missing_peak * 1.01


def test_gpus_of_an_instance_count() -> None:
    costs = StepCosts(1e-9, 1e-9, 1e-12, 1.0)
    double = linear_profile(costs, kv_capacity=200, max_slots=4, max_step_tokens=100, gpus=2)
    workload = batch_of([(0.0, 10)], 20.0)
    single = lower_bound(workload, SECONDS, 1.0, 1.0, 20)
    assert lower_bound(workload, double, 1.0, 1.0, 20).gpu_hours == pytest.approx(2 * single.gpu_hours)


def test_due_times() -> None:
    trace = make_trace("t", [1.0, 2.0], [5, 5], [1, 11])
    workload = make_workload(trace, trace, ClassSlo(10, 0.2), ClassSlo(100, 2.0))
    interactive, batch = workload.streams
    assert list(due_times(interactive)) == pytest.approx([11.0, 14.0])
    assert list(due_times(batch)) == pytest.approx([113.0, 114.0])


@pytest.mark.parametrize("itl_slo_s", [0.0093, 0.2])
def test_a_recorded_hour(itl_slo_s: float) -> None:
    """Little but the work is lost; the schedule that goes with it covers the work."""
    trace = load_trace("azure-conv")
    workload = make_workload(trace, None, ClassSlo(10.0, itl_slo_s))
    bound = lower_bound(workload, load_profile("h100/llama-3.1-8b/tp1/bf16"), 45.0)
    assert 0.95 * bound.work_gpu_hours < bound.gpu_hours < 1.05 * bound.work_gpu_hours
    assert sum(bound.counts) * bound.bucket_s / HOUR >= bound.work_gpu_hours * 0.999

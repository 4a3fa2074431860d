"""Waiting time, late groups, and the least number of batch instances."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.policy.fleet.batch_queue import BatchQueue
from chiron_engine.policy.fleet.capacity import CapacityModel
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.instances import Tracked
from chiron_engine.policy.fleet.messages import FleetRequest, InstanceSpec
from chiron_engine.policy.fleet.output_estimate import OutputEstimate
from chiron_engine.policy.fleet.request_groups import GroupWork, group_range, group_work
from chiron_engine.policy.fleet.waiting_time import (
    Throughput,
    conservative,
    late_groups,
    least_instances,
    waiting_time,
)
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.policy.iteration.step_costs import StepCosts

SPEC = InstanceSpec(StepCosts(6e-3, 1e-5, 4e-8, 2e-5, 5e-10), 400_000, 512, 32_768)


def test_throughput_steps_up_as_instances_become_ready() -> None:
    throughput = Throughput(spare=0.5, rate=1.0, ready_in=(0.0, 40.0))
    # 1.5 a second for 40 s, 2.5 a second after.
    assert throughput.time_for(60.0) == pytest.approx(40.0)
    assert throughput.time_for(85.0) == pytest.approx(50.0)


def test_without_throughput_it_never_ends() -> None:
    assert Throughput(0.0, 1.0).time_for(1.0) == math.inf
    assert Throughput(0.0, 1.0, (30.0,)).time_for(1.0) == pytest.approx(31.0)
    assert Throughput(0.0, 1.0).time_for(0.0) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 5), st.floats(0.1, 2), st.lists(st.floats(0, 100), max_size=6), st.floats(0.001, 1000))
def test_time_for_solves_the_integral(spare: float, rate: float, ready: list[float], work: float) -> None:
    throughput = Throughput(spare, rate, tuple(sorted(ready)))
    time = throughput.time_for(work)
    if math.isfinite(time) and time < 1e9:
        delivered = spare * time + rate * sum(max(0.0, time - at) for at in ready)
        assert delivered == pytest.approx(work, rel=1e-6, abs=1e-6)


def test_waiting_time_is_the_normal_quantile() -> None:
    """W ~ Normal(q mu / T, q sigma^2 / T^2): 100 requests of 2 s +- 1 s on two instances."""
    throughput = Throughput(0.0, 1.0, (0.0, 0.0))
    assert waiting_time(200.0, 100.0, throughput) == pytest.approx((200 + 1.645 * 10) / 2)
    uncertain = Throughput(0.0, 1.0, (0.0, 0.0), cv=0.1)
    assert waiting_time(200.0, 100.0, uncertain) == pytest.approx((200 + 1.645 * math.hypot(10, 20)) / 2)


def test_the_estimate_covers_what_random_outputs_take() -> None:
    """95 of 100 queues of random lengths take no longer than predicted; the prediction is close."""
    rng = random.Random(5)
    mean, count = 1.0, 400
    predicted = conservative(count * mean, count * mean**2, 0.0)
    taken = [sum(rng.expovariate(1 / mean) for _ in range(count)) for _ in range(1000)]
    assert 0.93 < sum(time <= predicted for time in taken) / len(taken) < 0.97
    assert predicted < 1.1 * count * mean


def group(due: float, work: float, service: float = 0.0) -> GroupWork:
    return GroupWork(due, work, 0.0, service)


def test_a_group_waits_for_all_due_before_it() -> None:
    one = Throughput(0.0, 1.0, (0.0,))
    assert late_groups([group(100, 60), group(110, 60)], one, now=0.0) == 1
    assert late_groups([group(100, 60), group(121, 60)], one, now=0.0) == 0
    assert late_groups([group(100, 60), group(121, 60, service=5)], one, now=0.0) == 1


def test_loading_instances_count_from_when_they_are_ready() -> None:
    groups = [group(100, 100)]
    assert late_groups(groups, Throughput(0.0, 1.0, (0.0,)), 1.0) == 1
    assert late_groups(groups, Throughput(0.0, 1.0, (0.0, 45.0)), 1.0) == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(60, 4000), st.floats(0, 3000)), min_size=1, max_size=8),
    st.floats(0, 3),
    st.lists(st.sampled_from([0.0, 20.0, 44.0]), max_size=4),
)
def test_least_instances_is_least(
    groups: list[tuple[float, float]], spare: float, ready: list[float]
) -> None:
    lead, most = 45.0, 200
    ordered = [group(due, work) for due, work in sorted(groups)]
    existing = tuple(sorted(ready))
    count = least_instances(ordered, Throughput(spare, 1.0, existing), lead, most, 0.0)

    def late(number: int) -> int:
        times = (*existing[:number], *[lead] * (number - len(existing)))
        return late_groups(ordered, Throughput(spare, 1.0, times), 0.0)

    if count == most or late(most):
        return
    assert late(count) == 0
    assert count == 0 or late(count - 1) > 0


def test_ten_instance_hours_in_an_hour() -> None:
    groups = [group(3600.0, 36_000.0, service=15.0)]
    throughput = Throughput(0.0, 1.0, cv=0.0)
    assert least_instances(groups, throughput, 46.0, 50, 0.0) == math.ceil(36_000 / (3600 - 15 - 46))


def test_a_group_that_nothing_can_save_does_not_take_the_fleet() -> None:
    groups = [group(30.0, 500.0)]
    assert least_instances(groups, Throughput(0.0, 1.0), 45.0, 50, 0.0) == 1


def test_a_hopeless_group_due_after_the_load_lead_sets_no_deadline() -> None:
    """Fifty instances launched now would work for it for 15 s each: 750 s of 5,000."""
    hopeless = group(60.0, 5000.0)
    throughput = Throughput(0.0, 1.0)
    assert least_instances([hopeless], throughput, 45.0, 50, 0.0) == 1
    assert least_instances([hopeless], throughput, 45.0, 50, 0.0, delay_s=45.0) == 1
    # It must still be done, and before what can be saved.
    behind = group(3600.0, 10_000.0)
    assert least_instances([behind], throughput, 45.0, 50, 0.0) == 3
    assert least_instances([hopeless, behind], throughput, 45.0, 50, 0.0) == 5


def test_a_job_too_large_for_the_fleet_takes_all_of_it_while_that_saves_requests() -> None:
    assert least_instances([group(3600.0, 1e6)], Throughput(0.0, 1.0), 45.0, 50, 0.0) == 50


def test_groups_share_a_grid_and_widen_with_slack() -> None:
    start, width = group_range(1000.0, 600.0, 45.0)
    assert width == 45.0 and start <= 1000.0 < start + width
    start, width = group_range(40_000.0, 36_000.0, 45.0)
    assert width == 45.0 * 32 and start <= 40_000.0 < start + width
    assert group_range(1000.0, -5.0, 45.0)[1] == 45.0


def queued(count: int, prompt: int = 1000) -> tuple[BatchQueue, list[Tracked]]:
    queue = BatchQueue(45.0)
    slo = Slo(SloClass.BATCH, 3600.0, 2.0, 4000.0)
    requests = [Tracked(FleetRequest(number, slo, 0.0, prompt, 4096)) for number in range(count)]
    for tracked in requests:
        queue.join(tracked, 4000.0, 0.0)
    return queue, requests


def test_work_of_a_group_is_that_of_its_requests() -> None:
    model, outputs = CapacityModel(SPEC, FleetConfig()), OutputEstimate(256.0)
    for _ in range(5000):
        outputs.observe(300)
    queue, requests = queued(50)
    (only,) = queue.groups()
    one = model.work_s(1000, 300, model.batch_itl_s)
    assert group_work(only, model, outputs).work_s == pytest.approx(50 * one, rel=0.02)
    queue.take(requests[0])
    assert group_work(only, model, outputs).work_s == pytest.approx(49.5 * one, rel=0.02)
    queue.leave(requests[0])
    assert group_work(only, model, outputs).work_s == pytest.approx(49 * one, rel=0.02)


def test_output_lengths_given_what_was_produced() -> None:
    outputs = OutputEstimate(256.0)
    assert outputs.remaining(10_000) == 256.0
    for _ in range(500):
        outputs.observe(100)
        outputs.observe(1000)
    assert outputs.mean == pytest.approx(550, rel=0.01)
    assert outputs.remaining(0) == outputs.mean
    assert outputs.remaining(200) == pytest.approx(800, rel=0.01)


def test_a_long_queue_has_few_groups() -> None:
    """Waiting times cost O(groups): an hour of arrivals due an hour later makes some dozens."""
    queue = BatchQueue(46.0)
    for number in range(36_000):
        arrival = number / 10
        slo = Slo(SloClass.BATCH, 3600.0, 2.0, arrival + 3600.0)
        queue.join(Tracked(FleetRequest(number, slo, arrival, 100, 100)), arrival + 3600.0, arrival)
    groups = list(queue.groups())
    assert len(groups) < 50 and queue.num_queued == 36_000
    assert [group.start for group in groups] == sorted(group.start for group in groups)


def test_order_is_earliest_deadline_first_across_groups_and_fcfs_inside() -> None:
    queue = BatchQueue(46.0)
    deadlines = [4000.0, 900.0, 4001.0, 901.0, 100.0]
    for number, deadline in enumerate(deadlines):
        slo = Slo(SloClass.BATCH, 3600.0, 2.0, deadline)
        queue.join(Tracked(FleetRequest(number, slo, 0.0, 100, 100)), deadline, 0.0)
    order = []
    while (tracked := queue.peek(0, 0.0)) is not None:
        queue.take(tracked)
        order.append(tracked.request.request_id)
    assert order == [4, 1, 3, 0, 2]

"""Lives of instances: roles before launches, the cap, closing, failures, gauges."""

from __future__ import annotations

from itertools import pairwise

import pytest
from fleet_driver import SPEC, FleetDriver, batch, interactive

from chiron_engine.policy.fleet.capacity import CapacityModel
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_view import Decision, FleetView, PoolTarget
from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetResized,
    Forget,
    InstanceExited,
    InstanceReady,
    Launch,
    RequestEvicted,
    RequestFinished,
    Role,
)
from chiron_engine.policy.fleet.resize import resized


class Scripted:
    """A global autoscaler that wants what the test says."""

    def __init__(self, interactive: int, mixed: int, batch: int) -> None:
        self.want = (interactive, mixed, batch)

    def decide(self, view: FleetView) -> Decision:
        self.seen = view
        interactive, mixed, batch = self.want
        target = PoolTarget(view.pools[0].target_s, interactive, mixed)
        return Decision((target,), batch, 0.0, 1.0, 0.0, 0)


def scripted(start: int, want: tuple[int, int, int], max_gpus: int = 16) -> tuple[FleetDriver, Scripted]:
    driver = FleetDriver(config=FleetConfig(max_gpus=max_gpus)).start(start)
    autoscaler = Scripted(*want)
    driver.fleet.scaling._autoscaler = autoscaler
    return driver, autoscaler


def roles(driver: FleetDriver) -> tuple[int, int, int]:
    counts = list(driver.ready.values())
    return counts.count(Role.INTERACTIVE), counts.count(Role.MIXED), counts.count(Role.BATCH)


def test_roles_change_before_anything_is_launched() -> None:
    driver, autoscaler = scripted(6, (2, 2, 2))
    driver.run_ticks(2)
    assert roles(driver) == (2, 2, 2) and driver.launches == [] and driver.drains == []
    autoscaler.want = (2, 4, 0)
    driver.run_ticks(1)
    assert roles(driver) == (2, 4, 0) and driver.launches == [] and driver.drains == []


def test_interactive_takes_batch_instances_and_batch_is_launched_anew() -> None:
    driver, autoscaler = scripted(4, (0, 2, 2))
    driver.run_ticks(1)
    autoscaler.want = (0, 4, 2)
    driver.run_ticks(1)
    assert roles(driver) == (0, 4, 0)
    assert [launch.role for _, launch in driver.launches] == [Role.BATCH, Role.BATCH]
    driver.run_ticks(50)
    assert roles(driver) == (0, 4, 2) and len(driver.launches) == 2


def test_at_the_cap_batch_gives_way() -> None:
    driver, autoscaler = scripted(4, (0, 2, 2), max_gpus=4)
    driver.run_ticks(1)
    autoscaler.want = (0, 9, 5)
    driver.run_ticks(60)
    assert roles(driver) == (0, 4, 0) and driver.launches == []


def test_the_cap_counts_devices_not_instances() -> None:
    spec = SPEC.__class__(SPEC.costs, SPEC.kv_capacity_tokens, 512, 32_768, gpus=4)
    driver = FleetDriver(config=FleetConfig(max_gpus=11, min_instances=9), spec=spec).start(1)
    driver.run_ticks(60)
    assert len(driver.ready) == 2
    with pytest.raises(ValueError, match="0 to 2"):
        driver.fleet.start(3, 0.0)


def test_draining_instances_hold_their_devices() -> None:
    driver, autoscaler = scripted(2, (0, 1, 0), max_gpus=2)
    driver.tick()
    assert len(driver.draining) == 1
    autoscaler.want = (0, 2, 0)
    driver.tick()
    assert driver.launches == []
    driver.exit(next(iter(driver.draining)))
    driver.tick()
    assert len(driver.launches) == 1


def test_a_launch_no_longer_wanted_is_cancelled() -> None:
    driver, autoscaler = scripted(1, (0, 3, 0))
    driver.tick()
    assert len(driver.loading) == 2
    autoscaler.want = (0, 1, 0)
    driver.tick()
    assert driver.loading == {} and len(driver.draining) == 2 and roles(driver) == (0, 1, 0)
    instance = next(iter(driver.draining))
    driver.send(InstanceReady(instance))
    driver.arrive(interactive(0, driver.now))
    assert driver.on[0] != instance
    driver.send(InstanceExited(instance))
    assert instance not in driver.fleet.instances.by_id


def test_closing_lets_work_end_and_can_be_taken_back() -> None:
    driver, autoscaler = scripted(2, (0, 2, 0))
    for number in range(2):
        driver.arrive(batch(number, 0.0, 1e6))
        driver.fleet.instances.by_id[0].max_running = 0
    driver.tick()
    autoscaler.want = (0, 0, 0)
    driver.run_ticks(5)
    busy = set(driver.on.values())
    assert set(driver.ready) == busy, "empty ones are drained, the others may finish"
    autoscaler.want = (0, 1, 0)
    driver.run_ticks(1)
    assert driver.launches == []
    driver.arrive(interactive(9, driver.now))
    assert driver.on[9] in busy


def test_what_closes_for_too_long_is_drained_with_its_batch_handed_back() -> None:
    driver, autoscaler = scripted(1, (0, 1, 0))
    driver.arrive(batch(0, 0.0, 1e6))
    autoscaler.want = (0, 0, 0)
    driver.run_ticks(110)
    assert driver.on == {0: 0}
    driver.run_ticks(20)
    assert driver.on == {} and driver.fleet.dispatcher.queue.num_queued == 1


def test_the_emptiest_is_retired() -> None:
    driver, autoscaler = scripted(3, (0, 3, 0))
    for number in range(3):
        driver.arrive(interactive(number, 0.0))
    (busy,) = set(driver.on.values())
    autoscaler.want = (0, 1, 0)
    driver.tick()
    assert list(driver.ready) == [busy]


def test_a_surplus_that_still_serves_becomes_batch_too() -> None:
    driver, autoscaler = scripted(2, (0, 2, 0))
    for number in range(3):
        driver.arrive(interactive(number, 0.0))
    (busy,) = set(driver.on.values())
    driver.lose(1 - busy)
    autoscaler.want = (0, 0, 1)
    driver.run_ticks(3)
    assert driver.ready == {busy: Role.BATCH} and driver.launches == [] and len(driver.on) == 3


def launch_times(driver: FleetDriver, ticks: int) -> list[float]:
    """All launches of these ticks fail at once."""
    before = len(driver.launches)
    for _ in range(ticks):
        driver.tick()
        for instance in list(driver.loading):
            driver.fail_launch(instance)
    return [time for time, _ in driver.launches[before:]]


def test_failed_launches_back_off_and_stop_after_five() -> None:
    driver, _ = scripted(0, (0, 1, 0))
    at = launch_times(driver, 250)
    assert len(at) == 5 and driver.fleet.scaling.has_given_up
    for doublings, (before, after) in enumerate(pairwise(at), start=1):
        assert 0.8 * 2**doublings <= after - before <= 1.2 * 2**doublings + 1.0


def test_after_a_pause_one_launch_is_tried() -> None:
    driver, autoscaler = scripted(0, (0, 1, 0))
    launch_times(driver, 100)
    autoscaler.want = (0, 4, 0)
    assert len(launch_times(driver, 800)) == 2
    while not driver.loading:
        driver.tick()
    assert len(driver.loading) == 1
    driver.become_ready(next(iter(driver.loading)))
    driver.tick()
    assert len(driver.loading) == 3 and not driver.fleet.scaling.has_given_up


def test_launches_that_fail_together_count_once() -> None:
    driver, _ = scripted(0, (0, 6, 0))
    driver.tick()
    assert len(driver.loading) == 6
    for instance in list(driver.loading):
        driver.fail_launch(instance)
    assert driver.fleet.scaling.failed_launches == 1


def test_resizing_lets_launches_be_tried_again() -> None:
    driver, _ = scripted(0, (0, 1, 0))
    launch_times(driver, 100)
    driver.send(FleetResized(1, 16))
    assert len(launch_times(driver, 3)) >= 1 and not driver.fleet.scaling.has_given_up


def test_a_lower_cap_drains_at_once_and_a_higher_one_launches() -> None:
    driver, _ = scripted(4, (1, 1, 2))
    driver.run_ticks(1)
    driver.send(FleetResized(1, 1))
    driver.run_ticks(3)
    assert roles(driver) == (1, 0, 0) and driver.launches == []
    driver.send(FleetResized(1, 3))
    driver.run_ticks(60)
    assert sum(roles(driver)) == 3


@pytest.mark.parametrize(("policy", "idle"), [("chiron", 2), ("paper", 3), ("paper-literal", 2)])
def test_the_least_number_can_be_raised_and_lowered(policy: str, idle: int) -> None:
    """The paper's closed form keeps three instances for a load within its dead band."""
    driver = FleetDriver(policy, FleetConfig(max_gpus=8)).start(1)
    driver.run_ticks(5)
    driver.send(FleetResized(4, 8))
    driver.run_ticks(60)
    assert len(driver.ready) == 4
    driver.send(FleetResized(2, 8))
    driver.run_ticks(400)
    assert len(driver.ready) == idle


@pytest.mark.parametrize(
    ("policy", "asked", "message"),
    [
        ("chiron", {"min_instances": 0}, "min_instances is 0"),
        ("chiron", {"max_gpus": 0}, "first must fit"),
        ("chiron", {"min_instances": 5, "max_gpus": 4}, "first must fit"),
        ("chiron", {"min_instances": 9}, "first must fit"),
        ("chiron", {"max_gpus": 11}, "there are 10 devices"),
        ("static:2", {"min_instances": 2}, "keeps its number"),
        ("static:2", {"max_gpus": 1}, "from 1 to 1"),
    ],
)
def test_bounds_that_contradict_are_refused(policy: str, asked: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resized(FleetConfig(max_gpus=8), policy, SPEC, most_gpus=10, **asked)


def test_other_bounds_leave_the_rest_of_the_configuration() -> None:
    config = FleetConfig(max_gpus=8, tick_s=0.5)
    new = resized(config, "chiron", SPEC, max_gpus=3)
    assert new == FleetConfig(max_gpus=3, tick_s=0.5)


def test_a_lost_instance_is_replaced_and_its_requests_served_first() -> None:
    driver, _ = scripted(2, (0, 2, 0))
    driver.arrive(interactive(0, 0.0))
    driver.arrive(batch(1, 0.0, 1e6))
    lost = driver.on[0]
    driver.lose(lost, {0: 17})
    assert driver.on[0] != lost and driver.accepted[0].produced == 17
    driver.tick()
    assert len(driver.launches) == 1


def test_requests_without_any_instance_wait_for_one() -> None:
    driver, _ = scripted(0, (0, 1, 0))
    driver.arrive(interactive(0, 0.0))
    driver.arrive(batch(1, 0.0, 10.0))
    driver.run_ticks(50)
    assert set(driver.on) == {0, 1}


def test_late_news_changes_nothing() -> None:
    driver = FleetDriver().start(1)
    for event in (RequestFinished(7, 3), RequestEvicted(7, 3, 3), InstanceExited(7), InstanceReady(0)):
        assert driver.send(event) == []
    driver.report(0)
    driver.check_places()


def test_the_end_of_a_request_is_told_after_that_of_its_instance() -> None:
    driver, _ = scripted(1, (0, 1, 0))
    driver.arrive(interactive(0, 0.0))
    driver.arrive(batch(1, 0.0, 1e6))
    driver.lose(driver.on[0], {0: 17, 1: 17})
    dispatcher = driver.fleet.dispatcher
    assert 0 in dispatcher.held and dispatcher.tracked[1].is_queued
    for request_id in (0, 1):
        driver.ended[request_id] = 1
        driver.send(RequestFinished(request_id, 20))
    driver.check_places()
    assert not driver.fleet.has_work
    driver.run_ticks(50)
    assert driver.on == {}


def test_a_request_that_ends_while_it_is_queued_leaves_no_kv_behind() -> None:
    driver, _ = scripted(1, (0, 1, 0))
    driver.arrive(batch(1, 0.0, 1e6))
    instance = driver.on[1]
    assert driver.evict(1) == [] and driver.saved == {1: instance}
    driver.ended[1] = 1
    assert driver.send(RequestFinished(1, 20))[0] == Forget(1, instance)
    assert driver.saved == {}


def test_gauges() -> None:
    driver, _ = scripted(3, (1, 2, 2))
    driver.tick()
    driver.arrive(batch(0, 0.0, 1e6))
    gauges = driver.fleet.gauges(driver.now)
    assert (gauges.interactive, gauges.mixed, gauges.batch, gauges.loading) == (1, 2, 0, 2)
    assert (gauges.target, gauges.batch_target) == (3, 2)
    assert gauges.queued_batch == 0 and driver.fleet.has_work


def test_a_deadline_job_with_chiron_end_to_end() -> None:
    """A job of about two instance-hours due in one, one mixed instance there: two more come, all
    is done in time, and they go again."""
    driver = FleetDriver(config=FleetConfig(max_gpus=20)).start(1)
    model = driver.fleet.model
    work = model.work_s(2000, 256, model.batch_itl_s)
    count = int(2.2 * 3600 / work)
    for number in range(count):
        driver.arrive(batch(number, 0.0, 3600.0, prompt=2000))
    while driver.fleet.has_work and driver.now < 4000:
        driver.run_ticks(1)
        serve_batch(driver, model, work)
    assert driver.now < 3600.0
    assert 2 <= len(driver.launches) <= 3
    driver.run_ticks(int(SPEC.load_s) + 6)
    assert roles(driver)[2] == 0 and len(driver.ready) == 1


def serve_batch(driver: FleetDriver, model: CapacityModel, work: float) -> None:
    """Each instance does a second of work a second, the oldest requests first."""
    for instance in list(driver.ready):
        mine = [request for request, where in driver.on.items() if where == instance]
        for request in mine[: round(1.0 / work)]:
            driver.finish(request, 256)


def test_batch_throughput_counts_instances_from_when_they_are_ready() -> None:
    driver, autoscaler = scripted(1, (0, 1, 2))
    driver.run_ticks(11)
    lead_s = autoscaler.seen.lead_s
    assert autoscaler.seen.batch.throughput.ready_in == (lead_s - 10.0,) * 2
    driver.run_ticks(40)
    assert autoscaler.seen.batch.throughput.ready_in == (0.0, 0.0)


def test_batch_throughput_counts_what_mixed_instances_have_left() -> None:
    driver, autoscaler = scripted(2, (0, 2, 0))
    driver.tick()
    assert autoscaler.seen.batch.throughput.spare == 2.0
    for number in range(30):
        driver.arrive(interactive(number, 0.0, prompt=8000))
    driver.tick()
    load = autoscaler.seen.pools[0].load
    assert load > 0.2
    assert autoscaler.seen.batch.throughput.spare == pytest.approx(2.0 - load)


def test_pools_show_which_instances_load_and_what_came() -> None:
    driver, autoscaler = scripted(1, (0, 3, 0))
    driver.run_ticks(5)
    driver.arrive(interactive(0, driver.now))
    driver.run_ticks(1)
    pool = autoscaler.seen.pools[0]
    assert (pool.ready, pool.loading) == (1, 2)
    assert pool.next_ready_s == autoscaler.seen.lead_s - 5.0
    assert pool.arrived_load == pytest.approx(pool.load) and pool.arrived_work_s > 0
    driver.run_ticks(50)
    pool = autoscaler.seen.pools[0]
    assert (pool.ready, pool.loading, pool.next_ready_s) == (3, 0, autoscaler.seen.lead_s)
    assert pool.arrived_load == 0.0


def test_orders_of_launch_and_drain_carry_the_itl_target() -> None:
    driver, _ = scripted(0, (0, 1, 0))
    (launch,) = driver.tick()
    assert launch == Launch(0, Role.MIXED, 0.2)
    assert not isinstance(launch, Drain)


def test_launches_may_fail_any_number_of_times() -> None:
    driver, _ = scripted(0, (0, 1, 0))
    for _ in range(20):
        driver.tick()
        while not driver.loading:
            driver.tick()
        driver.fail_launch(next(iter(driver.loading)))
    gaps = [later - sooner for (sooner, _), (later, _) in pairwise(driver.launches)]
    assert 239.0 <= max(gaps) <= 362.0

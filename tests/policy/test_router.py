"""Packing, roles, ITL buckets, affinity, and what holding back costs."""

from __future__ import annotations

import pytest
from fleet_driver import SPEC, FleetDriver, batch, interactive

from chiron_engine.policy.fleet.capacity import CapacityModel
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.instances import Instance, Tracked
from chiron_engine.policy.fleet.load_index import BUCKETS, LoadIndex
from chiron_engine.policy.fleet.messages import (
    Forget,
    InstanceState,
    Reject,
    Role,
    Route,
    SetRole,
)
from chiron_engine.policy.fleet.router import LOOKAHEAD, Router


def ready_instance(number: int, role: Role, load: float, target: float = 0.2) -> Instance:
    instance = Instance(number, role, target, 1000.0, 100, 0.0)
    instance.state = InstanceState.READY
    instance.load = load
    return instance


def routes(effects: list) -> dict[int, int]:
    return {e.request_id: e.instance_id for e in effects if isinstance(e, Route)}


def test_the_fullest_with_room_is_picked() -> None:
    router = Router(FleetConfig(), CapacityModel(SPEC, FleetConfig()))
    for number, load in enumerate((0.1, 0.9, 0.6, 0.999)):
        router.refresh(ready_instance(number, Role.INTERACTIVE, load))
    router.refresh(ready_instance(9, Role.MIXED, 0.95))
    tracked = Tracked(interactive(0, 0.0))
    tracked.kv_tokens = 0.05 * SPEC.kv_capacity_tokens
    chosen = router.pick_interactive(tracked, 0.0)
    assert chosen is not None and chosen.instance_id == 1
    tracked.kv_tokens = 0.3 * SPEC.kv_capacity_tokens
    chosen = router.pick_interactive(tracked, 0.0)
    assert chosen is not None and chosen.instance_id == 2


def test_own_type_before_mixed_however_full() -> None:
    router = Router(FleetConfig(), CapacityModel(SPEC, FleetConfig()))
    router.refresh(ready_instance(0, Role.MIXED, 0.9))
    router.refresh(ready_instance(1, Role.INTERACTIVE, 0.0))
    chosen = router.pick_interactive(Tracked(interactive(0, 0.0)), 0.0)
    assert chosen is not None and chosen.instance_id == 1


def test_a_burst_of_prompts_spills_over_before_their_ttft_is_gone() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=12)).start(12)
    for number in range(100):
        driver.arrive(interactive(number, 0.0, prompt=8000, ttft_s=2.0))
    assert len(set(driver.on.values())) == 12


@pytest.mark.parametrize("count", [10, 1000])
def test_a_pick_touches_no_more_instances_in_a_larger_fleet(count: int) -> None:
    index = LoadIndex()
    for number in range(count):
        index.put(ready_instance(number, Role.MIXED, (number % 97) / 100))
    assert next(index.fullest_first(0.5)).load <= 0.5
    seen = 0
    for _ in index.fullest_first(0.5):
        seen += 1
        if seen == 4:
            break
    assert seen == 4
    emptiest = index.emptiest()
    assert emptiest is not None and emptiest.load == 0.0


def test_the_index_follows_loads() -> None:
    index = LoadIndex()
    instance = ready_instance(0, Role.MIXED, 1.0)
    index.put(instance)
    assert instance.bucket == BUCKETS
    assert list(index.fullest_first(0.99)) == []
    assert list(index.fullest_first(1.0)) == [instance]
    instance.load = 3.0
    index.put(instance)
    assert list(index.fullest_first(1.0)) == [] and index.emptiest() is instance
    index.discard(instance)
    assert index.emptiest() is None


def test_interactive_work_packs() -> None:
    driver = FleetDriver().start(4)
    for number in range(100):
        driver.arrive(interactive(number, 0.0))
    assert set(driver.on.values()) == {driver.on[0]}


def test_a_batch_instance_turns_mixed_before_a_request_waits() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=1)).start(1)
    instance = driver.fleet.instances.by_id[0]
    driver.fleet.dispatcher.set_role(instance, Role.BATCH, 0.2)
    effects = driver.arrive(interactive(0, 0.0))
    assert SetRole(0, Role.MIXED, 0.2) in effects and routes(effects) == {0: 0}


def fill_up(driver: FleetDriver, first: int = 0) -> int:
    """Interactive requests until one is held; its id."""
    number = first
    while not driver.fleet.dispatcher.held:
        driver.arrive(interactive(number, driver.now, ttft_s=1000.0))
        number += 1
    return number - 1


def test_a_request_without_room_is_held_then_served_at_a_finish() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=1)).start(1)
    held = fill_up(driver)
    assert held > 100 and held not in driver.on
    driver.finish(0)
    assert held in driver.on


def test_slack_nearly_gone_goes_to_the_least_loaded() -> None:
    driver = FleetDriver("static:1", FleetConfig(max_gpus=1)).start(1)
    first = fill_up(driver)
    driver.arrive(interactive(first + 1, driver.now, ttft_s=10.0))
    driver.run_ticks(4)
    assert first + 1 not in driver.on
    driver.run_ticks(2)
    assert first + 1 in driver.on


def test_itl_buckets_keep_looser_requests_apart() -> None:
    driver = FleetDriver(config=FleetConfig(itl_targets_s=(0.02, 0.2))).start(1)
    loose = driver.fleet.instances.by_id[0]
    driver.fleet.dispatcher.set_role(loose, Role.MIXED, 0.2)
    assert routes(driver.arrive(interactive(0, 0.0, itl_s=0.2))) == {0: 0}
    assert routes(driver.arrive(interactive(1, 0.0, itl_s=0.05))) == {}, "no instance is that tight"
    driver.fleet.dispatcher.set_role(loose, Role.MIXED, 0.02)
    driver.tick()
    assert 1 in driver.on


def test_a_request_tighter_than_all_buckets_is_told_the_best_on_offer() -> None:
    driver = FleetDriver(config=FleetConfig(itl_targets_s=(0.02, 0.2))).start(1)
    (effect,) = driver.arrive(interactive(0, 0.0, itl_s=0.008))
    assert isinstance(effect, Reject) and "best on offer is 20 ms" in effect.reason
    assert "8 ms" in effect.reason


def test_a_prompt_no_instance_holds_is_refused() -> None:
    driver = FleetDriver().start(1)
    (effect,) = driver.arrive(batch(0, 0.0, 100.0, prompt=30_000))
    assert isinstance(effect, Reject) and "32768" in effect.reason


def test_prefix_affinity_breaks_the_tie() -> None:
    driver = FleetDriver().start(2)
    for number in range(60):
        driver.arrive(interactive(number, 0.0))
    instances = driver.fleet.instances.by_id
    other = instances[1 - driver.on[0]]
    follow_up = interactive(1000, 0.0)
    follow_up.prefix = "conversation"
    driver.arrive(follow_up)
    assert driver.on[1000] == driver.on[0]
    again = interactive(1001, 0.0)
    again.prefix = "conversation"
    driver.arrive(again)
    assert driver.on[1001] == driver.on[1000] != other.instance_id


def test_batch_fills_a_batch_instance_by_kv_with_few_waiting() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=1)).start(1)
    for number in range(1000):
        driver.arrive(batch(number, 0.0, 1e6))
    mean_kv = 1000 + 0.5 * 256
    assert len(driver.on) == SPEC.kv_capacity_tokens // mean_kv
    driver.finish(0, 256)
    assert len(driver.on) == SPEC.kv_capacity_tokens // mean_kv


def test_batch_follows_the_limit_of_the_engine() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=1)).start(1)
    driver.report(0, max_running=8)
    for number in range(100):
        driver.arrive(batch(number, 0.0, 1e6))
    assert len(driver.on) == 8 + LOOKAHEAD
    driver.report(0, max_running=20)
    assert len(driver.on) == 20 + LOOKAHEAD


def test_evictions_are_counted_wherever_the_request_runs() -> None:
    """But not its return from an instance that drains, which no other request asked for."""
    driver = FleetDriver(config=FleetConfig(max_gpus=2)).start(2)
    routed = driver.arrive(batch(0, 0.0, 1e6))
    for evictions in range(3):
        assert routed == [Route(0, driver.on[0], evictions)]
        routed = driver.evict(0, saved=0)
        driver.report(1 - driver.on[0])
    request = driver.fleet.dispatcher.tracked[0].request
    assert request.evictions == 3
    driver.fleet.instances.set_draining(driver.fleet.instances.by_id[driver.on[0]])
    driver.evict(0, saved=0)
    assert request.evictions == 3


def test_an_evicted_request_waits_for_its_home_then_runs_elsewhere() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=2)).start(2)
    driver.arrive(batch(0, 0.0, 1e6))
    home = driver.on[0]
    driver.evict(0)
    assert driver.on == {}
    driver.report(home)
    assert driver.on == {0: home}, "the saved KV is there"
    driver.evict(0)
    driver.fleet.instances.by_id[home].max_running = 0
    effects = [effect for _ in range(8) for effect in driver.tick()]
    assert Forget(0, home) in effects and driver.on == {0: 1 - home}

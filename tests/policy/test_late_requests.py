"""Interactive requests that are out of time: where they go when no instance has room."""

from __future__ import annotations

from fleet_driver import FleetDriver, interactive

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.dispatcher import MOST_LATE_LOAD


def overloaded(requests: int) -> FleetDriver:
    driver = FleetDriver(config=FleetConfig(max_gpus=1)).start(1)
    for request_id in range(requests):
        driver.arrive(interactive(request_id, driver.now))
    return driver


def test_an_overloaded_instance_is_given_no_more_while_others_may_come() -> None:
    driver = overloaded(3000)
    driver.run_ticks(8)
    (instance,) = driver.fleet.instances.by_id.values()
    assert driver.fleet.dispatcher.held
    assert 1.0 < instance.load < MOST_LATE_LOAD + 0.1
    assert instance.prefilled_at - driver.now < 10.0


def test_those_that_can_still_attain_go_before_those_that_cannot() -> None:
    driver = overloaded(3000)
    driver.run_ticks(12)
    lost = set(driver.fleet.dispatcher.held)
    assert lost
    driver.arrive(interactive(9000, driver.now))
    driver.arrive(interactive(9001, driver.now))
    while 9000 in driver.fleet.dispatcher.held:
        (instance,) = driver.fleet.instances.by_id.values()
        for request_id in list(instance.interactive)[:20]:
            driver.finish(request_id)
        driver.run_ticks(1)
        assert driver.now < 30.0
    assert set(driver.fleet.dispatcher.held) & lost

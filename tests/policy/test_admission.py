"""What becomes of interactive requests that find no room within their TTFT slack."""

from __future__ import annotations

import pytest

from chiron_engine.policy.fleet.config import FleetConfig
from tests.policy.fleet_driver import FleetDriver, interactive

MANY = 2000


def overloaded(admission: str) -> FleetDriver:
    """One instance that is all there may be, and far more requests at once than it holds."""
    driver = FleetDriver(config=FleetConfig(max_gpus=1, admission=admission)).start(1)
    for number in range(MANY):
        driver.arrive(interactive(number, 0.0))
    driver.run_ticks(12)
    driver.check_places()
    return driver


def test_strict_refuses_with_a_hint_what_cannot_keep_its_slo() -> None:
    driver = overloaded("strict")
    assert len(driver.on) > 50
    assert len(driver.on) + len(driver.rejected) == MANY
    assert not driver.fleet.dispatcher.held
    reason = next(iter(driver.rejected.values()))
    assert "no instance has room to keep a TTFT of 10 s and an ITL of 200 ms" in reason


def test_hold_refuses_nothing() -> None:
    assert not overloaded("hold").rejected


def test_what_has_tokens_is_not_refused() -> None:
    driver = FleetDriver(config=FleetConfig(max_gpus=2, admission="strict")).start(2)
    for number in range(1500):
        driver.arrive(interactive(number, 0.0))
    produced = {number: 5 for number, instance in driver.on.items() if instance == 0}
    assert produced
    driver.lose(0, produced)
    driver.run_ticks(20)
    assert driver.rejected
    assert not set(produced) & set(driver.rejected)


def test_another_admission_is_named() -> None:
    with pytest.raises(ValueError, match="admission is 'maybe'; it must be one of hold, strict"):
        FleetConfig(admission="maybe")

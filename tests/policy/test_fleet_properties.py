"""No request is lost or run twice, whatever happens to instances."""

from __future__ import annotations

import pytest
from fleet_driver import FleetDriver, batch, interactive
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chiron_engine.policy.fleet.config import FleetConfig

ACTIONS = (
    "interactive", "interactive", "tight", "batch", "batch", "batch", "huge", "finish", "finish", "cancel",
    "evict", "evict-unsaved", "lose", "fail", "ready", "exit", "report", "tick", "tick", "ticks",
)  # fmt: skip
steps = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1_000)), max_size=120)


@settings(max_examples=150, deadline=None)
@given(steps, st.sampled_from(("chiron", "paper", "paper-literal", "static:2")))
@example([("tight", 1), ("lose", 0), ("lose", 0)], "chiron")  # next to no demand, and no instance for it
def test_every_request_is_in_exactly_one_place(actions: list[tuple[str, int]], policy: str) -> None:
    config = FleetConfig(max_gpus=5, itl_targets_s=(0.05, 0.2))
    driver = FleetDriver(policy, config).start(2)
    for number, (action, choice) in enumerate(actions):
        act(driver, action, choice, number)
        driver.check_places()
    end(driver)
    accepted = [r for r in driver.accepted if r not in driver.rejected]
    assert {r: 1 for r in accepted} == driver.ended
    assert not driver.saved and not driver.fleet.has_work


def act(driver: FleetDriver, action: str, choice: int, number: int) -> None:
    now = driver.now
    if action == "interactive":
        driver.arrive(interactive(number, now, prompt=1 + 13 * choice))
    elif action == "tight":
        driver.arrive(interactive(number, now, itl_s=0.01 if choice % 3 == 0 else 0.06, ttft_s=0.5))
    elif action == "batch":
        driver.arrive(batch(number, now, now + 10 * choice, prompt=1 + 13 * choice))
    elif action == "huge":
        driver.arrive(batch(number, now, now + 3600, prompt=24_000 + 10 * choice))
    elif action in ("finish", "evict", "evict-unsaved", "cancel"):
        act_on_request(driver, action, choice)
    elif action in ("lose", "report") and driver.ready:
        instance = pick(driver.ready, choice)
        driver.lose(instance) if action == "lose" else driver.report(instance, 1 + choice, choice)
    elif action in ("fail", "ready") and driver.loading:
        instance = pick(driver.loading, choice)
        driver.fail_launch(instance) if action == "fail" else driver.become_ready(instance)
    elif action == "exit" and driver.draining:
        driver.exit(pick(driver.draining, choice))
    elif action == "tick":
        driver.tick()
    elif action == "ticks":
        driver.run_ticks(choice % 60)


def act_on_request(driver: FleetDriver, action: str, choice: int) -> None:
    open_ones = [r for r in driver.accepted if r not in driver.ended and r not in driver.rejected]
    if action == "cancel" and open_ones:
        driver.cancel(pick(open_ones, choice))
    elif action == "finish" and driver.on:
        driver.finish(pick(driver.on, choice), 1 + choice)
    elif action.startswith("evict") and driver.on:
        saved = 0 if action == "evict-unsaved" else 100
        request = pick(driver.on, choice)
        if driver.on[request] not in driver.draining:
            driver.evict(request, produced=choice, saved=saved)


def pick(things: object, choice: int) -> int:
    listed = list(things)  # type: ignore[call-overload]
    return listed[choice % len(listed)]


def end(driver: FleetDriver) -> None:
    """Everything works again: all requests are served within a bounded time."""
    for _ in range(400):
        if not driver.fleet.has_work:
            return
        for request in list(driver.on):
            driver.finish(request)
        for instance in list(driver.ready):
            driver.report(instance)
        driver.run_ticks(1, load_s=3.0)
        driver.check_places()
    pytest.fail(f"not served: {list(driver.fleet.dispatcher.tracked)}")

"""A recorded fleet decides the same when it is replayed; one that does not is caught at that event."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.cluster.event_log import EventLog
from chiron_engine.commands.exits import CommandError
from chiron_engine.commands.replay import _replay_file
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.dispatcher import Dispatcher
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import (
    FleetEffect,
    FleetEvent,
    InstanceJoined,
    RequestFinished,
    Role,
)
from tests.cluster.fleet_stack import SHAPE, InProcessLauncher, expected, running_fleet
from tests.policy.fleet_driver import SPEC, FleetDriver, batch, interactive

CONFIG = FleetConfig(max_gpus=5, itl_targets_s=(0.05, 0.2))


class LoggedFleet:
    """Writes what the fleet inside of it is told and answers, as the coordinator does."""

    def __init__(self, fleet: FleetState, log: EventLog) -> None:
        self._fleet = fleet
        self._log = log

    def handle(self, event: FleetEvent, now: float) -> list[FleetEffect]:
        self._log.event(event, now)
        effects = self._fleet.handle(event, now)
        self._log.effects(effects)
        return effects

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)


def logged_driver(log: EventLog, policy: str = "chiron") -> FleetDriver:
    driver = FleetDriver(policy, CONFIG)
    log.begin(policy, SPEC, CONFIG, 2, driver.now)
    driver.fleet = LoggedFleet(driver.fleet, log)  # type: ignore[assignment]
    return driver.start(2)


def act(driver: FleetDriver, action: str, choice: int, number: int) -> None:
    now, running, ready = driver.now, list(driver.on), list(driver.ready)
    if action == "interactive":
        driver.arrive(interactive(number, now, 1 + 13 * choice, itl_s=0.06 if choice % 2 else 0.2))
    elif action == "batch":
        driver.arrive(batch(number, now, now + 10 * choice, 1 + 13 * choice))
    elif action == "ticks":
        driver.run_ticks(1 + choice % 60)
    elif action in ("finish", "cancel", "evict") and running:
        request = running[choice % len(running)]
        if action == "evict" and driver.on[request] in driver.draining:
            return
        getattr(driver, action)(request)
    elif action in ("lose", "report") and ready:
        instance = ready[choice % len(ready)]
        driver.lose(instance) if action == "lose" else driver.report(instance, 1 + choice, choice)
    elif action == "fail" and driver.loading:
        driver.fail_launch(list(driver.loading)[choice % len(driver.loading)])


def end(driver: FleetDriver) -> None:
    """Everything works again, until all requests are served."""
    while driver.fleet.has_work:
        for request in list(driver.on):
            driver.finish(request)
        for instance in list(driver.ready):
            driver.report(instance)
        driver.run_ticks(1, load_s=3.0)


ACTIONS = ("interactive", "batch", "batch", "ticks", "finish", "cancel", "evict", "lose", "report", "fail")
steps = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1_000)), max_size=80)


@settings(max_examples=40, deadline=None)
@given(steps)
def test_whatever_happens_to_a_fleet_replays(actions: list[tuple[str, int]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with EventLog(path) as log:
            driver = logged_driver(log)
            for number, (action, choice) in enumerate(actions):
                act(driver, action, choice, number)
            end(driver)
        result = _replay_file(path)
        assert result["difference"] is None
        (section,) = result["sections"]
        assert section["events"] == len(path.read_bytes().splitlines()) - 1


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    """Two lives of a fleet: a dozen requests, then a few."""
    path = tmp_path / "log"
    for count in (12, 3):
        with EventLog(path) as log:
            driver = logged_driver(log)
            for number in range(count):
                driver.arrive(interactive(number, driver.now))
                driver.arrive(batch(100 + number, driver.now, driver.now + 600))
                driver.tick()
            end(driver)
    return path


def test_each_life_of_a_coordinator_is_a_section(log_path: Path) -> None:
    result = _replay_file(log_path)
    assert result["difference"] is None
    events = [section["events_by_kind"]["RequestArrived"] for section in result["sections"]]
    assert events == [24, 6]
    assert all(section["decisions_by_kind"]["Route"] >= 6 for section in result["sections"])


def test_a_policy_that_decides_otherwise_is_caught_at_that_event(
    log_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fifth arrival on, it routes elsewhere."""
    handle, arrived = FleetState.handle, []

    def mutated(self: FleetState, event: FleetEvent, now: float) -> list[FleetEffect]:
        effects = handle(self, event, now)
        if type(event).__name__ == "RequestArrived":
            arrived.append(event)
            if len(arrived) == 5:
                return [replace(effect, instance_id=77) for effect in effects]  # type: ignore[type-var]
        return effects

    lines = [json.loads(line) for line in log_path.read_bytes().splitlines()]
    fifth = [n for n, line in enumerate(lines, 1) if line.get("kind") == "RequestArrived"][4]
    monkeypatch.setattr(FleetState, "handle", mutated)
    difference = _replay_file(log_path)["difference"]
    assert (difference["line"], difference["section"]) == (fifth, 1)
    assert difference["where"].startswith(f"event {fifth - 1}, ")
    assert [told.replace("instance_id=77", "instance_id=0") for told in difference["got"]] == [
        told.replace("instance_id=1", "instance_id=0") for told in difference["expected"]
    ]
    assert [text.partition(":")[0] for text in difference["before"]] == [str(fifth - n) for n in (3, 2, 1)]


def test_a_policy_that_fails_is_a_difference(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no idea")

    monkeypatch.setattr(Dispatcher, "arrive", broken)
    difference = _replay_file(log_path)["difference"]
    assert difference["got"] == ["raised RuntimeError: no idea"]


def test_an_event_that_failed_the_policy_fails_it_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EventLog(path) as log:
        driver = logged_driver(log)
        with pytest.raises(ValueError, match="instance 9 joins"):
            driver.send(InstanceJoined(9, Role.MIXED, 0.2))
        driver.tick()
    assert '"kind":"InstanceJoined","fields":[9,"mixed",0.2],"effects":null}' in path.read_text()
    assert _replay_file(path)["difference"] is None
    path.write_text(path.read_text().replace('"fields":[9,', '"fields":[2,'))  # the next one: it may join
    difference = _replay_file(path)["difference"]
    assert (difference["expected"], difference["got"]) == (["an exception"], [])


def test_a_run_over_sockets_replays(tmp_path: Path) -> None:
    """Batch work is evicted, an engine is lost, another launched."""
    path = tmp_path / "log"
    shape = replace(SHAPE, num_device_blocks=40, max_slots=4)
    config = FleetConfig(max_gpus=2, tick_s=0.1, prior_output_tokens=32.0)

    async def check(log: EventLog) -> None:
        launcher = InProcessLauncher(shape=shape)
        async with running_fleet(
            config, policy="static:2", initial=2, launcher=launcher, event_log=log
        ) as fleet:
            batch = [asyncio.create_task(fleet.generate([5, i], 150, batch=True, seed=i)) for i in range(12)]
            await asyncio.sleep(0.5)
            answers = asyncio.gather(*(fleet.generate([7] * 150 + [i], 40) for i in range(6)))
            await asyncio.sleep(0.2)
            await launcher.stop(0, 0.0)
            for i, tokens in enumerate(await answers):
                assert tokens == expected([7] * 150 + [i], 40)
            await asyncio.gather(*batch)

    with EventLog(path) as log:
        asyncio.run(check(log))
    result = _replay_file(path)
    assert result["difference"] is None
    (section,) = result["sections"]
    counts = section["events_by_kind"]
    assert counts["RequestFinished"] == counts["RequestArrived"] == 18
    assert counts["RequestEvicted"] and counts["InstanceReported"] and section["decisions_by_kind"]["Launch"]


def test_a_made_up_answer_is_caught(log_path: Path) -> None:
    lines = log_path.read_text().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if '"Tick","fields":[],"effects":[]' in line)
    lines[number] = lines[number].replace('"effects":[]', '"effects":[["Drain",[0]]]')
    log_path.write_text("".join(lines))
    difference = _replay_file(log_path)["difference"]
    assert (difference["line"], difference["got"]) == (number + 1, [])
    assert difference["expected"] == ["Drain(instance_id=0)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"format":2>"format":3', "line 1: the format of these fleet events is 3; this version reads 2"),
        ('"recording":"fleet events">"recording":"birds"', "a recording of 'birds'"),
        ('"event":4,>"event":5,', "line 5: event 5 follows event 3"),
        ('{"event":4,>{"event":4,,', "line 5: it is no JSON object"),
        ('"kind":"InstanceReady">"kind":"Party"', "line 2: 'Party' is no kind of event"),
        ('"policy":"chiron">"policy":"daedalus"', "line 1: unknown policy 'daedalus'"),
        ('"max_gpus":5>"max_gpus":0', "line 1: max_gpus is 0"),
        ('"kv_capacity_tokens">"kv_tokens"', "line 1: the header is not one of fleet events"),
    ],
)
def test_damaged_files_are_told_by_line(log_path: Path, change: str, message: str) -> None:
    old, new = change.split(">")
    text = log_path.read_text()
    assert old in text
    log_path.write_text(text.replace(old, new, 1))
    with pytest.raises(CommandError, match="log, line ") as failure:
        _replay_file(log_path)
    assert message in failure.value.message and failure.value.code == 2


def test_a_last_line_cut_by_a_kill_is_left_out(log_path: Path) -> None:
    whole = log_path.read_bytes()
    num_lines = whole.count(b"\n")
    log_path.write_bytes(whole[:-5])
    result = _replay_file(log_path)
    assert (result["difference"], result["cut_lines"]) == (None, [num_lines])


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    for content, message in (
        (b"buy milk\n", "line 1"),
        (b"buy milk", "line 1"),
        (b"{}\n", "starts with a header"),
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CommandError, match=message):
            _replay_file(tmp_path / "file")


def test_a_coordinator_without_an_engine_decided_nothing(tmp_path: Path) -> None:
    with EventLog(tmp_path / "log"):
        pass
    result = _replay_file(tmp_path / "log")
    assert (result["sections"], result["difference"]) == ([], None)


def test_finishing_twice_changes_nothing(log_path: Path) -> None:
    """Late news is replayed as it was told."""
    with EventLog(log_path) as log:
        driver = logged_driver(log)
        driver.fleet.handle(RequestFinished(5, 5), 1.0)
    assert _replay_file(log_path)["difference"] is None

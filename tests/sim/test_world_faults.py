"""Engines that die, launches that are slow or fail: every request is served, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from chiron_engine.policy.fleet.messages import Drain, InstanceLost
from chiron_engine.sim.faults import FaultDice, FaultSettings
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.run_result import Outcome, RunResult
from chiron_engine.sim.sim_policy import SimPolicy
from tests.sim.plain_fleet import PlainFleet, plain_policy
from tests.sim.small_world import mixed_workload, small_profile, small_run

ROOT = Path(__file__).resolve().parents[2]


def random_faults(seed: int) -> FaultSettings:
    dice = Random(seed)
    return FaultSettings(
        losses_per_hour=dice.choice((0.0, 60.0, 240.0, 600.0)),
        slow_launches=dice.choice((0.0, 0.3)),
        slow_factor=dice.uniform(1.0, 6.0),
        failed_launches=dice.choice((0.0, 0.2, 0.5)),
        detection_s=dice.choice((0.0, 0.5, 3.0)),
    )


def assert_served_once(result: RunResult) -> None:
    assert set(result.requests.served) == {1}
    assert set(result.requests.outcome) == {Outcome.FINISHED}
    streams = result.workload.streams
    assert list(result.requests.output_tokens) == [n for s in streams for n in s.trace.output_tokens]


def run_with_faults(policy: SimPolicy, seed: int) -> RunResult:
    return small_run(
        mixed_workload(seed, 25, 15, 20.0),
        policy,
        small_profile(kv_tokens=4096),
        seed=seed,
        faults=random_faults(seed),
        load_jitter=0.5,
    )


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_every_request_is_served_once_whatever_fails(first: int) -> None:
    results = [run_with_faults(make_policy("chiron"), seed) for seed in range(first, first + 20)]
    for result in results:
        assert_served_once(result)
    assert sum(result.lost_instances for result in results) > 0
    assert sum(result.failed_launches for result in results) > 0


@pytest.mark.parametrize("name", ["plain", "paper", "paper-literal", "static:2"])
def test_every_policy_serves_every_request_once(name: str) -> None:
    for seed in range(20):
        policy = plain_policy(size=2) if name == "plain" else make_policy(name)
        assert_served_once(run_with_faults(policy, seed))


def test_what_was_lost_is_said_with_the_tokens_known() -> None:
    fleets: list[PlainFleet] = []
    faults = FaultSettings(losses_per_hour=300.0, detection_s=0.5)
    result = small_run(mixed_workload(7), plain_policy(size=2, made=fleets.append), faults=faults)
    lost = [event for event in fleets[0].events if isinstance(event, InstanceLost)]
    assert result.lost_instances == len(lost) > 0
    assert any(count > 0 for event in lost for count in event.produced.values())
    ends = {life.instance_id: life.exited_s for life in result.instances}
    assert all(ends[event.instance_id] > 0 for event in lost)


def test_a_loss_during_a_drain_loses_nothing() -> None:
    faults = FaultSettings(losses_per_hour=900.0)
    for seed in range(5):
        policy = plain_policy(size=2, script={3.0: [Drain(0)], 8.0: [Drain(1)], 9.0: [Drain(2)]})
        assert_served_once(small_run(mixed_workload(seed), policy, seed=seed, faults=faults))


def test_launches_fail_and_are_slow_as_often_as_asked() -> None:
    dice = FaultDice(FaultSettings(slow_launches=0.25, slow_factor=3.0, failed_launches=0.1), 40.0, 0.1, 1)
    fates = [dice.launch() for _ in range(2000)]
    whole = [fate.seconds for fate in fates if not fate.fails]
    assert sum(fate.fails for fate in fates) == pytest.approx(200, abs=40)
    assert sum(seconds > 100 for seconds in whole) == pytest.approx(450, abs=60)
    assert all(36.0 <= seconds <= 44.0 or 108.0 <= seconds <= 132.0 for seconds in whole)


def test_lives_have_the_mean_asked_for() -> None:
    dice = FaultDice(FaultSettings(losses_per_hour=2.0), 40.0, 0.0, 1)
    lives = [dice.life_s() for _ in range(4000)]
    assert sum(lives) / len(lives) == pytest.approx(1800.0, rel=0.06)


@pytest.mark.parametrize(
    ("name", "value"), [("slow_launches", 1.5), ("losses_per_hour", -1.0), ("slow_factor", 0.5)]
)
def test_wrong_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        FaultSettings(**{name: value})


RUN = """
import json
from tests.sim.small_world import mixed_workload, small_run
from chiron_engine.sim.faults import FaultSettings
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.summary import summary
faults = FaultSettings(losses_per_hour=120.0, slow_launches=0.2, failed_launches=0.2)
result = small_run(mixed_workload(11), make_policy({policy!r}), seed=5, faults=faults, load_jitter=0.3,
                   step_noise=0.05)
figures = summary(result, None, policy={policy!r}, profile="small", wall_s=0.0)
columns = [list(column) for column in (result.requests.first_token_s, result.requests.late_gaps)]
print(json.dumps([figures, columns, [repr(sample) for sample in result.samples]]))
"""


def run_in_a_process(policy: str, hash_seed: str) -> str:
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels",
    }
    code = RUN.format(policy=policy)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("policy", ["chiron", "paper", "static:2"])
def test_the_same_seed_gives_the_same_bytes_in_another_process(policy: str) -> None:
    first = run_in_a_process(policy, "1")
    assert len(json.loads(first)) == 3
    assert first == run_in_a_process(policy, "4242")

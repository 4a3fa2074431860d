"""Policies by name."""

from __future__ import annotations

import pytest

from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.run_result import Outcome
from chiron_engine.sim.traces.load import load_trace
from chiron_engine.sim.workload import make_workload
from chiron_engine.sim.world import World
from chiron_engine.sim.world_settings import WorldSettings
from tests.sim.small_world import mixed_workload, small_run


@pytest.mark.parametrize(
    ("name", "local", "static"),
    [
        ("chiron", "adaptive", None),
        ("paper", "paper", None),
        ("paper-literal", "paper-literal", None),
        ("static:4", "adaptive", 4),
    ],
)
def test_names(name: str, local: str, static: int | None) -> None:
    policy = make_policy(name)
    assert (policy.name, policy.local_autoscaler, policy.static_instances) == (name, local, static)


def test_another_local_autoscaler() -> None:
    assert make_policy("chiron", "fixed").local_autoscaler == "fixed"
    with pytest.raises(ValueError, match=r"no local autoscaler 'none'; there are adaptive, fixed, paper"):
        make_policy("chiron", "none")


@pytest.mark.parametrize(
    "name", ["nope", "static", "static:", "static:-1", "static:x", "chiron:2", "static:²"]
)
def test_unknown_names_list_what_exists(name: str) -> None:
    with pytest.raises(ValueError, match="there are chiron, paper, paper-literal, static:N"):
        make_policy(name)


def test_a_burst_beyond_the_instances_there_are_waits_for_those_that_load() -> None:
    """Two instances would take 27 s over it; those that load are ready after 10."""
    burst = load_trace("burst:count=20000,lengths=100/10")
    settings = WorldSettings(load_time_s=10.0)
    profile = load_profile("h100/llama-3.1-8b/tp1/bf16")
    result = World(make_workload(burst, None), profile, make_policy("chiron"), settings, seed=0).run()
    assert result.launches > 10
    assert result.end_s < 15.0


@pytest.mark.parametrize("name", ["chiron", "paper", "paper-literal", "static:3"])
def test_every_policy_runs_on_real_engines(name: str) -> None:
    result = small_run(mixed_workload(1), make_policy(name))
    assert set(result.requests.outcome) == {Outcome.FINISHED}
    assert set(result.requests.served) == {1}


def test_a_static_fleet_never_changes() -> None:
    result = small_run(mixed_workload(1), make_policy("static:3"))
    assert (result.scaling_actions, result.launches, len(result.instances)) == (0, 0, 3)
    assert {life.launched_s for life in result.instances} == {0.0}


@pytest.mark.parametrize("name", ["static:0", "static:9"])
def test_a_static_fleet_the_gpus_do_not_hold_is_refused_before_it_runs(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}': N must be a whole number from 1 to 8"):
        small_run(mixed_workload(1), make_policy(name))

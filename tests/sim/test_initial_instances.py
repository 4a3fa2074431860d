"""How many instances a simulation begins with."""

from __future__ import annotations

import pytest

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import InstanceSpec
from chiron_engine.sim.initial_instances import initial_instances
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.workload import Workload, make_workload
from tests.sim.plain_fleet import plain_policy
from tests.sim.small_world import INTERACTIVE_SLO, random_trace, small_profile, small_settings, trace_of


def initial(workload: Workload, policy: str = "chiron", **settings: object) -> int:
    made = plain_policy() if policy == "plain" else make_policy(policy)
    profile, world = small_profile(), small_settings(**{"initial_instances": None, **settings})
    spec = InstanceSpec(
        profile.fit,
        profile.kv_capacity_tokens,
        profile.max_slots,
        profile.max_model_len,
        load_s=world.load_time_s,
    )
    config = FleetConfig(max_gpus=world.max_gpus, itl_targets_s=(INTERACTIVE_SLO.itl_s,))
    return initial_instances(workload, spec, config, made, world)


def interactive(requests: int, span_s: float) -> Workload:
    return make_workload(random_trace(1, requests, span_s), None, INTERACTIVE_SLO)


def test_demand_of_the_first_load_time_and_one() -> None:
    quiet = interactive(10, 100.0)
    assert initial(quiet) == 2
    busy = interactive(4000, 100.0)
    found = initial(busy, max_gpus=50)
    assert 2 < found < 20
    assert initial(interactive(8000, 100.0), max_gpus=50) > found


@pytest.mark.parametrize("policy", ["chiron", "paper", "paper-literal", "plain"])
def test_the_rule_is_the_same_for_all_policies(policy: str) -> None:
    busy = interactive(4000, 100.0)
    assert initial(busy, policy) == initial(busy)


def test_what_arrives_later_does_not_count() -> None:
    later = make_workload(trace_of((500.0, 100, 10), (501.0, 100, 10)), None, INTERACTIVE_SLO)
    assert initial(later) == 1


def test_nothing_without_interactive_requests() -> None:
    assert initial(make_workload(None, random_trace(1, 500, 1.0))) == 0


def test_static_policies_and_settings_have_their_own_number() -> None:
    busy = interactive(4000, 100.0)
    assert initial(busy, "static:7") == 7
    assert initial(busy, initial_instances=3) == 3
    assert initial(busy, max_gpus=2) == 2

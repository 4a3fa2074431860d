"""What the world delivers, when, and what it writes down."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest

from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetRequest,
    InstanceExited,
    InstanceReported,
    RequestEvicted,
    RequestFinished,
    Role,
    SetRole,
)
from chiron_engine.policy.iteration.request import Request, SloClass
from chiron_engine.sim.attainment import attainment
from chiron_engine.sim.policies import make_policy
from chiron_engine.sim.request_book import LiveRequest
from chiron_engine.sim.run_result import Outcome, RunResult
from chiron_engine.sim.watchdog import Stuck
from chiron_engine.sim.workload import Workload, make_workload
from chiron_engine.sim.world import World
from tests.sim.plain_fleet import PlainFleet, plain_policy
from tests.sim.small_world import (
    BATCH_SLO,
    COSTS,
    INTERACTIVE_SLO,
    mixed_workload,
    small_profile,
    small_run,
    small_settings,
    trace_of,
)

RPC_S = 1e-3


def assert_served_once(result: RunResult) -> None:
    assert set(result.requests.served) == {1}
    assert set(result.requests.outcome) == {Outcome.FINISHED}


def interactive_only(*rows: tuple[float, int, int]) -> Workload:
    return make_workload(trace_of(*rows), None, INTERACTIVE_SLO)


def test_one_request_alone_by_hand() -> None:
    """Route, prompt step, four decode steps, and the way back of the tokens."""
    result = small_run(interactive_only((1.0, 100, 5)), plain_policy())
    first = 1.0 + RPC_S + COSTS.seconds(0, 0, 100, 100 * 100)
    last = first + sum(COSTS.seconds(1, 100 + produced) for produced in range(1, 5))
    assert result.requests.first_token_s[0] == pytest.approx(first + RPC_S, abs=1e-9)
    assert result.requests.last_token_s[0] == pytest.approx(last + RPC_S, abs=1e-9)
    assert result.requests.output_tokens[0] == 5
    assert result.end_s == result.requests.last_token_s[0]
    assert sum(result.itl.counts) == 4
    assert result.steps == 5


def test_the_output_cap_ends_a_request() -> None:
    result = small_run(interactive_only((0.0, 50, 30)), plain_policy(), max_output_tokens=7)
    assert result.requests.output_tokens[0] == 7


def test_a_mixed_load_is_served_once_and_attains() -> None:
    result = small_run(mixed_workload(1), plain_policy(size=2), initial_instances=2)
    assert_served_once(result)
    shares = {slo_class: found.share for slo_class, found in attainment(result).items()}
    assert shares == {SloClass.INTERACTIVE: 1.0, SloClass.BATCH: 1.0}
    assert result.scaling_actions == 0
    assert [life.launched_s for life in result.instances] == [0.0, 0.0]


def test_launches_take_the_load_time_and_count_from_the_decision() -> None:
    result = small_run(interactive_only((0.0, 50, 30)), plain_policy(), initial_instances=0)
    (life,) = result.instances
    assert (life.launched_s, life.ready_s) == (1.0, 5.0)
    assert (result.launches, result.scaling_actions) == (1, 1)
    assert result.requests.first_token_s[0] > 5.0
    assert math.isnan(life.exited_s)


def test_late_gaps_are_counted() -> None:
    """A long prompt that arrives while a request decodes delays one of its tokens."""
    slow = COSTS.seconds(1, 0, 512, 512 * 512)
    assert slow > 0.03
    slo = replace(INTERACTIVE_SLO, itl_s=0.02)
    workload = make_workload(trace_of((0.0, 10, 50), (0.2, 500, 1)), None, slo)
    result = small_run(workload, plain_policy(local_autoscaler="fixed"))
    assert list(result.requests.late_gaps) == [1, 0]


def test_drains_lose_nothing() -> None:
    """Batch work is given back and served elsewhere, interactive work runs to its end first."""
    fleets: list[PlainFleet] = []
    script = {5.0: [Drain(0)], 12.0: [Drain(1)]}
    policy = plain_policy(size=2, script=script, made=fleets.append)
    result = small_run(mixed_workload(2), policy, initial_instances=2)
    assert_served_once(result)
    exits = [event.instance_id for event in fleets[0].events if isinstance(event, InstanceExited)]
    assert exits == [0, 1]
    gone = [life for life in result.instances if not math.isnan(life.exited_s)]
    assert [life.instance_id for life in gone] == [0, 1] and gone[0].exited_s > 5.0
    assert any(result.requests.evictions)


def test_a_drain_of_a_loading_instance_cancels_it() -> None:
    fleets: list[PlainFleet] = []
    policy = plain_policy(script={2.0: [Drain(0)]}, made=fleets.append)
    result = small_run(interactive_only((0.0, 50, 5)), policy, initial_instances=0)
    assert_served_once(result)
    assert result.instances[0].exited_s == pytest.approx(2.0 + RPC_S)
    assert math.isnan(result.instances[0].ready_s)
    assert sum(isinstance(event, InstanceExited) for event in fleets[0].events) == 1


def evicting_run(host_kv_share: float) -> tuple[RunResult, PlainFleet]:
    """Batch fills the only instance, then interactive requests need its room."""
    fleets: list[PlainFleet] = []
    batch = trace_of(*[(0.0, 1000, 200)] * 3)
    interactive = trace_of(*[(1.5 + 0.01 * i, 800, 100) for i in range(4)])
    workload = make_workload(interactive, batch, INTERACTIVE_SLO, BATCH_SLO)
    policy = plain_policy(local_autoscaler="fixed", made=fleets.append)
    result = small_run(workload, policy, small_profile(kv_tokens=4096), host_kv_share=host_kv_share)
    return result, fleets[0]


def test_evicted_batch_requests_go_back_to_the_queue_and_reuse_what_they_saved() -> None:
    result, fleet = evicting_run(host_kv_share=1.0)
    assert_served_once(result)
    evicted = [event for event in fleet.events if isinstance(event, RequestEvicted)]
    assert evicted and all(event.saved_tokens > 0 and event.produced > 0 for event in evicted)
    assert sum(result.requests.evictions) == len(evicted)
    unsaved, _ = evicting_run(host_kv_share=0.0)
    assert_served_once(unsaved)
    assert sum(unsaved.requests.evictions) > 0
    assert result.end_s < unsaved.end_s


def test_evicted_requests_keep_what_they_produced() -> None:
    """Elsewhere, too: the tokens become part of the prompt."""
    result, fleet = evicting_run(host_kv_share=0.0)
    evicted = [event for event in fleet.events if isinstance(event, RequestEvicted)]
    assert any(event.produced > 1 for event in evicted)
    assert list(result.requests.output_tokens) == [100] * 4 + [200] * 3


def test_a_request_gives_way_three_times_in_all() -> None:
    """Nothing is saved of it, so that an engine sees it anew each time it comes back. Another
    interactive request runs all the time: without one, batch gives way however often it did."""
    interactive = trace_of((0.5, 20, 1500), *[(1.0 + 3.0 * i, 20, 10) for i in range(6)])
    workload = make_workload(interactive, trace_of((0.0, 20, 1500)), INTERACTIVE_SLO, BATCH_SLO)
    policy = plain_policy(local_autoscaler="fixed")
    result = small_run(workload, policy, small_profile(slots=2), host_kv_share=0.0)
    assert_served_once(result)
    assert result.requests.evictions[7] == 3


def test_finishes_report_the_whole_output() -> None:
    fleets: list[PlainFleet] = []
    policy = plain_policy(size=2, script={4.0: [Drain(0)]}, made=fleets.append)
    workload = mixed_workload(3)
    result = small_run(workload, policy, initial_instances=2)
    finished = {e.request_id: e.output_tokens for e in fleets[0].events if isinstance(e, RequestFinished)}
    wanted = [*workload.interactive.trace.output_tokens, *workload.batch.trace.output_tokens]
    assert len(finished) == len(wanted) - 1  # the run ends before the fleet hears of the last one
    assert all(wanted[request] == tokens for request, tokens in finished.items())
    assert list(result.requests.output_tokens) == wanted


def test_roles_reach_the_engine_and_are_written_down() -> None:
    script = {3.0: [SetRole(0, Role.INTERACTIVE, 0.04)]}
    result = small_run(mixed_workload(4), plain_policy(script=script))
    assert result.role_changes == 1
    assert result.instances[0].roles == [(0.0, Role.MIXED), (pytest.approx(3.0 + RPC_S), Role.INTERACTIVE)]


def test_telemetry_adds_up() -> None:
    fleets: list[PlainFleet] = []
    workload = make_workload(trace_of((0.0, 100, 300), (0.1, 100, 2)), trace_of((0.0, 50, 400)))
    small_run(workload, plain_policy(made=fleets.append))
    reports = [event for event in fleets[0].events if isinstance(event, InstanceReported)]
    totals = [report.output_tokens_total for report in reports]
    assert totals == sorted(totals) and 300 < totals[-1] <= 702
    assert max(report.running_interactive for report in reports) == 1
    assert max(report.running_batch for report in reports) == 1
    assert all(0 <= report.batch_tokens_total <= 400 for report in reports)
    assert all(report.kv_tokens >= 0 and report.max_running >= 1 for report in reports)


def test_samples_come_every_tick_and_count_all_interactive_requests() -> None:
    result = small_run(mixed_workload(5), plain_policy())
    *times, end = [sample.time_s for sample in result.samples]
    assert times == [pytest.approx(i + 1.0) for i in range(len(times))]
    assert times[-1] <= end <= times[-1] + 1.0
    assert sum(sample.ended for sample in result.samples) == 60
    assert max(sample.mean_running for sample in result.samples) > 0


def test_a_fleet_that_serves_nothing_is_reported() -> None:
    workload = interactive_only((0.0, 50, 5), (1.0, 50, 5))
    with pytest.raises(Stuck, match=r"the 2 requests that are left at 60\d s \(ids 0, 1\)"):
        small_run(workload, plain_policy(size=0), initial_instances=0)


def test_a_prompt_no_instance_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 prompts of rows .* row 2 has 5000 tokens"):
        small_run(interactive_only((0.0, 50, 5), (1.0, 5000, 5)), plain_policy())


def test_progress_grows_to_one() -> None:
    shares: list[float] = []
    world = World(mixed_workload(6), small_profile(), plain_policy(), small_settings(), 0)
    world.run(shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_long_idle_stretches_are_no_deadlock() -> None:
    result = small_run(interactive_only((0.0, 50, 5), (9000.0, 50, 5)), plain_policy())
    assert_served_once(result)


def test_a_shared_prefix_is_found_again() -> None:
    trace = trace_of((0.0, 256, 5), (5.0, 260, 5))
    shared = replace(trace, prefix_blocks=[[1, 2, 3, 4], [1, 2, 3, 4, 9]], prefix_block_tokens=64)
    plain = small_run(make_workload(trace, None), plain_policy())
    reused = small_run(make_workload(shared, None), plain_policy())
    assert reused.requests.first_token_s[0] == pytest.approx(plain.requests.first_token_s[0])
    assert reused.requests.first_token_s[1] < plain.requests.first_token_s[1] - 0.005


@pytest.mark.parametrize("policy", ["chiron", "paper"])
def test_finished_requests_leave_no_objects(policy: str) -> None:
    """With the cycle collector at rest, as it is in a run; some of the last ones are still around."""
    workload = mixed_workload(8, 1200, 300, 400.0)
    settings = small_settings(initial_instances=2)
    gc.collect()
    world = World(workload, small_profile(), make_policy(policy), settings, 0)
    gc.disable()
    try:
        world.run()
        kept = [type(o) for o in gc.get_objects() if isinstance(o, Request | LiveRequest | FleetRequest)]
    finally:
        gc.enable()
    assert len(kept) < 300


def test_the_cycle_collector_is_at_rest_during_a_run_only() -> None:
    assert gc.isenabled()
    with pytest.raises(Stuck):
        small_run(interactive_only((0.0, 50, 5)), plain_policy(size=0), initial_instances=0)
    assert gc.isenabled()

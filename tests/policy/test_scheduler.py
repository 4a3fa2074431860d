"""Decisions of the scheduler that have one right answer."""

from __future__ import annotations

import pytest

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import FinishReason, Request
from tests.core.engines import make_request, null_core


def plan_of(core: EngineCore) -> StepPlan:
    """Run one step and return its plan."""
    assert core.submit()
    plan = core._in_flight[-1].plan
    core.complete()
    return plan


def run_to_end(core: EngineCore) -> list[Request]:
    finished = []
    for _ in range(2000):
        if not core.has_work:
            return finished
        finished += core.step().finished
    raise AssertionError("requests never finish")


def test_a_steady_step_says_nothing_but_the_batch_it_kept() -> None:
    core = null_core(block_size=64, blocks=16)
    for number in range(4):
        core.add(make_request(number, 5, 40))
    plan_of(core)
    first, second = plan_of(core), plan_of(core)
    assert first.decode is second.decode and len(first.decode.slots) == 4
    assert not (second.joined or second.left or second.grown or second.chunks)
    assert second.decode_context == first.decode_context + 4 == 4 * 7


def test_prompts_are_cut_to_what_decodes_leave_of_the_budget() -> None:
    core = null_core(budget=8)
    core.add(make_request(0, 6, 10))
    core.add(make_request(1, 20, 10))
    assert [(c.slot, c.start, c.count, c.samples) for c in plan_of(core).chunks] == [
        (0, 0, 6, True),
        (1, 0, 2, False),
    ]
    plan = plan_of(core)
    assert plan.decode.slots == (0,)
    assert [(c.start, c.count) for c in plan.chunks] == [(2, 7)]


def test_interactive_goes_before_batch_and_older_before_newer() -> None:
    core = null_core(slots=1, blocks=64)
    core.add(make_request(0, batch=True))
    core.add(make_request(1, batch=False, arrival=9.0))
    core.add(make_request(2, batch=False, arrival=5.0))
    assert [r.request_id for r in run_to_end(core)] == [2, 1, 0]


def test_an_interactive_arrival_evicts_batch_in_the_next_step() -> None:
    core = null_core(slots=2, host_blocks=64)
    core.add(make_request(0, 12, 40, batch=True))
    core.add(make_request(1, 12, 40, batch=True))
    for _ in range(5):
        plan_of(core)
    core.add(make_request(2, 4, 3))
    plan = plan_of(core)
    assert [r.request_id for r in plan.preempted] == [1], "the newest batch request gives way"
    assert [j.request.request_id for j in plan.joined] == [2]
    assert len(plan.copies_out) == 4, "16 tokens of KV are computed: four full blocks"
    assert {r.request_id for r in run_to_end(core)} == {0, 1, 2}
    assert core.load().free_host_blocks == 64


def test_an_interactive_request_is_never_evicted_for_another() -> None:
    core = null_core(slots=1)
    core.add(make_request(0, 4, 20, arrival=5.0))
    plan_of(core)
    core.add(make_request(1, 4, 20, arrival=1.0))
    assert not plan_of(core).preempted


def preemptions_of_short_interactive_requests(core: EngineCore) -> int:
    """Five of them, one after another, that want the place of a batch request."""
    core.add(make_request(0, 4, 60, batch=True))
    for number in range(1, 6):
        plan_of(core)
        core.add(make_request(number, 4, 2))
        for _ in range(4):
            core.step()
    run_to_end(core)
    return core.load().preemptions


def test_a_batch_request_gives_way_only_so_many_times() -> None:
    core = null_core(slots=2, host_blocks=64)
    core.add(make_request(100, 4, 60))
    assert preemptions_of_short_interactive_requests(core) == 3


def test_it_gives_way_however_often_where_no_interactive_request_would_run() -> None:
    assert preemptions_of_short_interactive_requests(null_core(slots=1, host_blocks=64)) == 5


def test_a_saved_request_copies_back_and_computes_only_its_tail() -> None:
    core = null_core(slots=1, host_blocks=64, blocks=8)
    core.add(make_request(0, 12, 16, batch=True))
    for _ in range(3):
        plan_of(core)
    core.add(make_request(1, 20, 12))  # as large as the pool: nothing of request 0 stays on the device
    run_until_finished(core, 1)
    plan = plan_of(core)
    joined = plan.joined[0]
    assert joined.request.request_id == 0
    assert (len(plan.copies_in), joined.num_computed) == (3, 12)
    assert [(c.start, c.count) for c in plan.chunks] == [(12, 3)]


def run_until_finished(core: EngineCore, request_id: int) -> None:
    for _ in range(500):
        if any(r.request_id == request_id for r in core.step().finished):
            return
    raise AssertionError(f"request {request_id} never finishes")


@pytest.mark.parametrize(
    ("costs", "saved"), [(SwapCosts(0.0, 0.0, 1.0), True), (SwapCosts(1.0, 1.0, 1e-6), False)]
)
def test_what_is_dear_to_copy_is_recomputed(costs: SwapCosts, saved: bool) -> None:
    core = null_core(slots=2, host_blocks=64, swap_costs=costs)
    core.add(make_request(0, 12, 20, batch=True))
    plan_of(core)
    core.set_limits(2, 32)
    core.add(make_request(1, 12, 20, batch=True))
    plan_of(core)
    core.set_limits(1, 32, "preempt")
    plan = plan_of(core)
    assert [r.request_id for r in plan.preempted] == [1]
    assert bool(plan.copies_out) is saved


def test_an_eviction_saves_only_blocks_whose_every_token_is_computed() -> None:
    core = null_core(slots=2, host_blocks=64)
    core.add(make_request(0, 4, 20, batch=True))
    core.add(make_request(1, 7, 20, batch=True))
    plan_of(core)
    core.set_limits(1, 32, "preempt")
    plan = plan_of(core)
    assert [r.request_id for r in plan.preempted] == [1]
    assert len(plan.copies_out) == 1, "8 tokens are known, but the last has no KV yet"


def test_a_shared_prefix_is_computed_once() -> None:
    core = null_core()
    prompt = list(range(17))
    core.add(make_request(0, prompt, 2))
    run_to_end(core)
    core.add(make_request(1, [*prompt[:12], 99, 98], 2))
    plan = plan_of(core)
    assert plan.joined[0].num_computed == 12
    load = core.load()
    assert (load.prefix_hit_tokens, load.prefix_query_tokens) == (12, 31)


def test_two_requests_of_one_step_share_their_prefix() -> None:
    core = null_core()
    for number in range(2):
        core.add(make_request(number, list(range(8)), 2))
    plan_of(core)
    core.add(make_request(2, list(range(9)), 2))
    assert plan_of(core).joined[0].num_computed == 8


def test_a_follow_up_finds_the_whole_conversation() -> None:
    core = null_core()
    first = make_request(0, 6, 7)
    core.add(first)
    run_to_end(core)
    core.add(make_request(1, [*first.prompt_ids, *first.output_ids, 5], 1))
    assert plan_of(core).joined[0].num_computed == 12, "13 tokens, the last without KV: three blocks"


def test_admission_counts_on_the_predicted_peak() -> None:
    """Two outputs of 40 do not fit 16 blocks of 4 together, though both prompts do."""
    core = null_core(blocks=16)
    for number in range(2):
        core.add(make_request(number, 4, 40))
    plan = plan_of(core)
    assert [j.request.request_id for j in plan.joined] == [0]
    assert core.load().waiting == 1
    assert len(run_to_end(core)) == 2 and core.load().preemptions == 0


def test_shortage_takes_the_newest_and_the_oldest_runs_on() -> None:
    core = null_core(blocks=12, host_blocks=0)
    for _ in range(20):
        core.scheduler.output_lengths.observe(1)  # predictions so wrong that everything is admitted
    for number in range(3):
        core.add(make_request(number, 4, 36))
    order = [r.request_id for r in run_to_end(core)]
    assert order == [0, 1, 2] and core.load().preemptions > 0


def test_no_more_run_than_the_limit_allows() -> None:
    """What a local autoscaler sets must hold: it takes what it sees for the doing of its limit."""
    core = null_core(slots=8)
    core.set_limits(2, 32)
    for number in range(6):
        core.add(make_request(number, 4, 10))
    running = []
    while core.has_work:
        plan_of(core)
        running.append(core.load().running)
    assert max(running) == 2


def test_shrinking_drains_or_preempts_and_spares_interactive_requests() -> None:
    core = null_core(slots=4, host_blocks=32)
    for number in range(4):
        core.add(make_request(number, 4, 30, batch=number % 2 == 0))
    plan_of(core)
    core.set_limits(1, 32, "drain")
    assert not plan_of(core).preempted and core.load().running == 4
    core.set_limits(1, 32, "preempt")
    assert {r.request_id for r in plan_of(core).preempted} == {0, 2}
    assert core.load().running == 2


def test_an_abort_frees_everything_and_is_reported_once() -> None:
    core = null_core(host_blocks=8)
    for number in range(2):
        core.add(make_request(number, 9, 30))
    plan_of(core)
    assert core.abort(0) and not core.abort(0) and not core.abort(77)
    output = core.step()
    assert [r.request_id for r in output.finished] == [0]
    assert output.finished[0].finish_reason is FinishReason.ABORT
    assert all(r.request_id == 1 for r in output.requests)


def test_a_request_larger_than_the_pool_is_refused() -> None:
    core = null_core(blocks=4)
    with pytest.raises(ValueError, match="need 5 KV blocks; the engine has 4"):
        core.add(make_request(0, 10, 8))


@pytest.mark.parametrize(
    ("running", "budget", "shrink", "message"),
    [
        (0, 8, "drain", "max_running is 0"),
        (4, 3, "drain", "token_budget is 3; it must be at least max_running"),
        (4, 8, "now", "shrink is 'now'; it must be one of drain, preempt"),
    ],
)
def test_limits_say_what_is_wrong(running: int, budget: int, shrink: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(running, budget, shrink)  # type: ignore[arg-type]

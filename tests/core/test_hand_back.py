"""Batch work that leaves an engine, and the controller that sees interactive work come."""

from __future__ import annotations

import math

import pytest

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.core.requests import InvalidRequest
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.request import FinishReason, Request, RequestState
from chiron_engine.policy.iteration.step_stats import StepStats
from tests.core.engines import make_request, null_core
from tests.core.simulated_engine import Arrival, SimulatedEngine

SAVE = SwapCosts(0.0, 0.0, 1.0)


def evicting_core(**settings: object) -> tuple[EngineCore, Request]:
    """An engine whose one batch request was just handed back, two of its blocks saved."""
    core = null_core(slots=1, host_blocks=8, swap_costs=SAVE, hand_back_evicted=True, **settings)  # type: ignore[arg-type]
    batch = make_request(0, 9, 20, batch=True)
    core.add(batch)
    core.step()
    core.add(make_request(1, 4, 2))
    output = core.step()
    assert output.handed_back == [batch]
    return core, batch


def test_an_evicted_request_leaves_with_its_blocks_saved() -> None:
    core, batch = evicting_core()
    assert batch.state is RequestState.EVICTED and len(batch.host_blocks) == 2
    assert not core.abort(0), "it is not here any more"
    core.step()
    assert not core.has_work and core.load().free_host_blocks == 6


def test_it_resumes_from_what_was_saved() -> None:
    core, batch = evicting_core()
    core.step()
    core.add(batch)
    core.step()
    assert core.load().free_host_blocks == 8 and batch.num_computed == 10
    while core.has_work:
        core.step()
    assert batch.finish_reason is FinishReason.LENGTH and len(batch.output_ids) == 20
    assert batch.num_preempted == 1


def test_forgetting_frees_what_was_saved() -> None:
    core, batch = evicting_core()
    core.forget(batch)
    assert core.load().free_host_blocks == 8
    with pytest.raises(ValueError, match="request 0 is left, not handed back"):
        core.forget(batch)
    with pytest.raises(InvalidRequest, match="request 0 is left; it cannot be added"):
        core.add(batch)


def test_a_drain_gives_all_batch_work_back_and_keeps_the_rest() -> None:
    core = null_core(slots=2)
    requests = [make_request(n, 8, 20, batch=n != 1) for n in range(4)]
    for request in requests:
        core.add(request)
    core.step()
    core.submit()
    given = core.give_back_batch()
    assert [r.request_id for r in given] == [0, 2, 3]
    assert len(requests[0].output_ids) == 1
    output = core.complete()
    assert len(requests[0].output_ids) == 1, "the token under way is lost"
    assert output.requests == (requests[1],)
    while core.has_work:
        core.step()
    assert requests[1].finish_reason is FinishReason.LENGTH
    assert core.load().free_blocks == core.load().total_blocks
    core.add(make_request(0, 8, 2, batch=True))


def test_interactive_prompts_pass_batch_prompts_in_the_budget() -> None:
    core = null_core(blocks=400, budget=32)
    batch, interactive = make_request(0, 500, 4, batch=True), make_request(1, 20, 4)
    core.add(batch)
    core.step()
    core.add(interactive)
    core.step()
    assert interactive.first_token is not None and batch.first_token is None
    assert batch.num_computed == 32 + 12, "what the interactive prompt leaves of the budget"


class Recorder:
    """A controller that writes down what it is told and answers with what it was given."""

    latency_backpressure = throughput_backpressure = 0.0
    costs = None

    def __init__(self, limits: Limits, when_interactive: Limits | None) -> None:
        self.limits = limits
        self.when_interactive = when_interactive
        self.steps: list[StepStats] = []
        self.interactive: list[float] = []

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        assert stats.time == now
        self.steps.append(stats)
        return None

    def on_interactive(self, now: float) -> Limits | None:
        self.interactive.append(now)
        return self.when_interactive

    def set_targets(self, targets: object) -> Limits | None:
        return None


def test_the_first_interactive_request_tightens_the_limits_before_the_next_plan() -> None:
    shape = ExecutorShape(4, 64, 0, 8, 64, 256, 1000)
    recorder = Recorder(Limits(6, 64), Limits(2, 32, "preempt"))
    core = EngineCore(NullExecutor(shape), local_autoscaler=recorder, hand_back_evicted=True)
    assert core.load().max_running == 6
    for number in range(4):
        core.add(make_request(number, 8, 20, batch=True))
    core.step()
    assert recorder.interactive == []
    for number in (4, 5):
        core.add(make_request(number, 8, 3))
    assert len(recorder.interactive) == 1 and core.load().max_running == 2
    output = core.step()
    assert len(output.handed_back) == 4
    while core.has_work:
        core.step()
    core.add(make_request(6, 8, 3))
    assert len(recorder.interactive) == 2, "the engine held none again"


def test_limits_come_from_one_place() -> None:
    shape = ExecutorShape(4, 64, 0, 8, 64, 256, 1000)
    with pytest.raises(ValueError, match="both given"):
        EngineCore(NullExecutor(shape), limits=Limits(1, 1), local_autoscaler=Recorder(Limits(6, 64), None))


def test_stats_tell_what_waits() -> None:
    engine = SimulatedEngine(slots=1)
    for prompt, batch in [(600, False), (300, False), (100, True)]:
        engine.add(Arrival(0.0, prompt, 3, 3, batch))
    engine.core.step()
    first = engine.stats[0]
    assert first.queued_tokens == 600 - 512 + 300 + 100
    assert first.queued_interactive_tokens == 600 - 512 + 300
    assert first.first_token_due == 1.0
    assert (first.interactive_requests, first.batch_requests) == (2, 1)
    while engine.core.has_work:
        engine.core.step()
    last = engine.stats[-1]
    assert (last.queued_tokens, last.first_token_due) == (0, math.inf)
    assert last.queued_interactive_tokens == 0
    assert (last.interactive_requests, last.batch_requests) == (0, 0)
    dues = [s.first_token_due for s in engine.stats]
    assert dues.index(math.inf) == 4, "the second prompt is computed in the fifth step"

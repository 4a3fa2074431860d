from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.core.step_stats import StepLog, StepRing, StepStats, percentile
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.request import FinishReason
from chiron_engine.policy.iteration.step_costs import StepCosts
from tests.core.engines import make_request, null_core

SHAPE = ExecutorShape(16, 100, 0, 8, 64, 1600, 1000)
MODEL = StepCosts(base_s=0.010, per_request_s=0.001, per_kv_token_s=1e-6, per_prompt_token_s=1e-4)


def timed_core(depth: int = 1) -> EngineCore:
    clock = VirtualClock()
    shape = ExecutorShape(16, 100, 0, 8, 64, 1600, 1000, depth)
    return EngineCore(LatencyModelExecutor(shape, MODEL, clock), clock=clock)


def finish_all(core: EngineCore) -> list[int]:
    order = []
    for _ in range(1000):
        if not core.has_work:
            return order
        order += [r.request_id for r in core.step().finished]
    raise AssertionError("requests never finish")


def test_virtual_time_passes_as_the_model_says() -> None:
    core = timed_core()
    core.add(make_request(0, 20, 3))
    finish_all(core)
    # One prompt step of 20 tokens, then decodes over 21 and 22 tokens of KV.
    assert core.clock.now() == pytest.approx(0.010 + 20e-4 + 2 * 0.011 + 43e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_without_token_values_requests_end_by_length(depth: int) -> None:
    core = timed_core(depth)
    requests = [make_request(n, 30 + n, 5 + n) for n in range(12)]
    for request in requests:
        core.add(request)
    assert sorted(finish_all(core)) == list(range(12))
    assert all(r.finish_reason is FinishReason.LENGTH and not r.output_ids for r in requests)
    assert [r.num_planned_outputs for r in requests] == [5 + n for n in range(12)]
    assert core.load().free_blocks == 100


def test_a_step_log_accounts_for_the_step(tmp_path: Path) -> None:
    core = timed_core()
    ring = StepRing()
    core.add_step_hook(ring)
    with StepLog(tmp_path / "steps.jsonl") as log:
        core.add_step_hook(log)
        core.add(make_request(0, 20, 4))
        core.add(make_request(1, 10, 4, batch=True))
        finish_all(core)
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(rows) == len(ring) == 4
    assert (rows[0]["prefill_tokens"], rows[0]["decode_requests"], rows[0]["itl_interactive"]) == (30, 0, 0)
    assert (rows[1]["decode_requests"], rows[1]["kv_tokens"]) == (2, 21 + 11)
    assert (rows[1]["itl_interactive"], rows[1]["itl_batch"]) == (1, 1)
    assert rows[1]["itl_s"] == pytest.approx(rows[1]["device_s"]) == pytest.approx(0.012 + 32e-6)
    assert rows[3]["finished"] == 2 and rows[3]["running"] == 0
    assert ring.percentile("decode_requests", 50) == 2


def test_a_hook_moves_the_limits_of_the_next_step() -> None:
    core = timed_core()

    def shrink_after_first(stats: StepStats) -> Limits | None:
        return Limits(1, 16) if stats.step == 0 else None

    remove = core.add_step_hook(shrink_after_first)
    for number in range(3):
        core.add(make_request(number, 60, 2))
    core.step()
    assert core.load().max_running == 1
    remove()
    core.set_limits(4, 32)
    finish_all(core)
    assert core.load().max_running == 4


@pytest.mark.parametrize("returned", [Limits(9, 64), None])
def test_a_hook_that_fails_is_dropped_and_the_engine_goes_on(returned: Limits | None) -> None:
    core = timed_core()
    calls = []

    def fail(stats: StepStats) -> Limits | None:
        calls.append(stats.step)
        if returned is None:
            raise RuntimeError("a fault of the hook")
        return returned

    remove = core.add_step_hook(fail)
    core.add(make_request(0, 20, 4))
    assert finish_all(core) == [0]
    assert calls == [0] and core.load().max_running == 8
    remove()


def test_limits_stay_below_the_capacity() -> None:
    core = timed_core()
    with pytest.raises(ValueError, match="max_running is 9; the engine has 8 slots"):
        core.set_limits(9, 64)
    with pytest.raises(ValueError, match="token_budget is 65; a step of this executor takes at most 64"):
        core.set_limits(8, 65)


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    core = null_core(slots=1, max_queued_requests=3, max_queued_tokens=25)
    core.add(make_request(0, 30))
    with pytest.raises(QueueFull, match="30 prompt tokens are waiting and 1 more") as refused:
        core.add(make_request(1, 1))
    assert refused.value.retry_after_s > 0
    core.step()
    for number in range(2, 5):
        core.add(make_request(number, 5))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        core.add(make_request(5, 5))


def test_ids_in_use_and_requests_too_large_are_refused_without_a_trace() -> None:
    core = null_core(blocks=4)
    core.add(make_request(0, 4, 4))
    with pytest.raises(InvalidRequest, match="request id 0 is in use"):
        core.add(make_request(0, 4, 4))
    with pytest.raises(InvalidRequest, match="KV blocks"):
        core.add(make_request(1, 10, 10))
    assert finish_all(core) == [0]
    core.add(make_request(0, 4, 4))
    assert finish_all(core) == [0]


def test_an_idle_step_reports_nothing() -> None:
    core = null_core()
    output = core.step()
    assert not core.has_work and not output.requests and not output.finished


def test_models_refuse_negative_and_infinite_times() -> None:
    with pytest.raises(ValueError, match="per_kv_token_s is -1"):
        StepCosts(0.01, per_kv_token_s=-1.0)
    with pytest.raises(ValueError, match="base_s is inf"):
        StepCosts(float("inf"))


def test_percentiles_are_nearest_rank() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (0, 20, 50, 99, 100)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert percentile([], 50) != percentile([], 50)
    with pytest.raises(ValueError, match="percent is 101"):
        percentile(values, 101)

"""Guesses in whole engines: where they pay and where not, and that outputs end where they would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.null_executor import NullExecutor
from chiron_engine.policy.iteration.request import FinishReason
from chiron_engine.policy.iteration.sampling_params import GREEDY, SamplingParams
from chiron_engine.policy.iteration.step_costs import StepCosts
from tests.core.speculating import (
    PROMPT,
    SHAPE,
    TokenAt,
    asked,
    misleading,
    repeating,
    run,
    speculating_core,
)

CHEAP = StepCosts(20e-3, 0.5e-3, 1e-7, 0.4e-3, 1e-8)
"""A row costs a fiftieth of a step, as where weights are read anyway."""
DEAR = StepCosts(1e-3, 4e-3, 1e-7, 4e-3, 1e-8)
"""A row costs nearly what a step does."""


def seconds(costs: StepCosts, token_at: TokenAt, guesses: int, requests: int, noise: float) -> float:
    core, _ = speculating_core(costs, token_at, guesses, noise)
    run(core, [asked(number, 200) for number in range(requests)])
    return core.clock.now()


@pytest.mark.parametrize("requests", [1, 8])
def test_repeated_text_comes_quicker_where_rows_are_cheap(requests: int) -> None:
    without, with_guesses = (seconds(CHEAP, repeating, guesses, requests, 0.05) for guesses in (0, 7))
    assert without / with_guesses > 3.0


@pytest.mark.parametrize("requests", [1, 8, 32])
@pytest.mark.parametrize("token_at", [repeating, misleading])
def test_dear_rows_turn_guesses_off(token_at: TokenAt, requests: int) -> None:
    without, with_guesses = (seconds(DEAR, token_at, guesses, requests, 0.05) for guesses in (0, 7))
    assert without / with_guesses > 0.97


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_guesses_that_seldom_hold_cost_next_to_nothing(requests: int) -> None:
    without, with_guesses = (seconds(CHEAP, misleading, guesses, requests, 0.05) for guesses in (0, 7))
    assert without / with_guesses > 0.97


def test_a_step_keeps_its_token_budget() -> None:
    core, executor = speculating_core(CHEAP, repeating)
    core.set_limits(4, 10)
    run(core, [asked(number, 60) for number in range(4)])
    assert any(plan.drafts for plan in executor.plans)
    for plan in executor.plans:
        requests = len(plan.decode.requests) + len(plan.drafts)
        assert requests + plan.prefill_tokens + plan.drafted_tokens <= 10


@pytest.mark.parametrize("stop_index", range(30, 42))
def test_a_stop_token_ends_an_output_inside_an_accepted_run(stop_index: int) -> None:
    stop = 49

    def token_at(seed: int, index: int) -> int:
        return stop if index == stop_index else index % 3

    core, executor = speculating_core(CHEAP, token_at)
    # The prompt holds the stop token where it is to come, so that it is guessed as well.
    request = asked(0, 100, stop_ids=frozenset({stop}))
    request.prompt_ids = [token_at(0, index) for index in range(stop_index - 12, stop_index + 9)]
    told = run(core, [request])
    assert [token for _, token in told] == [token_at(0, index) for index in range(stop_index + 1)]
    assert request.finish_reason is FinishReason.STOP
    assert any(plan.drafts for plan in executor.plans)
    assert core.load().free_blocks == SHAPE.num_device_blocks


@pytest.mark.parametrize("max_tokens", range(20, 30))
def test_an_output_is_never_longer_than_asked(max_tokens: int) -> None:
    core, executor = speculating_core(CHEAP, repeating)
    request = asked(1, max_tokens)
    told = run(core, [request])
    assert [token for _, token in told] == [repeating(1, index) for index in range(max_tokens)]
    assert request.finish_reason is FinishReason.LENGTH
    assert any(plan.drafts for plan in executor.plans)
    known = len(PROMPT) + 1 + max_tokens
    assert all(draft.start + draft.count < known for plan in executor.plans for draft in plan.drafts)


@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, repetition_penalty=1.1),
        replace(GREEDY, presence_penalty=0.5),
        replace(GREEDY, logprobs=1),
        replace(GREEDY, regex="a+"),
    ],
)
def test_what_depends_on_the_tokens_before_is_not_guessed(sampling: SamplingParams) -> None:
    core, executor = speculating_core(CHEAP, repeating)
    run(core, [asked(0, 60, sampling), asked(1, 60), asked(2, 60, guide=object())])
    drafted = {request.request_id for plan in executor.plans for request in plan.draft_requests}
    assert drafted == {1}


def test_counters_say_what_was_guessed_and_held() -> None:
    core, executor = speculating_core(CHEAP, repeating)
    told = run(core, [asked(0, 120)])
    load = core.load()
    steps = sum(bool(plan.decode.requests or plan.chunks or plan.drafts) for plan in executor.plans)
    assert load.drafted_tokens == sum(plan.drafted_tokens for plan in executor.plans)
    assert len(told) == steps + load.accepted_tokens == 120
    assert 80 < load.accepted_tokens <= load.drafted_tokens


def test_an_abort_between_plan_and_result_takes_no_tokens() -> None:
    core, executor = speculating_core(CHEAP, repeating)
    requests = [asked(0, 200), asked(1, 200)]
    for request in requests:
        core.add(request)
    while not (executor.plans and executor.plans[-1].drafts):
        core.step()
    outputs = len(requests[0].output_ids)
    assert core.submit()
    assert core.abort(0)
    output = core.complete()
    assert {request.request_id for request in output.requests} == {1}
    assert len(requests[0].output_ids) == outputs
    while core.has_work:
        core.step()
    assert list(requests[1].output_ids) == [repeating(1, index) for index in range(200)]
    assert core.load().free_blocks == SHAPE.num_device_blocks


def test_refuses_an_executor_that_keeps_steps_under_way() -> None:
    shape = replace(SHAPE, pipeline_depth=2)
    with pytest.raises(ValueError, match=r"2 steps under way.*num_speculative_tokens must be 0"):
        CoreSettings(shape, num_speculative_tokens=4).build(NullExecutor(shape), VirtualClock())

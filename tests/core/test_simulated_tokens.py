"""Tokens without a model: the same wherever a request goes on, and lengths as they should be."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.real_time_executor import RealTimeExecutor, ScaledStepTimes
from chiron_engine.core.simulated_tokens import OutputLengths, SimulatedTokens
from chiron_engine.policy.iteration.request import FinishReason, Request, Slo, SloClass
from chiron_engine.policy.iteration.sampling_params import SamplingParams
from chiron_engine.policy.iteration.step_costs import StepCosts

VOCAB, EOS = 1000, 7
SHAPE = ExecutorShape(16, 200, 100, 8, 64, 3000, VOCAB)


def core(blocks: int = 200) -> EngineCore:
    shape = ExecutorShape(16, blocks, 100, 8, 64, min(3000, blocks * 16), VOCAB)
    tokens = SimulatedTokens(VOCAB, EOS, shape.max_slots, OutputLengths(median=40, sigma=0.8))
    clock = VirtualClock()
    return EngineCore(RealTimeExecutor(shape, StepCosts(0.01), clock, tokens), clock=clock)


def request(key: int, prompt: list[int], seed: int, max_tokens: int, ends: bool = True) -> Request:
    stops = frozenset({EOS}) if ends else frozenset()
    return Request(key, prompt, SamplingParams(), max_tokens, stop_ids=stops, seed=seed)


def run(engine: EngineCore, requests: list[Request]) -> list[list[int]]:
    for one in requests:
        engine.add(one)
    while engine.has_work:
        engine.step()
    return [list(one.output_ids) for one in requests]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1).filter(lambda t: t != EOS), min_size=1, max_size=100),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.data(),
)
def test_a_request_goes_on_elsewhere_as_it_would_have_here(
    prompt: list[int], seed: int, ends: bool, data: st.DataObject
) -> None:
    (whole,) = run(core(), [request(1, prompt, seed, 150, ends)])
    cut = data.draw(st.integers(0, len(whole) - 1))
    rest = request(9, [*prompt, *whole[:cut]], seed, 150 - cut, ends)
    assert run(core(), [rest]) == [whole[cut:]]
    if not ends:
        assert len(whole) == 150
    assert EOS not in whole[:-1]


def test_preemption_and_batch_mates_change_no_token() -> None:
    prompts = [[random.Random(i).randrange(8, VOCAB) for _ in range(40)] for i in range(6)]
    requests = [request(i, prompt, i, 200, ends=i % 2 == 0) for i, prompt in enumerate(prompts)]
    engine = core()
    for one in requests:
        one.slo = Slo(SloClass.BATCH)
        engine.add(one)
    for step in range(20):
        engine.step()
        engine.set_limits(2 if step % 5 == 3 else 8, 64, "preempt")
    run(engine, [])
    together = [list(one.output_ids) for one in requests]
    assert sum(one.num_preempted for one in requests) > 0
    alone = [
        run(core(), [request(i, prompt, i, 200, ends=i % 2 == 0)])[0] for i, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert {one.finish_reason for one in requests} == {FinishReason.STOP, FinishReason.LENGTH}


def test_another_seed_or_prompt_gives_other_tokens_and_a_lost_one_shows() -> None:
    base, other_seed, other_prompt, lost = run(
        core(),
        [
            request(1, [3, 4], 1, 30, ends=False),
            request(2, [3, 4], 2, 30, ends=False),
            request(3, [3, 5], 1, 30, ends=False),
            request(4, [3], 1, 30, ends=False),
        ],
    )
    assert base[:2] not in (other_seed[:2], other_prompt[:2], lost[:2])
    assert base[1:] != lost[1:]


def test_lengths_are_lognormal() -> None:
    draws = random.Random(1)
    logarithms = [math.log(OutputLengths().draw(draws.getrandbits(64))) for _ in range(20_000)]
    assert abs(statistics.mean(logarithms) - math.log(151)) < 5 * 0.86 / math.sqrt(20_000)
    assert abs(statistics.stdev(logarithms) - 0.86) < 5 * 0.86 / math.sqrt(40_000)
    assert OutputLengths().draw(0) >= 1 and OutputLengths().draw(2**64 - 1) >= 1


@pytest.mark.parametrize(("vocab", "eos"), [(1, 0), (10, 10), (10, -1)])
def test_an_end_token_outside_the_vocabulary_is_refused(vocab: int, eos: int) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        SimulatedTokens(vocab, eos, 4)


class LateClock(VirtualClock):
    """Wakes late, as machines do."""

    late_s = 0.0

    def sleep_until(self, when: float) -> None:
        super().sleep_until(when + self.late_s)


def time_of_100_steps(clock: VirtualClock, own_work_s: float = 0.0) -> float:
    """Of 20 ms each, with this much work of the process's own after each."""
    tokens = SimulatedTokens(VOCAB, EOS, SHAPE.max_slots)
    times = ScaledStepTimes(StepCosts(0.01), 2.0)
    engine = EngineCore(RealTimeExecutor(SHAPE, times, clock, tokens), clock=clock)
    engine.add_step_hook(lambda stats: clock.sleep(own_work_s))
    clock.sleep(5.0)
    engine.add(request(1, [3], 1, 100, ends=False))
    began = clock.now()
    while engine.has_work:
        engine.step()
    return clock.now() - began


def test_late_wakes_and_own_work_do_not_add_up() -> None:
    clock = LateClock()
    clock.late_s = 0.004
    assert time_of_100_steps(clock, own_work_s=0.003) == pytest.approx(2.0, abs=0.01)


def test_a_machine_too_slow_for_the_pace_falls_behind() -> None:
    assert time_of_100_steps(VirtualClock(), own_work_s=0.06) == pytest.approx(6.0, abs=0.05)


def test_idle_time_is_not_made_good() -> None:
    clock = VirtualClock()
    tokens = SimulatedTokens(VOCAB, EOS, SHAPE.max_slots)
    engine = EngineCore(RealTimeExecutor(SHAPE, StepCosts(0.02), clock, tokens), clock=clock)
    for key in range(3):
        clock.sleep(0.04)
        began = clock.now()
        run(engine, [request(key, [3], 1, 5, ends=False)])
        assert clock.now() - began == pytest.approx(0.1)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_time_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="time scale"):
        ScaledStepTimes(StepCosts(0.01), scale)

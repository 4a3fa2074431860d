"""Passing over quiet steps is the same as running them."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from chiron_engine.core.latency_model import LatencyModelExecutor
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.step_stats import StepStats
from tests.core.engines import make_request, null_core
from tests.core.simulated_engine import COSTS, Arrival, SimulatedEngine

arrival_lists = st.lists(
    st.builds(
        Arrival,
        when=st.floats(0, 3, allow_nan=False),
        prompt=st.integers(1, 700),
        output=st.integers(1, 120),
        most=st.sampled_from([5, 60, 5000]),
        batch=st.booleans(),
    ),
    min_size=1,
    max_size=25,
).map(lambda arrivals: sorted(arrivals, key=lambda a: a.when))


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrival_lists,
    blocks=st.sampled_from([60, 150, 2000]),
    noise=st.sampled_from([0.0, 0.1]),
    autoscaler=st.sampled_from([None, "adaptive", "paper"]),
    hand_back=st.booleans(),
)
def test_fast_forward_equals_stepping(
    arrivals: list[Arrival], blocks: int, noise: float, autoscaler: str | None, hand_back: bool
) -> None:
    runs = []
    for fast in (False, True):
        engine = SimulatedEngine(
            blocks=blocks, noise=noise, autoscaler=autoscaler, hand_back=hand_back, slots=8
        )
        engine.run(arrivals, fast)
        runs.append(engine)
    stepped, passed = runs
    # How long the core waited depends on when it is asked, not on the engine.
    assert [replace(s, wait_s=0.0) for s in stepped.stats] == [replace(s, wait_s=0.0) for s in passed.stats]
    assert stepped.finished == passed.finished and len(stepped.finished) == len(arrivals)
    assert stepped.core.load() == passed.core.load()
    for first, second in zip(stepped.requests, passed.requests, strict=True):
        assert (first.first_token, first.num_planned_outputs, first.finish_reason) == (
            second.first_token,
            second.num_planned_outputs,
            second.finish_reason,
        )
        assert first.num_planned_outputs == min(first.client.output, first.max_tokens)  # type: ignore[attr-defined]


def test_most_steps_of_a_long_decode_are_passed_over() -> None:
    engine = SimulatedEngine()
    engine.run([Arrival(0.0, 100, 1000, 5000)], fast=True)
    assert engine.passed == len(engine.stats) - 2, "all but the prompt and the last token"
    assert engine.core.load().step == 1000


def test_it_stops_strictly_before_the_time_given() -> None:
    engine = SimulatedEngine()
    engine.run([Arrival(0.0, 100, 50, 5000), Arrival(0.1, 10, 1, 10)], fast=False)
    times = [s.time for s in engine.stats]
    other = SimulatedEngine()
    other.add(Arrival(0.0, 100, 50, 5000))
    other.core.step()
    assert other.core.fast_forward(times[5]) == 4
    assert other.clock.now() == times[4] < times[5]


def test_limits_set_on_the_way_bind_at_once() -> None:
    engine = SimulatedEngine(slots=4, blocks=2000)
    core = engine.core

    def open_later(stats: StepStats) -> Limits | None:
        return Limits(2, 512) if stats.step == 20 else None

    core.set_limits(1, 512)
    core.add_step_hook(open_later)
    engine.run([Arrival(0.0, 10, 100, 5000), Arrival(0.0, 10, 100, 5000)], fast=True)
    assert engine.passed
    assert [s.running for s in engine.stats][18:23] == [1, 1, 1, 2, 2]


def test_nothing_is_passed_over_with_token_values_or_a_step_under_way() -> None:
    core = null_core()
    core.add(make_request(0, 10, 8))
    core.step()
    assert core.fast_forward(1e9) == 0
    engine = SimulatedEngine()
    engine.add(Arrival(0.0, 10, 100, 5000))
    engine.core.step()
    engine.core.submit()
    assert engine.core.fast_forward(1e9) == 0


def test_what_makes_no_sense_together_is_refused() -> None:
    shape, clock = SimulatedEngine().core.shape, SimulatedEngine().clock
    with pytest.raises(ValueError, match="must not be negative"):
        LatencyModelExecutor(shape, COSTS, clock, noise=-0.1)
    with pytest.raises(ValueError, match="scripted tokens end where"):
        LatencyModelExecutor(shape, COSTS, clock, output_tokens=lambda r: 1, scripted_tokens=True)

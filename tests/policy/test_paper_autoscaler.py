"""Algorithm 1: each known pathology of the rule as printed, and that the repair has it not."""

from __future__ import annotations

import random

import pytest

from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity, ItlTargets
from chiron_engine.policy.iteration.paper_autoscaler import (
    INTERVAL_STEPS,
    Interval,
    PaperAutoscaler,
    PaperLiteralAutoscaler,
)
from tests.policy.iteration_plant import BATCH_1_S, COSTS, step_stats

CAPACITY = EngineCapacity(max_slots=512, max_step_tokens=8192, block_size=16, kv_capacity_tokens=400_000)
TARGETS = ItlTargets(2.5 * BATCH_1_S, 2.0)


def feed_interval(
    autoscaler: PaperLiteralAutoscaler, n: int, itl_s: float, running: int | None = None
) -> None:
    """One interval in which n requests decode, as many as may run unless `running` says otherwise."""
    for step in range(INTERVAL_STEPS):
        limit = autoscaler.limits.max_running
        stats = step_stats(
            step,
            0.0,
            itl_s,
            n=n,
            kv=300 * n,
            running=limit if running is None else running,
            max_running=limit,
        )
        autoscaler.on_step(stats, 0.0)


def test_growth_is_the_printed_formula() -> None:
    autoscaler = PaperLiteralAutoscaler(CAPACITY, TARGETS)
    b = autoscaler.batch_size
    feed_interval(autoscaler, 8, TARGETS.interactive_s / 2)
    assert autoscaler.latency_backpressure == pytest.approx(0.5)
    assert autoscaler.batch_size == pytest.approx(0.5 * b / 0.5 + 0.5 * b)
    feed_interval(autoscaler, 12, 2 * TARGETS.interactive_s)
    assert autoscaler.batch_size == pytest.approx(0.75 * b)


@pytest.mark.parametrize("kind, halves", [(PaperLiteralAutoscaler, True), (PaperAutoscaler, False)])
def test_a_fall_in_arrivals_does_not_halve_b(kind: type[PaperLiteralAutoscaler], halves: bool) -> None:
    autoscaler = kind(CAPACITY, TARGETS)
    feed_interval(autoscaler, 40, 0.6 * TARGETS.interactive_s)
    autoscaler.batch_size = 60.0
    for n in (50, 60):
        feed_interval(autoscaler, n, 0.6 * TARGETS.interactive_s)
    b = autoscaler.batch_size
    assert b > 60
    # A third of the requests is left; steps are faster, the engine is fine.
    feed_interval(autoscaler, 20, 0.5 * TARGETS.interactive_s, running=20)
    assert (autoscaler.batch_size < b) == halves


@pytest.mark.parametrize("kind, collapses", [(PaperLiteralAutoscaler, True), (PaperAutoscaler, False)])
def test_b_that_the_engine_does_not_obey_does_not_walk_down(
    kind: type[PaperLiteralAutoscaler], collapses: bool
) -> None:
    """With the number running not B's doing, throughput is noise, and every fall of it halves."""
    autoscaler = kind(CAPACITY, TARGETS)
    rng = random.Random(3)
    lowest = 1e9
    for interval in range(400):
        n = rng.randint(60, 100)
        feed_interval(autoscaler, n, 0.8 * TARGETS.interactive_s, running=n)
        if interval > 40:
            lowest = min(lowest, autoscaler.batch_size)
    assert (lowest <= 2.0) == collapses
    if not collapses:
        assert lowest > 100


class LatencyOnlyAutoscaler(PaperLiteralAutoscaler):
    """The printed rule without its TBP term, which some leave out."""

    def _counted_tbp(self, interval: Interval) -> float:
        return 0.0


@pytest.mark.parametrize("kind, grows", [(LatencyOnlyAutoscaler, True), (PaperAutoscaler, False)])
def test_low_load_does_not_grow_b_beyond_capacity(kind: type[PaperLiteralAutoscaler], grows: bool) -> None:
    autoscaler = kind(CAPACITY, TARGETS)
    for _ in range(80):
        feed_interval(autoscaler, 2, 0.3 * TARGETS.interactive_s, running=2)
    assert (autoscaler.batch_size > CAPACITY.max_slots) == grows
    assert autoscaler.limits.max_running <= CAPACITY.max_slots
    # A load that overruns the SLO must be felt at once; from a huge B it takes many intervals.
    feed_interval(autoscaler, 400, 1.5 * TARGETS.interactive_s)
    assert (autoscaler.limits.max_running > CAPACITY.max_slots // 2) == grows


def test_b_is_clipped_at_what_the_kv_cache_holds() -> None:
    small = EngineCapacity(max_slots=512, max_step_tokens=8192, block_size=16, kv_capacity_tokens=9000)
    autoscaler = PaperAutoscaler(small, TARGETS)
    for _ in range(40):
        feed_interval(autoscaler, 20, 0.5 * TARGETS.interactive_s)
    assert autoscaler.batch_size == pytest.approx(9000 / 300)


def toy_throughput(autoscaler: PaperLiteralAutoscaler, intervals: int = 400) -> tuple[float, float]:
    """Tokens a second, and share of steps over the SLO, of a noiseless plant in which B requests run,
    always; the first quarter is left out."""
    tokens = seconds = late = 0.0
    for interval in range(intervals):
        n = autoscaler.limits.max_running
        itl_s = COSTS.seconds(n, 300 * n)
        feed_interval(autoscaler, n, itl_s)
        if interval >= intervals // 4:
            tokens += n
            seconds += itl_s
            late += itl_s > TARGETS.interactive_s
    return tokens / seconds, late / (intervals * 3 // 4)


RATIOS = [1.25, 1.5, 2.0, 3.0]


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_rule_as_printed_collapses_and_the_repair_does_not(ratio: float) -> None:
    targets = ItlTargets(ratio * BATCH_1_S, 2.0)
    allowed = [n for n in range(1, 513) if COSTS.seconds(n, 300 * n) <= targets.interactive_s]
    best = max(n / COSTS.seconds(n, 300 * n) for n in allowed)
    literal = PaperLiteralAutoscaler(CAPACITY, targets)
    toy_throughput(literal)
    assert literal.limits.max_running <= 2
    throughput, _ = toy_throughput(PaperAutoscaler(CAPACITY, targets))
    assert throughput > 0.9 * best


def test_halving_leaves_b_between_half_and_the_slo() -> None:
    """What the repair does not mend: it halves at every overrun and crawls back, steps over the SLO
    included. `adaptive` exists for that."""
    throughput, late = toy_throughput(PaperAutoscaler(CAPACITY, TARGETS))
    assert throughput > 0
    assert 0.02 < late < 0.2


def test_an_interactive_arrival_finds_the_b_of_its_own_target() -> None:
    autoscaler = PaperAutoscaler(CAPACITY, TARGETS)
    for _ in range(20):
        feed_interval(autoscaler, autoscaler.limits.max_running, 0.98 * TARGETS.interactive_s)
    tight = autoscaler.limits.max_running
    for step in range(60 * INTERVAL_STEPS):
        n = autoscaler.limits.max_running
        autoscaler.on_step(
            step_stats(step, 0.0, 0.03, n=n, kv=300 * n, interactive=0, batch=n, max_running=n), 0.0
        )
    assert autoscaler.limits.max_running > 2 * tight
    limits = autoscaler.on_interactive(0.0)
    assert limits is not None
    assert limits.max_running == tight
    assert limits.shrink == "preempt"

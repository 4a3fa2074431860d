"""The percentile of step times over the model's, against sorting."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.policy.iteration.step_tail import BIN, TRUSTED, WINDOW, StepTail


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(TRUSTED, 3 * WINDOW), st.floats(0.001, 0.3))
def test_no_more_than_one_percent_lie_above(seed: int, count: int, sigma: float) -> None:
    tail = StepTail()
    rng = random.Random(seed)
    ratios = [math.exp(rng.gauss(rng.choice((0.0, sigma)), sigma)) for _ in range(count)]
    for ratio in ratios:
        tail.observe(ratio)
        if rng.random() < 0.05:
            assert tail.rho99 > 0
    kept = sorted(ratios[-WINDOW:])
    exact = kept[len(kept) - 1 - len(kept) // 100]
    assert exact <= tail.rho99 * (1 + 1e-9)
    assert tail.rho99 <= exact * math.exp(BIN) * (1 + 1e-9)


def test_only_the_last_samples_count() -> None:
    tail = StepTail()
    for _ in range(3 * WINDOW):
        tail.observe(1.5)
    for _ in range(WINDOW):
        tail.observe(1.0)
    assert tail.rho99 == pytest.approx(1.0, abs=2 * BIN)
    for _ in range(WINDOW // 50):
        tail.observe(1.2)
    assert tail.rho99 == pytest.approx(1.2, abs=2 * BIN)


def test_few_samples_are_taken_for_ten_percent_noise_at_first() -> None:
    tail = StepTail()
    assert tail.rho99 == pytest.approx(math.exp(0.233))
    rng = random.Random(0)
    rhos = []
    for _ in range(TRUSTED - 1):
        tail.observe(math.exp(rng.gauss(0.0, 0.03)))
        rhos.append(tail.rho99)
    assert rhos[10] > rhos[100] > rhos[-1] > math.exp(2.33 * 0.03)
    assert rhos[-1] < math.exp(2.33 * 0.045)


def test_extreme_ratios_are_kept_at_the_ends_of_the_scale() -> None:
    tail = StepTail()
    for ratio in (1e-9, 1e9):
        for _ in range(TRUSTED):
            tail.observe(ratio)
    assert math.isfinite(tail.rho99)


def test_a_few_steps_far_off_do_not_stand_for_all() -> None:
    tail = StepTail()
    for step in range(300):
        tail.observe(6.0 if step % 50 == 0 else 1.0)
    assert tail.rho99 < 1.2

"""The fit of step times: exact where it can be, bounded and non-negative always."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.policy.iteration.step_model import StepModel
from tests.policy.iteration_plant import COSTS, step_stats

CAPACITY = EngineCapacity(max_slots=256, max_step_tokens=8192, block_size=16, kv_capacity_tokens=400_000)


def feed(model: StepModel, costs: StepCosts, steps: int, seed: int = 0, noise: float = 0.0) -> None:
    rng = random.Random(seed)
    for step in range(steps):
        n = rng.randint(1, 256)
        kv = n * rng.randint(50, 1200)
        prompt = rng.choice((0, 0, rng.randint(16, 1024)))
        context = prompt * rng.randint(16, 4096)
        seconds = costs.seconds(n, kv, prompt, context) * math.exp(rng.gauss(0.0, noise))
        model.observe(step_stats(step, 0.0, seconds, n=n, kv=kv, prompt=prompt, context=context), seconds)


@pytest.mark.parametrize("prior", [None, COSTS, StepCosts(20e-3, 5e-5, 1e-8, 1e-5, 0.0)])
def test_finds_the_coefficients_of_a_linear_plant(prior: StepCosts | None) -> None:
    model = StepModel(CAPACITY, prior)
    feed(model, COSTS, 8000)
    for n, kv, prompt, context in ((1, 500, 0, 0), (200, 60_000, 0, 0), (100, 30_000, 512, 512 * 512)):
        assert model.seconds(n, kv, prompt, context) == pytest.approx(
            COSTS.seconds(n, kv, prompt, context), rel=0.03
        )
    assert model.costs is not None
    assert model.costs.per_prompt_token_s == pytest.approx(COSTS.per_prompt_token_s, rel=0.1)


def test_follows_a_machine_that_slows_down() -> None:
    model = StepModel(CAPACITY, COSTS)
    feed(model, COSTS, 1000)
    slower = StepCosts(*(1.3 * getattr(COSTS, name) for name in COSTS.__slots__))
    feed(model, slower, 3000, seed=1)
    assert model.seconds(100, 30_000, 0, 0) == pytest.approx(slower.seconds(100, 30_000), rel=0.02)


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepModel(CAPACITY).costs is None
    primed = StepModel(CAPACITY, COSTS).costs
    assert primed is not None
    assert primed.per_prompt_token_s == pytest.approx(COSTS.per_prompt_token_s)


def test_inputs_that_never_vary_do_not_blow_up_the_covariance() -> None:
    """Plain exponential forgetting multiplies the covariance of unseen directions by 1 / 0.995 a step:
    after 200,000 steps it overflows. Here it must still be what it began as, and so must the fit of
    what was learned before."""
    model = StepModel(CAPACITY, COSTS)
    feed(model, COSTS, 2000)
    before = model.seconds(200, 60_000, 1024, 1024 * 1024)
    rng = random.Random(0)
    stats = step_stats(0, 0.0, 0.0, n=40, kv=12_000)
    for _ in range(200_000):
        model.observe(stats, COSTS.seconds(40, 12_000) * math.exp(rng.gauss(0.0, 0.03)))
    pairs = enumerate(zip(model._covariance, model._initial, strict=True))
    widest = max(row[i] / start for i, (row, start) in pairs)
    assert widest <= 1.01
    assert model.seconds(200, 60_000, 1024, 1024 * 1024) == pytest.approx(before, rel=0.1)
    # It can still learn.
    slower = StepCosts(12e-3, 2e-5, 8e-8, 4e-5, 2e-9)
    feed(model, slower, 8000)
    assert model.seconds(100, 30_000, 0, 0) == pytest.approx(slower.seconds(100, 30_000), rel=0.06)


@given(
    st.lists(
        st.tuples(st.integers(0, 256), st.integers(0, 2000), st.integers(0, 4096), st.floats(1e-4, 10.0)),
        min_size=1,
        max_size=60,
    ),
    st.booleans(),
)
def test_coefficients_are_never_negative_nor_absurd(
    steps: list[tuple[int, int, int, float]], primed: bool
) -> None:
    model = StepModel(CAPACITY, COSTS if primed else None)
    for step, (n, length, prompt, seconds) in enumerate(steps):
        if not n and not prompt:
            continue
        stats = step_stats(step, 0.0, seconds, n=n, kv=n * length, prompt=prompt, context=prompt * length)
        model.observe(stats, seconds)
        if step % 7 == 0:
            model.doubt()
        if model.is_ready:
            # Validates that each is finite and not negative.
            assert model.costs is not None


def test_small_loads_do_not_drive_the_fit_apart() -> None:
    """Few requests, short prompts, no prior: the coefficients are hardly told apart, and cutting
    negative ones off without moving the others made the fit diverge."""
    model = StepModel(CAPACITY)
    plant = StepCosts(5e-2, 1e-4, 1e-7, 1.3e-4, 6e-9)
    rng = random.Random(2)
    for step in range(3000):
        n = rng.randint(1, 20)
        kv = n * (100 + step % 300)
        prompt = rng.choice((0, 0, 1, 14))
        seconds = plant.seconds(n, kv, prompt, prompt * 60)
        model.observe(step_stats(step, 0.0, seconds, n=n, kv=kv, prompt=prompt, context=prompt * 60), seconds)
        if step > 100:
            assert model.seconds(n, kv, prompt, prompt * 60) == pytest.approx(seconds, rel=0.1)

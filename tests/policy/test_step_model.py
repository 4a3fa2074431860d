"""The fit of step times: exact where it can be, stairs included, bounded and non-negative always."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.policy.iteration.step_model import StepModel, knot_below, knot_place
from tests.policy.iteration_plant import COSTS, step_stats

CAPACITY = EngineCapacity(max_slots=256, max_step_tokens=8192, block_size=16, kv_capacity_tokens=400_000)

Seconds = Callable[[int, int, int, int], float]


def stairs(n: int, kv: int, prompt: int, context: int) -> float:
    """As a kernel with tiles of 128 tokens takes."""
    tiles = -(-(n + prompt) // 128)
    return 6e-3 + 3e-3 * tiles + 4e-8 * kv + 5e-6 * n + 1e-9 * context


def feed(model: StepModel, plant: Seconds, steps: int, seed: int = 0, noise: float = 0.0) -> None:
    rng = random.Random(seed)
    for step in range(steps):
        n = rng.randint(1, 256)
        kv = n * rng.randint(50, 1200)
        prompt = rng.choice((0, 0, rng.randint(16, 1024)))
        context = prompt * rng.randint(16, 4096)
        seconds = plant(n, kv, prompt, context) * math.exp(rng.gauss(0.0, noise))
        model.observe(step_stats(step, 0.0, seconds, n=n, kv=kv, prompt=prompt, context=context), seconds)


@given(st.integers(0, 1 << 20))
def test_knots_are_where_they_say(tokens: int) -> None:
    knot = knot_below(tokens)
    low, high = knot_place(knot), knot_place(knot + 1)
    assert low <= tokens < high
    assert high - low <= max(8, tokens // 8)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("prior", [None, COSTS, StepCosts(20e-3, 5e-5, 1e-8, 1e-5, 0.0)])
def test_predicts_a_linear_plant(prior: StepCosts | None, noise: float) -> None:
    model = StepModel(CAPACITY, prior)
    feed(model, COSTS.seconds, 8000, noise=noise)
    for n, kv, prompt, context in ((10, 5000, 0, 0), (200, 60_000, 0, 0), (100, 30_000, 512, 512 * 512)):
        assert model.seconds(n, kv, prompt, context) == pytest.approx(
            COSTS.seconds(n, kv, prompt, context), rel=0.04
        )


def test_knows_where_the_stairs_are() -> None:
    model = StepModel(CAPACITY, COSTS)
    feed(model, stairs, 20_000)
    for n, prompt in ((100, 0), (100, 120), (200, 16), (200, 300)):
        expected = model.seconds(n, 300 * n, prompt, 500 * prompt)
        assert expected == pytest.approx(stairs(n, 300 * n, prompt, 500 * prompt), rel=0.05)


def test_looks_past_a_stair_that_leads_down() -> None:
    """96 to 128 tokens take longer than 160: there, and not below the bump, is the most that fits."""

    def bump(n: int, kv: int, prompt: int, context: int) -> float:
        tokens = n + prompt
        return 0.02 if tokens > 400 else 0.012 if 96 < tokens <= 128 else 0.01

    model = StepModel(CAPACITY, StepCosts(0.01))
    rng = random.Random(0)
    for step in range(6000):
        n = rng.randint(1, 256)
        prompt = rng.randint(0, 300)
        seconds = bump(n, 0, prompt, 0)
        model.observe(step_stats(step, 0.0, seconds, n=n, kv=0, prompt=prompt, context=0), seconds)
    assert 300 <= model.most_tokens(0.0115, 0.0, 512) <= 420


def test_follows_a_machine_that_slows_down() -> None:
    model = StepModel(CAPACITY, COSTS)
    feed(model, COSTS.seconds, 1000)
    slower = COSTS.scaled(1.3)
    feed(model, slower.seconds, 12_000, seed=1)
    assert model.seconds(100, 30_000, 0, 0) == pytest.approx(slower.seconds(100, 30_000), rel=0.03)


def test_nothing_is_known_before_the_first_step() -> None:
    model = StepModel(CAPACITY)
    assert not model.is_ready
    assert model.seconds(10, 1000, 0, 0) == 0.0
    primed = StepModel(CAPACITY, COSTS)
    assert primed.is_ready
    assert primed.seconds(0, 0, 512, 512 * 512) == pytest.approx(COSTS.seconds(0, 0, 512, 512 * 512))


def test_what_is_not_seen_is_neither_forgotten_nor_past_learning() -> None:
    model = StepModel(CAPACITY, COSTS)
    feed(model, COSTS.seconds, 4000)
    before = model.seconds(200, 60_000, 1024, 1024 * 1024)
    rng = random.Random(0)
    stats = step_stats(0, 0.0, 0.0, n=40, kv=12_000)
    for _ in range(100_000):
        model.observe(stats, COSTS.seconds(40, 12_000) * math.exp(rng.gauss(0.0, 0.03)))
    assert model.seconds(200, 60_000, 1024, 1024 * 1024) == pytest.approx(before, rel=0.1)
    slower = COSTS.scaled(2.0)
    feed(model, slower.seconds, 12_000)
    assert model.seconds(100, 30_000, 0, 0) == pytest.approx(slower.seconds(100, 30_000), rel=0.06)


@given(
    st.lists(
        st.tuples(st.integers(0, 256), st.integers(0, 2000), st.integers(0, 4096), st.floats(1e-4, 10.0)),
        min_size=1,
        max_size=60,
    ),
    st.booleans(),
)
def test_no_estimate_is_negative_nor_absurd(steps: list[tuple[int, int, int, float]], primed: bool) -> None:
    model = StepModel(CAPACITY, COSTS if primed else None)
    for step, (n, length, prompt, seconds) in enumerate(steps):
        if not n and not prompt:
            continue
        stats = step_stats(step, 0.0, seconds, n=n, kv=n * length, prompt=prompt, context=prompt * length)
        model.observe(stats, seconds)
        assert min(model.per_request_s, model.per_kv_token_s, model.per_prompt_context_s) >= 0.0
        assert 0.0 <= model.seconds(n, n * length, prompt, prompt * length) < 1e3
        assert 0 <= model.most_tokens(0.1, model.per_request_s, 8192) <= 8192


def test_small_loads_do_not_drive_the_fit_apart() -> None:
    """Few requests, short prompts, no prior: coefficients are hardly told apart."""
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

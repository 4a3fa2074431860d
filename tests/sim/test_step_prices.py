"""No step is cheaper than what is in it."""

from __future__ import annotations

import math
import random
from dataclasses import astuple

import numpy as np
import pytest

from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.step_grid import RequestSizes
from chiron_engine.sim.step_prices import SHARE, StepPrices, TokenCounts, best_prices
from tests.sim.linear_profile import linear_profile

TOTALS = TokenCounts(2e8, 2.5e11, 3e8, 8e11, 3.7e9, 5e12)
SIZES = RequestSizes(shortest=8, longest=9000)
COSTS = StepCosts(0.006, 1.6e-5, 4e-8, 1.8e-5, 6e-10)


def random_step(profile: Profile, rng: random.Random) -> tuple[int, int, int, int]:
    requests = rng.choice([0, rng.randint(1, profile.max_slots), rng.randint(1, 20)])
    least, most = requests * SIZES.shortest, min(requests * SIZES.longest, profile.kv_capacity_tokens)
    kv_tokens = int(math.exp(rng.uniform(math.log(least), math.log(most)))) if requests else 0
    room = profile.max_step_tokens - requests
    prompt = rng.choice([0, rng.randint(1, room), min(room, int(2 ** rng.uniform(0, 13)))])
    if not requests:
        prompt = max(1, prompt)
    end = min(int(2 ** rng.uniform(0, 13)), SIZES.longest)
    return requests, kv_tokens, prompt, prompt * rng.choice([end, max(1, min(prompt, SIZES.longest))])


@pytest.mark.parametrize("slo_steps", [1.5, 3.0])
@pytest.mark.parametrize(
    "name", ["h100/llama-3.1-8b/tp1/bf16", "a100/llama-3.1-70b/tp2/bf16", "h100/llama-3.1-70b/tp8/fp8"]
)
def test_no_step_is_cheaper_than_its_prices(name: str, slo_steps: float) -> None:
    profile, rng = load_profile(name), random.Random(7)
    slo = slo_steps * profile.step_times.seconds(1, 1024, 0, 0)
    prices = best_prices(profile, slo, TOTALS, SIZES)
    for _ in range(20_000):
        requests, kv_tokens, prompt, context = random_step(profile, rng)
        seconds = profile.step_times.seconds(requests, kv_tokens, prompt, context)
        prefill = prices.prompt_tokens * prompt + prices.prompt_context * context
        priced = prices.other_tokens * requests + prices.other_context * kv_tokens + prefill
        if seconds <= slo:
            priced = max(
                priced, prices.on_time_tokens * requests + prices.on_time_context * kv_tokens + prefill
            )
        assert priced <= seconds, (requests, kv_tokens, prompt, context)


def value(prices: TokenCounts, totals: TokenCounts = TOTALS) -> float:
    return float(np.dot(astuple(prices), astuple(totals)))


@pytest.mark.parametrize("slo", [0.009, 0.018, 0.2])
def test_prices_are_never_below_the_two_shares_of_the_base(slo: float) -> None:
    """The base shared by KV capacity; and, for tokens on time, by what the SLO leaves beside it."""
    profile = linear_profile(COSTS, kv_capacity=400_000, max_slots=512, max_step_tokens=8192)
    found = value(best_prices(profile, slo, TOTALS, SIZES))
    a, b, c = COSTS.per_request_s, COSTS.per_kv_token_s, COSTS.base_s
    prompt = (COSTS.per_prompt_token_s, COSTS.per_prompt_context_s)
    by_kv = b + c / profile.kv_capacity_tokens
    assert found >= SHARE * value(StepPrices(a, by_kv, a, by_kv, *prompt)) * (1 - 1e-6)
    grown = slo / (slo - c)
    assert found >= SHARE * value(StepPrices(a * grown, b * grown, a, b, *prompt)) * (1 - 1e-6)


def test_a_tighter_slo_never_costs_less() -> None:
    profile = linear_profile(COSTS, kv_capacity=400_000, max_slots=512, max_step_tokens=8192)
    values = [value(best_prices(profile, slo, TOTALS, SIZES)) for slo in (0.008, 0.012, 0.03, 0.3)]
    assert values == sorted(values, reverse=True) and values[0] > 1.2 * values[-1]


def test_an_slo_below_every_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step of test/linear/tp1/none takes at most"):
        best_prices(linear_profile(COSTS), 0.001, TOTALS, SIZES)


def test_looking_at_steps_leaves_the_count_of_extrapolations() -> None:
    profile = load_profile("h100/llama-3.1-8b/tp1/bf16")
    best_prices(profile, 0.2, TOTALS, SIZES)
    assert profile.step_times.extrapolated == 0

"""Theta from arrival history."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron_engine.policy.fleet.theta import LEARNED_LEADS, MOST_RATIO, PRIOR_RATIO, Theta

LEAD_S = 10.0


def observe(theta: Theta, demand: list[float]) -> None:
    for place, busy in enumerate(demand):
        before = demand[max(0, place - 59) : place + 1]
        theta.observe(busy, sum(before) / len(before), LEAD_S)


def test_history_lowers_the_prior_as_it_grows() -> None:
    theta = Theta(1.0)
    enough = int(LEARNED_LEADS * LEAD_S)
    observe(theta, [5.0] * 120)
    assert theta.ratio == PRIOR_RATIO, "starting up teaches nothing"
    observe(theta, [5.0] * (enough * 3 // 4 - 120))
    assert theta.ratio == pytest.approx(PRIOR_RATIO + 0.75 * (1.1 - PRIOR_RATIO))
    observe(theta, [5.0] * (enough // 4))
    assert theta.ratio == pytest.approx(1.1)


def test_history_raises_the_prior_at_once() -> None:
    theta = Theta(1.0)
    observe(theta, [1.0] * 125 + [3.0] + [1.0] * 15)
    assert theta.ratio == pytest.approx(3.0, rel=0.02)


def test_the_example_of_the_paper() -> None:
    """Spikes of three times the usual load give Theta = 1/3."""
    theta = Theta(1.0)
    # Each spike is one second every 100 s: the 60 s mean before it is free of the last one.
    observe(theta, ([3.0] + [1.0] * 99) * 20)
    assert theta.value == pytest.approx(1 / 3, rel=0.02)


def test_no_more_headroom_than_the_most() -> None:
    theta = Theta(1.0)
    observe(theta, ([40.0] + [1.0] * 99) * 5)
    assert theta.ratio == MOST_RATIO


def test_idle_time_teaches_nothing() -> None:
    theta = Theta(1.0)
    observe(theta, [0.0] * 1000)
    assert theta.ratio == PRIOR_RATIO


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=250, max_size=400))
def test_the_binned_percentile_is_that_of_the_definition(demand: list[float]) -> None:
    theta = Theta(1.0)
    observe(theta, demand)
    lead = int(LEAD_S)
    weighed = []
    for place in range(120, len(demand) - lead):
        before = demand[place - 59 : place + 1]
        mean = sum(before) / len(before)
        weighed.append((max(demand[place + 1 : place + 1 + lead]) / mean, mean))
    weighed.sort(reverse=True)
    left = 0.01 * sum(mean for _, mean in weighed)
    while left >= weighed[0][1]:
        left -= weighed.pop(0)[1]
    exact = min(max(weighed[0][0], 1.1), MOST_RATIO)
    assert exact - 0.0101 <= theta.ratio <= exact + 0.0101


def test_a_jump_from_next_to_nothing_does_not_double_the_fleet() -> None:
    """By seconds 2 % of this history see a ratio of 4, by requests next to none."""
    theta = Theta(1.0)
    observe(theta, [10.0] * 1000 + [0.1] * 120 + [0.4] * 30 + [10.0] * 1000)
    assert theta.ratio < 1.5


def test_starting_up_is_no_spike() -> None:
    theta = Theta(1.0)
    observe(theta, [0.1 * second for second in range(1, 60)] + [6.0] * 600)
    assert theta.ratio == 1.1

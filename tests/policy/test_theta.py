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


def test_a_prior_until_enough_history() -> None:
    theta = Theta(1.0)
    observe(theta, [5.0] * int(LEARNED_LEADS * LEAD_S - 1))
    assert theta.ratio == PRIOR_RATIO
    theta.observe(5.0, 5.0, LEAD_S)
    assert theta.ratio == pytest.approx(1.1)


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
    ratios = []
    for place in range(len(demand) - lead):
        before = demand[max(0, place - 59) : place + 1]
        ratios.append(max(demand[place + 1 : place + 1 + lead]) / (sum(before) / len(before)))
    ratios.sort()
    above = int(0.01 * len(ratios))
    exact = min(max(ratios[len(ratios) - 1 - above], 1.1), MOST_RATIO)
    assert exact - 1e-9 <= theta.ratio <= exact + 0.0101 or theta.ratio == MOST_RATIO

"""What a token costs at least, in seconds of an instance, however steps are composed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from .profile import Profile
from .step_grid import RequestSizes, Step, StepGrid

Matrix = NDArray[np.float64]

SHARE = 0.99
"""Of the prices found on a grid of steps; what is left covers the steps between its points."""
_ADDED = 200
"""Rows added to the linear program at a time."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What there is to compute: decoding tokens and the sum of their contexts, apart for tokens that
    must come within the interactive ITL SLO and all others; prompt tokens and the sum of their
    contexts. Also amounts of one request, or a price for each of them (`StepPrices`)."""

    on_time_tokens: float
    on_time_context: float
    other_tokens: float
    other_context: float
    prompt_tokens: float
    prompt_context: float


class StepPrices(TokenCounts):
    """Seconds for one of each. No step an instance can take is shorter than the prices of what is in
    it, so that the work of any set of requests, added up at these prices, is no more than the time
    instances spend on them.

    The base of a step, c, is in the prices: it is shared by what runs together, and how much can is
    bounded by the KV capacity and, in a step that keeps an ITL SLO S, by S. For a linear plant
    t = c + a n + b K both of these are valid prices of a decoding token with context x:
    a + (b + c / KV capacity) x, as contexts in a step add up to at most the capacity; and, where the
    step keeps S, (a + b x) S / (S - c), as a n + b K <= S - c. `best_prices` finds prices for
    any plant; what it takes for the gaps of its grid aside, the whole workload costs no less at them.
    """


def best_prices(profile: Profile, itl_slo_s: float, totals: TokenCounts, sizes: RequestSizes) -> StepPrices:
    """The prices at which `totals` costs most: a linear program over the steps of a grid.

    Two kinds of step bound them. Any step whatever, at the prices of other tokens; and steps of at most
    `itl_slo_s`, the only ones that yield tokens on time, at the prices of those. Tokens on time never
    cost less than others, so a step of both kinds is bounded, too.
    """
    grid = StepGrid(profile, sizes)
    rows, seconds = _constraints(grid.steps(), on_time=False)
    if totals.on_time_tokens:
        quick_rows, quick_seconds = _constraints(grid.steps(itl_slo_s), on_time=True)
        if not len(quick_rows):
            raise ValueError(f"no step of {profile.name} takes at most {itl_slo_s} s")
        rows, seconds = np.concatenate([rows, quick_rows]), np.concatenate([seconds, quick_seconds])
    units = np.maximum(rows.max(axis=0), 1.0)
    prices = _highest(rows / units / seconds[:, None], np.array(astuple(totals)) / units, units) / units
    if not totals.on_time_tokens:
        prices[:2] = prices[2:4]
    return StepPrices(*(SHARE * prices).tolist())


def _highest(rows: Matrix, gain: Matrix, units: Matrix) -> Matrix:
    """x >= 0 of highest gain with rows @ x <= 1 and prices x / units on time not below the others. Few
    rows matter: those violated most are added until none is."""
    from scipy.optimize import linprog

    cheaper = np.array([[-1.0, 0, 1, 0, 0, 0], [0, -1.0, 0, 1, 0, 0]]) / units
    cheaper /= cheaper.max(axis=1, keepdims=True)
    chosen = np.unique(np.concatenate([rows.argmax(axis=0), rows.sum(axis=1).argsort()[-_ADDED:]]))
    while True:
        found = linprog(
            -gain / gain.max(),
            A_ub=np.concatenate([rows[chosen], cheaper]),
            b_ub=np.concatenate([np.ones(len(chosen)), np.zeros(2)]),
            method="highs",
        )
        if found.status != 0:
            raise RuntimeError(f"no prices of steps were found: {found.message}")
        held = rows @ found.x
        worst = held.argsort()[-_ADDED:]
        if held[worst[-1]] <= 1 + 1e-7:
            return found.x
        chosen = np.union1d(chosen, worst[held[worst] > 1])


def _constraints(steps: Iterable[Step], on_time: bool) -> tuple[Matrix, Matrix]:
    """What each step holds, as prices apply to it, and its seconds."""
    points = np.array(list(steps), dtype=np.float64).reshape(-1, 5)
    rows = np.zeros((len(points), 6))
    rows[:, [0, 1] if on_time else [2, 3]] = points[:, :2]
    rows[:, 4:] = points[:, 2:4]
    return rows, points[:, 4]

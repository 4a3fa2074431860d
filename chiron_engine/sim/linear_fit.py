"""Linear step costs from samples: the best fit, and the highest plane that no sample lies under."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from chiron_engine.policy.iteration.step_costs import StepCosts

Matrix = NDArray[np.float64]
NUM_TERMS = 5


def step_features(requests: Matrix, kv_tokens: Matrix, prompt_tokens: Matrix, context: Matrix) -> Matrix:
    """[samples, 5]: what StepCosts multiplies, in its order."""
    return np.stack([np.ones_like(requests), requests, kv_tokens, prompt_tokens, context], axis=1)


def to_costs(values: Matrix) -> StepCosts:
    return StepCosts(*(float(v) for v in values))


def fit_costs(features: Matrix, seconds: Matrix) -> StepCosts:
    """Non-negative least squares of the relative error.

    With five terms every set of non-zero ones can be tried: the optimum is the best of those whose
    unconstrained solution is not negative.
    """
    scaled = features / seconds[:, None]
    scale = np.abs(scaled).max(axis=0)
    scale[scale == 0] = 1.0
    scaled /= scale
    target = np.ones(len(seconds))
    best, best_error = np.zeros(NUM_TERMS), np.inf
    for terms in _subsets():
        solution, *_ = np.linalg.lstsq(scaled[:, terms], target, rcond=None)
        if (solution < 0).any():
            continue
        error = float(((scaled[:, terms] @ solution - target) ** 2).sum())
        if error < best_error:
            best, best_error = np.zeros(NUM_TERMS), error
            best[list(terms)] = solution
    return to_costs(best / scale)


def _subsets() -> Iterator[list[int]]:
    for size in range(1, NUM_TERMS + 1):
        yield from (list(terms) for terms in combinations(range(NUM_TERMS), size))


def fit_envelope(features: Matrix, seconds: Matrix, weights: Matrix) -> StepCosts:
    """Non-negative costs nowhere above `seconds`, largest in the mean of weights x costs / seconds.

    A linear programme of five variables. Its optimum lies where five of the constraints hold with
    equality, so the vertices of a small working set are tried, and the constraint violated most is
    added to it until none is.
    """
    scaled = features / seconds[:, None]
    scale = scaled.max(axis=0)
    scaled = scaled / scale
    objective = weights @ scaled
    working = [int(i) for i in scaled.argmax(axis=0)]
    while True:
        solution = _best_vertex(scaled[working], objective)
        value = scaled @ solution
        worst = int(value.argmax())
        if value[worst] <= 1 + 1e-9 or worst in working:
            return to_costs(solution / scale / max(1.0, float(value.max())))
        working = [i for i in working if value[i] > 1 - 1e-6] if len(working) > 12 else working
        working.append(worst)


def _best_vertex(rows: Matrix, objective: Matrix) -> Matrix:
    """Vertex of {x >= 0, rows x <= 1} with the largest objective; the rows bound every variable."""
    walls = np.concatenate([rows, np.eye(NUM_TERMS)])
    levels = np.concatenate([np.ones(len(rows)), np.zeros(NUM_TERMS)])
    chosen = np.array(list(combinations(range(len(walls)), NUM_TERMS)))
    systems = walls[chosen]
    regular = np.abs(np.linalg.det(systems)) > 1e-14
    vertices = np.linalg.solve(systems[regular], levels[chosen[regular]][..., None])[..., 0]
    feasible = (vertices >= -1e-9).all(axis=1) & (vertices @ rows.T <= 1 + 1e-9).all(axis=1)
    candidates = np.clip(vertices[feasible], 0.0, None)
    return candidates[int((candidates @ objective).argmax())]

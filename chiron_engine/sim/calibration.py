"""A latency profile from the step log of a running engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from chiron_engine.policy.iteration.step_costs import StepCosts

from .linear_fit import Matrix, fit_costs, step_features
from .linear_step_times import StepRegion

MIN_STEPS = 200
OUTLIER_RATIO = 3.0
LEAST_VARIETY = 0.02
"""Of a term's size, what the other terms must leave unexplained for its cost to be told apart."""

COUNTS = ("step", "decode_requests", "kv_tokens", "prefill_tokens", "prefill_context", "running", "waiting")
NUMBERS = (*COUNTS, "time", "swap_out_blocks", "swap_in_blocks", "max_running", "token_budget")
NUM_COLUMNS = 5
LARGEST_NUMBER = 1e15

# What tells each cost but the first apart.
VARIETY = (
    ("steps with other numbers of running requests", "per_request_s"),
    ("decoding requests of other lengths", "per_kv_token_s"),
    ("steps with prompts of several sizes", "per_prompt_token_s"),
    (
        "prompts long enough to be computed in several chunks, or of very different lengths",
        "per_prompt_context_s",
    ),
)


class CalibrationError(ValueError):
    """The log does not tell enough, or is no step log."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """costs: fitted to `used` of the `steps` in the log. mean_error: of |fit / measured - 1|.
    tail_p99: 99th percentile of measured / fit. outliers: steps over three times the fit, left out.
    max_slots and max_step_tokens: the largest limits seen."""

    costs: StepCosts
    measured: StepRegion
    steps: int
    used: int
    outliers: int
    mean_error: float
    tail_p99: float
    max_slots: int
    max_step_tokens: int


def read_step_log(path: Path) -> list[dict[str, float]]:
    """The rows of a step log. Raises CalibrationError, with the line, for anything else."""
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append({name: _number(name, row[name]) for name in NUMBERS})
            except KeyError as error:
                raise CalibrationError(f"{path}, line {number}: the step lacks {error.args[0]!r}") from error
            except (ValueError, TypeError) as error:
                raise CalibrationError(f"{path}, line {number}: no step of a step log: {error}") from error
    return rows


def _number(name: str, value: object) -> float:
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number <= LARGEST_NUMBER:
        raise ValueError(f"{name} is {number:g}; it must be from 0 to {LARGEST_NUMBER:g}")
    return number


def calibrate(rows: list[dict[str, float]]) -> Calibration:
    """Fit step costs to a log. A step's time is that between its commit and the one before, so it
    holds scheduling too; steps after an idle moment and steps that swap are left out.

    Raises CalibrationError when there are too few steps, or nothing to tell two costs apart by.
    """
    samples = np.array(list(_busy_steps(rows)), dtype=float).reshape(-1, NUM_COLUMNS)
    if len(samples) < MIN_STEPS:
        raise CalibrationError(
            f"{len(samples)} of {len(rows)} steps can be used; at least {MIN_STEPS} are needed that follow "
            "another at once and swap nothing"
        )
    seconds = samples[:, 0]
    features = step_features(*samples[:, 1:].T)
    _check_variety(features)
    costs = fit_costs(features, seconds)
    near = seconds <= OUTLIER_RATIO * _predict(costs, features)
    costs = fit_costs(features[near], seconds[near])
    ratio = seconds[near] / _predict(costs, features[near])
    largest = samples[near, 1:].max(axis=0)
    return Calibration(
        costs=costs,
        measured=StepRegion(*(int(value) for value in largest)),
        steps=len(rows),
        used=int(near.sum()),
        outliers=int((~near).sum()),
        mean_error=float(np.abs(1 / ratio - 1).mean()),
        tail_p99=float(np.quantile(ratio, 0.99)),
        max_slots=int(max(row["max_running"] for row in rows)),
        max_step_tokens=int(max(row["token_budget"] for row in rows)),
    )


def _busy_steps(rows: list[dict[str, float]]) -> Iterator[tuple[float, ...]]:
    """(seconds, requests, KV tokens, prompt tokens, prompt context) of the steps to fit."""
    for before, row in pairwise(rows):
        follows = row["step"] == before["step"] + 1 and before["running"] > 0
        computes = row["decode_requests"] or row["prefill_tokens"]
        swaps = row["swap_out_blocks"] or row["swap_in_blocks"]
        seconds = row["time"] - before["time"]
        if follows and computes and not swaps and seconds > 0:
            yield (
                seconds,
                row["decode_requests"],
                row["kv_tokens"],
                row["prefill_tokens"],
                row["prefill_context"],
            )


def _predict(costs: StepCosts, features: Matrix) -> Matrix:
    return features @ np.array(list(asdict(costs).values()))


def _check_variety(features: Matrix) -> None:
    """Each term must vary by itself, or its cost is anybody's guess."""
    scaled = features / np.maximum(features.max(axis=0), 1e-300)
    missing = []
    for term, (wanted, name) in enumerate(VARIETY, 1):
        others = np.delete(scaled, term, axis=1)
        explained = others @ np.linalg.lstsq(others, scaled[:, term], rcond=None)[0]
        size = float(np.linalg.norm(scaled[:, term]))
        if size == 0 or np.linalg.norm(scaled[:, term] - explained) < LEAST_VARIETY * size:
            missing.append(f"{wanted} (for {name})")
    if missing:
        raise CalibrationError("the log is too uniform; it needs " + "; ".join(missing))

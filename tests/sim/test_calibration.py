"""Calibration gets back the costs that made a log, or says what the log lacks."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from chiron_engine.core.step_stats import StepLog
from chiron_engine.sim.calibration import CalibrationError, calibrate, read_step_log
from tests.core.simulated_engine import COSTS, Arrival, SimulatedEngine


def step_log(path: Path, noise: float = 0.0, arrivals: list[Arrival] | None = None) -> Path:
    engine = SimulatedEngine(blocks=2000, noise=noise)
    rng = random.Random(0)
    if arrivals is None:
        arrivals = [Arrival(2.0 * i / 60, rng.randint(10, 3000), rng.randint(2, 120), 400) for i in range(60)]
    with StepLog(path) as log:
        engine.core.add_step_hook(log)
        engine.run(arrivals, fast=True)
    return path


def test_a_noiseless_log_gives_the_costs_back(tmp_path: Path) -> None:
    found = calibrate(read_step_log(step_log(tmp_path / "log")))
    for name, value in asdict(COSTS).items():
        assert asdict(found.costs)[name] == pytest.approx(value, rel=0.02), name
    assert found.mean_error < 1e-6 and found.tail_p99 == pytest.approx(1.0)
    assert found.outliers == 0 and found.used >= 200
    assert (found.max_slots, found.max_step_tokens) == (32, 512)


def test_noise_shows_as_error_and_tail(tmp_path: Path) -> None:
    found = calibrate(read_step_log(step_log(tmp_path / "log", noise=0.1)))
    assert found.costs.base_s == pytest.approx(COSTS.base_s, rel=0.05)
    assert 0.06 < found.mean_error < 0.1
    assert 1.2 < found.tail_p99 < 1.35


def test_a_stall_is_left_out(tmp_path: Path) -> None:
    rows = read_step_log(step_log(tmp_path / "log"))
    for row in rows[100:]:
        row["time"] += 5.0
    found = calibrate(rows)
    assert found.outliers == 1
    assert found.costs.base_s == pytest.approx(COSTS.base_s, rel=0.02)


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    log = step_log(tmp_path / "log", arrivals=[Arrival(0.0, 100, 50, 60)])
    with pytest.raises(CalibrationError, match=r"49 of 50 steps can be used; at least 200"):
        calibrate(read_step_log(log))


def test_too_uniform_a_log_names_what_is_missing(tmp_path: Path) -> None:
    log = step_log(tmp_path / "log", arrivals=[Arrival(0.0, 100, 700, 800)])
    with pytest.raises(CalibrationError) as error:
        calibrate(read_step_log(log))
    assert "other numbers of running requests" in str(error.value)
    assert "steps with prompts of several sizes" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no step"),
        (json.dumps({"step": 1}), "line 2: the step lacks 'decode_requests'"),
        ("3", "line 2"),
    ],
)
def test_what_is_no_step_log_is_refused_by_line(tmp_path: Path, line: str, message: str) -> None:
    log = tmp_path / "log"
    log.write_text(step_log(tmp_path / "good").read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(CalibrationError, match=message):
        read_step_log(log)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1e300"])
def test_numbers_that_no_step_has_are_refused(tmp_path: Path, value: str) -> None:
    path = step_log(tmp_path / "log")
    lines = path.read_text().splitlines()
    row = json.loads(lines[6]) | {"kv_tokens": json.loads(value)}
    path.write_text("\n".join([*lines[:6], json.dumps(row), *lines[7:]]))
    with pytest.raises(CalibrationError, match=r"line 7: no step of a step log: kv_tokens is .* from 0 to"):
        read_step_log(path)

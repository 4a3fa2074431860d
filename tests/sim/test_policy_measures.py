"""What the measures of the fleet policy read off a run."""

from __future__ import annotations

import io
import math
from array import array

import pytest

from chiron_engine.policy.fleet.messages import FleetGauges
from chiron_engine.sim.run_result import (
    FleetSample,
    InstanceLife,
    ItlHistogram,
    Outcome,
    RequestColumns,
    RunResult,
)
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import ClassSlo, make_workload
from scripts.policy_measures.measure import (
    Measured,
    Options,
    batch_ends,
    misses_between,
    rate_for,
    scaling_actions_between,
)

OPTIONS = Options(1.0, 0, "h100/llama-3.1-8b/tp1/bf16", (), 45.0, (), None)


def life(launched_s: float, exited_s: float = math.nan) -> InstanceLife:
    return InstanceLife(0, 1, launched_s, launched_s, exited_s)


def sample(time_s: float, draining: int = 0, batch: int = 0) -> FleetSample:
    gauges = FleetGauges(0, 1, batch, 0, draining, 0.5, 0.5, 0.5, 0, 1, batch, 0, 0)
    return FleetSample(time_s, gauges, 1.0, 1.0, 0.1, 0, 0)


def result(lives: list[InstanceLife], samples: list[FleetSample]) -> RunResult:
    """Three interactive requests at 0, 10 and 20 s, the second 3 s late; one batch request."""
    trace = Trace("i", array("d", [0.0, 10.0, 20.0]), array("i", [5] * 3), array("i", [1] * 3))
    batch = Trace("b", array("d", [0.0]), array("i", [5]), array("i", [1]))
    workload = make_workload(trace, batch, ClassSlo(2.0, 0.1), ClassSlo(50.0, 1.0))
    ends = array("d", [1.0, 15.0, 21.0, 30.0])
    columns = RequestColumns(
        outcome=array("b", [Outcome.FINISHED] * 4),
        first_token_s=ends,
        last_token_s=ends,
        late_gaps=array("i", [0] * 4),
        evictions=array("i", [0] * 4),
        served=array("b", [1] * 4),
        output_tokens=array("i", [1] * 4),
    )
    return RunResult(workload, columns, lives, samples, ItlHistogram(), 40.0)


@pytest.mark.parametrize(
    ("lives", "draining", "actions"),
    [
        ([life(0.0)], (0, 0), 0),
        ([life(0.0), life(15.0)], (0, 0), 1),
        ([life(0.0), life(0.0, 15.0)], (0, 0), 1),
        ([life(0.0), life(0.0, 15.0)], (1, 0), 0),  # its drain was ordered before
        ([life(0.0), life(0.0, 35.0)], (0, 1), 1),  # and this one inside, though it exits after
    ],
)
def test_actions_are_counted_where_they_are_ordered(
    lives: list[InstanceLife], draining: tuple[int, int], actions: int
) -> None:
    run = result(lives, [sample(10.0, draining[0]), sample(29.0, draining[1])])
    assert scaling_actions_between(run, 10.0, 30.0) == actions


def test_misses_are_counted_by_arrival() -> None:
    run = result([], [])
    assert misses_between(run, [(0.0, 10.0), (20.0, 30.0)]) == (0, 2)
    assert misses_between(run, [(0.0, 30.0)]) == (1, 3)


def test_the_end_of_batch_work_and_of_batch_instances() -> None:
    run = result([], [sample(29.0, batch=2), sample(35.0, batch=1), sample(36.0)])
    assert batch_ends(run) == (30.0, 35.0)


def test_twice_the_load_is_twice_the_rate() -> None:
    assert rate_for(OPTIONS, "512/128", 4.0) == pytest.approx(2 * rate_for(OPTIONS, "512/128", 2.0))


def test_a_missed_target_is_said() -> None:
    measured = Measured(notes=["a note"])
    measured.judge("chiron", "no scaling action", "3", False)
    out = io.StringIO()
    measured.print("steady", OPTIONS, out)
    assert "MISSED  chiron: no scaling action; seen: 3" in out.getvalue()
    (target,) = measured.as_json("steady", OPTIONS)["targets"]
    assert target == {"run": "chiron", "target": "no scaling action", "seen": "3", "met": False}

"""Attainment and the figures of a run against cases computed by hand."""

from __future__ import annotations

import json
import math
from array import array

import pytest

from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.sim.attainment import (
    allowed_late_gaps,
    attained_rows,
    attainment,
    interactive_attained,
)
from chiron_engine.sim.run_result import (
    InstanceLife,
    ItlHistogram,
    Outcome,
    RequestColumns,
    RunResult,
)
from chiron_engine.sim.summary import gpu_hours, itl_ms, peak_instances, summary
from chiron_engine.sim.token_gaps import TokenGaps
from chiron_engine.sim.traces.trace import Trace
from chiron_engine.sim.workload import ClassSlo, make_workload

NAN = math.nan
Row = tuple[Outcome, float, float, int, int]
"""Outcome, first token, last token, late gaps, output tokens."""


def trace(name: str, arrivals: list[float], outputs: list[int]) -> Trace:
    return Trace(name, array("d", arrivals), array("i", [10] * len(arrivals)), array("i", outputs))


def result_of(
    rows: list[Row],
    interactive: Trace | None,
    batch: Trace | None,
    instances: list[InstanceLife] | None = None,
    end_s: float = 20.0,
) -> RunResult:
    workload = make_workload(
        interactive, batch, ClassSlo(ttft_s=2.0, itl_s=0.1), ClassSlo(ttft_s=100.0, itl_s=1.0)
    )
    columns = RequestColumns(
        outcome=array("b", [row[0] for row in rows]),
        first_token_s=array("d", [row[1] for row in rows]),
        last_token_s=array("d", [row[2] for row in rows]),
        late_gaps=array("i", [row[3] for row in rows]),
        evictions=array("i", [0] * len(rows)),
        served=array("b", [int(row[0] is Outcome.FINISHED) for row in rows]),
        output_tokens=array("i", [row[4] for row in rows]),
    )
    return RunResult(workload, columns, instances or [], [], ItlHistogram(), end_s)


DONE = Outcome.FINISHED
INTERACTIVE_CASES: list[tuple[str | None, Row]] = [
    # Arrival 10, TTFT SLO 2 s, ITL SLO 0.1 s; the last of n tokens is due at 12 + (n - 1) / 10.
    (None, (DONE, 12.0, 13.0, 0, 11)),
    ("ttft", (DONE, 12.1, 12.9, 0, 11)),
    ("late_end", (DONE, 12.0, 13.1, 0, 11)),
    (None, (DONE, 11.0, 13.0, 1, 11)),  # 10 gaps: 1 % rounded up is one
    ("gaps", (DONE, 11.0, 13.0, 2, 11)),
    (None, (DONE, 11.0, 22.0, 1, 101)),  # 100 gaps: one
    ("gaps", (DONE, 11.0, 22.0, 2, 101)),
    (None, (DONE, 11.0, 22.1, 2, 102)),  # 101 gaps: two
    (None, (DONE, 12.0, 12.0, 0, 1)),
    ("rejected", (Outcome.REJECTED, NAN, NAN, 0, 0)),
    ("unfinished", (Outcome.UNFINISHED, NAN, NAN, 0, 0)),
]


@pytest.mark.parametrize(("reason", "row"), INTERACTIVE_CASES)
def test_interactive_by_hand(reason: str | None, row: Row) -> None:
    result = result_of([row], trace("t", [10.0], [row[4] or 5]), None)
    found = attainment(result)[SloClass.INTERACTIVE]
    assert found.attained == (reason is None)
    assert attained_rows(result, result.workload.streams[0]).tolist() == [reason is None]
    assert found.misses == {
        name: int(name == reason) for name in ("rejected", "unfinished", "ttft", "gaps", "late_end")
    }
    if row[0] is DONE:
        slo = Slo(SloClass.INTERACTIVE, 2.0, 0.1)
        assert interactive_attained(slo, 10.0, row[1], row[2], row[4], row[3]) == (reason is None)


def test_a_request_that_misses_in_two_ways_is_counted_once() -> None:
    result = result_of([(DONE, 20.0, 40.0, 9, 11)], trace("t", [10.0], [11]), None)
    found = attainment(result)[SloClass.INTERACTIVE]
    assert sum(found.misses.values()) == 1 and found.misses["ttft"] == 1


def test_batch_by_hand() -> None:
    """Due after TTFT SLO + mean output x ITL SLO = 100 + 20 s; gaps and first tokens do not count."""
    rows: list[Row] = [(DONE, 110.0, 125.0, 0, 10), (DONE, 6.0, 125.1, 0, 30)]
    found = attainment(result_of(rows, None, trace("b", [5.0, 5.0], [10, 30])))[SloClass.BATCH]
    assert (found.requests, found.attained, found.misses["deadline"]) == (2, 1, 1)


def test_classes_are_kept_apart() -> None:
    rows: list[Row] = [(DONE, 1.0, 1.5, 0, 2), (DONE, 3.0, 3.5, 0, 2), (DONE, 50.0, 60.0, 0, 2)]
    found = attainment(result_of(rows, trace("i", [0.0, 0.0], [2, 2]), trace("b", [0.0], [2])))
    assert found[SloClass.INTERACTIVE].share == 0.5
    assert found[SloClass.BATCH].share == 1.0


@pytest.mark.parametrize(("tokens", "allowed"), [(1, 0), (2, 1), (101, 1), (102, 2), (201, 2), (202, 3)])
def test_one_percent_of_gaps_rounded_up(tokens: int, allowed: int) -> None:
    assert allowed_late_gaps(tokens) == allowed


def test_gpu_hours_count_loading_failed_and_lost_instances() -> None:
    lives = [
        InstanceLife(0, 2, 0.0, 0.0, NAN),  # to the end: 2 x 7200
        InstanceLife(1, 2, 600.0, 660.0, 1200.0),  # 2 x 600
        InstanceLife(2, 2, 1000.0, NAN, 1030.0, failed=True),  # 2 x 30
        InstanceLife(3, 2, 7100.0, NAN, NAN),  # still loading: 2 x 100
        InstanceLife(4, 2, 7000.0, 7050.0, 9000.0),  # only to the last completion: 2 x 200
    ]
    result = result_of([(DONE, 1.0, 1.5, 0, 2)], trace("i", [0.0], [2]), None, instances=lives, end_s=7200.0)
    assert gpu_hours(result) == pytest.approx(2 * (7200 + 600 + 30 + 100 + 200) / 3600)
    assert peak_instances(lives) == 3


def test_an_instance_that_follows_another_at_once_is_no_second_one() -> None:
    lives = [InstanceLife(0, 1, 0.0, 0.0, 10.0), InstanceLife(1, 1, 10.0, 20.0, NAN)]
    assert peak_instances(lives) == 1


def test_gaps_are_weighted_by_the_requests_that_saw_them() -> None:
    histogram = ItlHistogram()
    gaps = TokenGaps(0.1, histogram)
    gaps.step(1.0, 0.01, 99)
    gaps.step(2.0, 0.2, 1)
    assert itl_ms(histogram, 0.5) == pytest.approx(10.0, rel=0.02)
    assert itl_ms(histogram, 0.995) == pytest.approx(200.0, rel=0.02)
    assert itl_ms(ItlHistogram(), 0.5) is None


def test_late_gaps_are_those_between_first_and_last_token() -> None:
    gaps = TokenGaps(0.1, ItlHistogram())
    for now, gap in ((1.0, 0.2), (2.0, 0.05), (3.0, 0.3), (4.0, 0.1), (5.0, 0.11)):
        gaps.step(now, gap, 1)
    assert gaps.late_between(1.0, 5.0) == 2  # its first token came with the late step at 1.0
    assert gaps.late_between(0.5, 3.0) == 2
    assert gaps.late_between(3.0, 4.0) == 0
    assert gaps.interruption(0.1) == 0 and gaps.interruption(0.5) == 1


def test_the_summary_has_every_key_and_is_json() -> None:
    rows: list[Row] = [(DONE, 11.0, 13.0, 0, 11), (Outcome.REJECTED, NAN, NAN, 0, 0)]
    result = result_of(rows, trace("i", [10.0, 11.0], [11, 11]), None, end_s=13.0)
    figures = summary(result, 0.25, policy="chiron", profile="a/b/tp1/bf16", wall_s=1.5, note="x")
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    wanted = (
        "policy trace profile requests slo_attainment ttft_s itl_ms gpu_hours lower_bound_gpu_hours "
        "peak_instances scaling_actions preemptions throughput_rps wall_s role_changes launches "
        "failed_launches lost_instances extrapolated_steps index_of_dispersion slo_misses"
    )
    assert set(wanted.split()) <= set(figures)
    assert figures["slo_attainment"] == {"interactive": 0.5, "batch": None}
    assert figures["slo_misses"]["interactive"]["rejected"] == 1
    assert figures["ttft_s"] == {"p50": 1.0, "p99": 1.0}
    assert figures["throughput_rps"] == pytest.approx(1 / 13.0)
    assert figures["note"] == "x"

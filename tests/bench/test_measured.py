"""What is made of the columns of a run: against the definitions, request by request."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron_engine.bench.measured import Measured, measure
from chiron_engine.bench.request_log import RequestLog
from chiron_engine.bench.summary import bench_summary, warnings
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.sim.attainment import attained_rows, interactive_attained
from tests.bench.recorded_runs import SLO, served, trace, workload

STEPS = st.lists(st.integers(0, 4), min_size=1, max_size=12)  # twentieths of a second between tokens
REQUESTS = st.lists(st.tuples(st.integers(0, 30), STEPS), min_size=1, max_size=8)


def measured_of(interactive: list[list[float]]) -> Measured:
    """Each request is due and sent at 0; its tokens come at these times."""
    asked = workload(trace([0.0] * len(interactive), [5] * len(interactive), [len(t) for t in interactive]))
    log = RequestLog(len(interactive))
    for request, tokens in enumerate(interactive):
        served(log, request, 0.0, 0.0, tokens)
    found = measure(asked, log, 1.0)
    assert found is not None
    return found


@given(REQUESTS)
def test_attainment_is_as_defined_for_each_request(requests: list[tuple[int, list[int]]]) -> None:
    times = [[(first + sum(steps[:place])) / 20 for place in range(len(steps))] for first, steps in requests]
    found = measured_of(times)
    stream = found.result.workload.interactive
    assert stream is not None
    slo = Slo(SloClass.INTERACTIVE, SLO.ttft_s, SLO.itl_s)
    expected = []
    for tokens in times:
        late = sum(b - a > SLO.itl_s + 1e-9 for a, b in pairwise(tokens))
        expected.append(interactive_attained(slo, 0.0, tokens[0], tokens[-1], len(tokens), late))
    assert attained_rows(found.result, stream).tolist() == expected
    gaps = sorted(b - a for tokens in times for a, b in pairwise(tokens))
    assert np.allclose(sorted(found.gaps[SloClass.INTERACTIVE].seconds), gaps)


def test_a_chunk_of_several_tokens_counts_them_at_one_time() -> None:
    found = measured_of([[0.5, 0.6, 0.6, 0.6]])
    assert found.output_tokens == 4
    assert sorted(found.gaps[SloClass.INTERACTIVE].seconds.round(9)) == [0.0, 0.0, 0.1]


def test_times_count_from_sending_and_lag_is_told() -> None:
    asked = workload(trace([1.0, 2.0], [5, 5], [1, 1]))
    log = RequestLog(2)
    served(log, 0, 1.0, 1.0, [1.5])
    served(log, 1, 2.0, 2.5, [3.25])
    found = measure(asked, log, 4.0)
    assert found is not None
    figures = bench_summary(found, cpu_s=0.1, clipped={"prompts": 0, "outputs": 0})
    assert figures["ttft_s"] == {"p50": 0.625, "p99": 0.7475}
    assert figures["lag_ms"] == {"p50": 250.0, "p99": 495.0, "max": 500.0}
    (warning,) = warnings(figures)
    assert "495 ms late" in warning


def test_what_failed_counts_as_missed_and_is_told_by_kind() -> None:
    asked = workload(trace([0.0] * 4, [5] * 4, [2] * 4), trace([0.0, 0.1], [5, 5], [1, 1]))
    log = RequestLog(6)
    served(log, 0, 0.0, 0.0, [0.1, 0.2])
    log.sent(1, 0.0, 0.0)
    log.failed(1, 0.1, "RESOURCE_EXHAUSTED", rejected=True)
    log.sent(2, 0.0, 0.0)
    log.tokens(2, 0.1, 1)
    log.failed(2, 0.2, "UNAVAILABLE", rejected=False)
    log.sent(3, 0.0, 0.0)  # was running when the run was stopped
    served(log, 4, 0.0, 0.0, [2.5])  # late: due 2 s after it was sent
    found = measure(asked, log, 2.0)
    assert found is not None
    figures = bench_summary(found, cpu_s=0.1)
    assert figures["requests"] == 5  # the last batch request was never sent
    assert figures["requests_by_class"] == {"interactive": 4, "batch": 1}
    counts = {key: figures[key] for key in ("finished", "rejected", "lost", "stopped")}
    assert counts == {"finished": 2, "rejected": 1, "lost": 1, "stopped": 1}
    assert figures["errors"] == {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}
    assert figures["slo_attainment"] == {"interactive": 0.25, "batch": 0.0}
    assert figures["slo_misses"]["batch"]["deadline"] == 1
    assert figures["throughput_rps"] == 1.0
    assert figures["goodput_rps"] == 0.5
    assert figures["output_tokens_per_s"] == 2.0


def test_without_tokens_there_are_no_latencies() -> None:
    asked = workload(trace([0.0], [5], [2]))
    log = RequestLog(1)
    log.sent(0, 0.0, 0.0)
    log.failed(0, 0.1, "UNAVAILABLE", rejected=False)
    found = measure(asked, log, 1.0)
    assert found is not None
    figures = bench_summary(found, cpu_s=0.0)
    assert figures["ttft_s"] == figures["itl_ms"] == {"p50": None, "p99": None}
    assert math.isnan(found.result.requests.first_token_s[0])


def test_a_busy_generator_is_told() -> None:
    figures = bench_summary(measured_of([[0.1, 0.2]]), cpu_s=0.9)
    (warning,) = warnings(figures)
    assert "busy for 90%" in warning


def test_nothing_sent_gives_nothing() -> None:
    assert measure(workload(trace([0.0], [5], [2])), RequestLog(1), 1.0) is None


@pytest.mark.parametrize("key", ["gpu_hours", "peak_instances", "lower_bound_gpu_hours", "policy"])
def test_what_only_the_server_knows_is_left_out(key: str) -> None:
    assert key not in bench_summary(measured_of([[0.1]]), cpu_s=0.0)

"""The figure of a run: what its curves hold, and that it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chiron_engine.bench.measured import measure
from chiron_engine.bench.plot import open_at, plot_bench, window_quantiles
from chiron_engine.bench.request_log import RequestLog
from tests.bench.recorded_runs import served, trace, workload


def test_quantiles_by_window() -> None:
    edges, medians, tails = window_quantiles(
        np.array([0.0, 1.0, 1.5, 7.9, 10.0]), np.array([5.0, 1.0, 3.0, np.nan, 9.0]), 10.0, windows=5
    )
    assert edges.tolist() == [0, 2, 4, 6, 8, 10]
    assert medians[0] == 3.0
    assert tails[0] == pytest.approx(4.96)
    assert np.isnan(medians[1:4]).all()
    assert medians[4] == 9.0


def test_open_spans() -> None:
    times, counts = open_at(np.array([0.0, 1.0, np.nan]), np.array([2.0, np.nan, 3.0]), end_s=5.0)
    assert times.tolist() == [0.0, 0.0, 1.0, 2.0, 5.0]
    assert counts.tolist() == [0.0, 1.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("with_tokens", [True, False])
def test_a_figure_is_written(tmp_path: Path, suffix: str, with_tokens: bool) -> None:
    asked = workload(trace([0.0, 0.5], [5, 5], [3, 3]), trace([0.0], [5], [2]))
    log = RequestLog(3)
    if with_tokens:
        served(log, 0, 0.0, 0.0, [0.2, 0.3, 0.4])
        served(log, 2, 0.0, 0.0, [0.5, 0.6])
    else:
        log.sent(0, 0.0, 0.0)
        log.failed(0, 0.1, "UNAVAILABLE", rejected=False)
    found = measure(asked, log, 1.0)
    assert found is not None
    path = tmp_path / f"run{suffix}"
    plot_bench(found, path, title="a run")
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        assert "interactive SLO" in path.read_text()


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    found = measure(workload(trace([0.0], [5], [1])), one_request(), 1.0)
    assert found is not None
    with pytest.raises(ValueError, match="must end in one of"):
        plot_bench(found, tmp_path / "run.txt", title="a run")


def one_request() -> RequestLog:
    log = RequestLog(1)
    served(log, 0, 0.0, 0.0, [0.1])
    return log


def test_a_stopped_run_is_drawn_to_its_end() -> None:
    """Also what came after the last request that ended."""
    log = RequestLog(2)
    served(log, 0, 0.0, 0.0, [0.1])
    log.sent(1, 0.0, 0.0)
    log.tokens(1, 5.0, 1)
    found = measure(workload(trace([0.0, 0.0], [5, 5], [1, 9])), log, 6.0)
    assert found is not None
    assert found.result.end_s == 6.0
    times, counts = open_at(np.array([0.0, 0.0]), found.ended_s, found.result.end_s)
    assert times[-1] == 6.0
    assert counts.tolist()[-2:] == [1.0, 0.0]

"""docs/bench.md names options and figures that exist, and all options there are."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from chiron_engine.bench.measured import measure
from chiron_engine.bench.request_log import RequestLog
from chiron_engine.bench.summary import bench_summary
from chiron_engine.cli import make_app
from tests.bench.recorded_runs import served, trace, workload

PAGE = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")


def test_the_options_it_names_are_those_there_are() -> None:
    options = typer.main.get_command(make_app()).commands["bench"].params  # type: ignore[attr-defined]
    flags = {flag for option in options for flag in option.opts if flag.startswith("--")} - {"--help"}
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGE)) == flags


def test_the_figures_it_names_are_reported() -> None:
    log = RequestLog(1)
    served(log, 0, 0.0, 0.0, [0.1])
    found = measure(workload(trace([0.0], [5], [1])), log, 1.0)
    assert found is not None
    keys = bench_summary(found, cpu_s=0.0, engines_at_start=1).keys()
    rows = PAGE.split("| key | meaning |")[1].split("\n\n")[0]
    named = {name for row in rows.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert len(named) >= 14
    assert named <= keys

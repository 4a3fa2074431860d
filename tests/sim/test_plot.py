"""The figure of a run: written in each format, the same bytes for the same run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from chiron_engine.policy.fleet.messages import FleetGauges
from chiron_engine.sim.plot import PLOT_SUFFIXES, PlottedRun, plot_runs
from chiron_engine.sim.plot_panels import attainment_windows
from chiron_engine.sim.run_result import FleetSample


def sample(time_s: float, *, ended: int = 4, attained: int = 3, batch: int = 0) -> FleetSample:
    level = 2 + math.sin(time_s / 60)
    gauges = FleetGauges(
        interactive=2,
        mixed=1,
        batch=batch,
        loading=int(time_s) % 2,
        draining=0,
        busy=level,
        theta=0.5,
        interactive_backpressure=level / 4,
        batch_backpressure=batch,
        target=4,
        batch_target=batch,
        held_interactive=0,
        queued_batch=10 * batch,
    )
    return FleetSample(time_s, gauges, 12.0, 2048.0, 0.4, attained, ended)


def run(policy: str = "chiron", seconds: int = 600, batch: int = 0) -> PlottedRun:
    return PlottedRun(policy, [sample(float(now), batch=batch) for now in range(seconds)])


@pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
def test_equal_runs_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    runs = [run(batch=2), run("static:3")]
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for path in paths:
        plot_runs(runs, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].stat().st_size > 10_000


def test_every_quantity_is_named_with_its_unit(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    plot_runs([run(batch=2)], path, subtitle="what was run")
    text = path.read_text()
    words = ("demand D", "target N*", "target with batch", "interactive", "mixed", "batch", "loading")
    words += ("IBP", "Theta", "LBP", "BBP", "limit (mean)", "running (mean)", "within SLO (%)", "chiron")
    words += ("simulated time (min)", "instances", "log", "what was run", "batch queued")
    assert [word for word in words if word not in text] == []


def test_a_run_without_batch_has_no_batch_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    plot_runs([run()], path)
    assert "BBP" not in path.read_text()


def test_one_sample_is_enough(tmp_path: Path) -> None:
    plot_runs([PlottedRun("static:1", [sample(0.0)])], tmp_path / "run.png")
    assert (tmp_path / "run.png").exists()


def test_windows_lose_no_request() -> None:
    samples = [sample(now * 1.7, ended=now % 5, attained=now % 2) for now in range(1, 1001)]
    windows = attainment_windows(samples, 60)
    assert len(windows.end_s) == 60
    assert windows.end_s[-1] == pytest.approx(1700.0)
    assert sum(windows.ended) == sum(one.ended for one in samples)
    assert sum(windows.attained) == sum(one.attained for one in samples)
    assert windows.ended[0] == sum(one.ended for one in samples if one.time_s < 1700 / 60)


@pytest.mark.parametrize(
    ("runs", "name", "words"),
    [
        ([], "a.png", "no run to plot"),
        ([PlottedRun("paper", [])], "a.png", "'paper' has no samples"),
        ([run(seconds=2)], "a.jpeg", "must end in one of .png"),
        ([run(seconds=2)], "missing/a.png", "does not exist"),
    ],
)
def test_what_cannot_be_plotted_is_refused(
    tmp_path: Path, runs: list[PlottedRun], name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        plot_runs(runs, tmp_path / name)

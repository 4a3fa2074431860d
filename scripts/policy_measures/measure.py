"""What the measures share: options, how a workload is run, and what a measure says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from chiron_engine.commands.simulation import (
    PolicyRun,
    check_policies,
    load_workload,
    run_policies,
    scale_workload,
)
from chiron_engine.commands.simulation_options import itl_seconds
from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.attainment import attained_rows
from chiron_engine.sim.feasibility import batch_1_step_s
from chiron_engine.sim.load_scaling import mean_demand
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile
from chiron_engine.sim.report import cells, print_rows
from chiron_engine.sim.run_result import FleetSample, RunResult
from chiron_engine.sim.traces.load import load_trace
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo, Workload
from chiron_engine.sim.world_settings import WorldSettings

TICK_S = 1.0
SAMPLE_S = 20_000.0
SETTLE_S = 900.0
"""For retirements after a change of Theta: demand is remembered for minutes before instances go."""
THETA_HISTORY_LEADS = 20
"""Theta is 1/2 until so many load leads of history exist (policy definitions)."""


@dataclass(frozen=True, slots=True)
class Options:
    """scale: of the load in instances. policies: empty for those of the measure."""

    scale: float
    seed: int
    profile: str
    policies: tuple[str, ...]
    load_time_s: float
    itl_slos: tuple[str, ...]
    plot: Path | None

    @property
    def lead_s(self) -> float:
        """L: from decision to ready, plus one tick."""
        return self.load_time_s + TICK_S

    @property
    def warm_up_s(self) -> float:
        """From the start until Theta rests on history, and what follows from that is done."""
        return THETA_HISTORY_LEADS * self.lead_s + SETTLE_S

    def with_policies(self, *names: str) -> Options:
        return replace(self, policies=names)

    def load_profile(self) -> Profile:
        return load_profile(self.profile)

    def interactive_slo(self, itl: str | None = None) -> ClassSlo:
        if itl is None:
            return INTERACTIVE_SLO
        return ClassSlo(INTERACTIVE_SLO.ttft_s, itl_seconds(itl, batch_1_step_s(self.load_profile())))

    def settings(self, expected_instances: float) -> WorldSettings:
        """A world whose GPU cap does not bind: four times what is expected and room for eight more."""
        gpus = self.load_profile().gpus
        most = round(4 * expected_instances) + 8
        return WorldSettings(max_gpus=most * gpus, load_time_s=self.load_time_s, tick_s=TICK_S)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target of a measure for one run: what was asked, what was seen, whether it was met."""

    run: str
    target: str
    seen: str
    met: bool


@dataclass(slots=True)
class Measured:
    """rows: one table row a run, of equal columns. notes: what a reader must know of the set-up."""

    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, run: PolicyRun, name: str | None = None, **columns: str) -> str:
        """A table row of a run; the name under which it stands there."""
        shown = name or run.summary["policy"]
        row = {"run": shown, **cells(run.summary), **columns}
        del row["policy"]
        self.rows.append(row)
        self.summaries.append({"run": shown, **run.summary})
        return shown

    def judge(self, run: str, target: str, seen: str, met: bool) -> None:
        self.verdicts.append(Verdict(run, target, seen, bool(met)))

    def print(self, name: str, options: Options, out: TextIO) -> None:
        scale = "" if options.scale == 1 else f", load x {options.scale:g}"
        print(
            f"{name}: {options.profile}, seed {options.seed}, loading {options.load_time_s:g} s{scale}",
            file=out,
        )
        for note in self.notes:
            print(f"  {note}", file=out)
        if self.rows:
            print_rows(self.rows, out)
        for verdict in self.verdicts:
            word = "met   " if verdict.met else "MISSED"
            print(f"{word}  {verdict.run}: {verdict.target}; seen: {verdict.seen}", file=out)

    def as_json(self, name: str, options: Options) -> dict[str, Any]:
        return {
            "measure": name,
            "scale": options.scale,
            "seed": options.seed,
            "profile": options.profile,
            "load_time_s": options.load_time_s,
            "notes": self.notes,
            "targets": [asdict(verdict) for verdict in self.verdicts],
            "runs": self.summaries,
        }


def rate_for(options: Options, lengths: str, load: float, slo: ClassSlo = INTERACTIVE_SLO) -> float:
    """Interactive requests a second that keep `load` instances busy in the mean. Rates are set and
    not scaled from a trace, since laying copies over each other would blur steps and bursts."""
    sample = load_trace(f"poisson:rate=1,duration={SAMPLE_S:g},lengths={lengths}", options.seed)
    profile = options.load_profile()
    return load / mean_demand(sample, SloClass.INTERACTIVE, slo, profile) * len(sample) / sample.span_s


def workload_of(
    options: Options,
    interactive: str | None,
    batch: str | None = None,
    load: float | None = None,
    batch_load: float | None = None,
    slos: tuple[ClassSlo, ClassSlo] = (INTERACTIVE_SLO, BATCH_SLO),
) -> Workload:
    """Traces by spec, scaled to mean demands in instances where these are given."""
    asked = load_workload(interactive, batch, slos, options.seed)
    return scale_workload(asked, options.load_profile(), load, batch_load, options.seed)


def run(
    options: Options,
    workload: Workload,
    policies: Iterable[str],
    settings: WorldSettings,
    *,
    bound: bool = True,
    **more: Any,
) -> list[PolicyRun]:
    chosen = [*(options.policies or policies)]
    check_policies(chosen, None, options.load_profile(), settings)
    runs = run_policies(workload, options.profile, chosen, settings, options.seed, bound=bound, **more)
    if options.plot is not None:
        from chiron_engine.sim.plot import PlottedRun, plot_runs

        plot_runs([PlottedRun(one.summary["policy"], one.result.samples) for one in runs], options.plot)
    return runs


def samples_between(result: RunResult, start_s: float, end_s: float) -> Iterator[FleetSample]:
    return (sample for sample in result.samples if start_s <= sample.time_s < end_s)


def scaling_actions_between(result: RunResult, start_s: float, end_s: float) -> int:
    """Launches and drains ordered in [start, end), from the lives of instances: an exit counts where
    its drain was ordered, which is after `start` unless the instance was draining then."""
    launches = sum(start_s <= life.launched_s < end_s for life in result.instances)
    exits = sum(start_s <= life.exited_s < end_s for life in result.instances)
    window = list(samples_between(result, start_s, end_s))
    if not window:
        return launches + exits
    return launches + exits + window[-1].gauges.draining - window[0].gauges.draining


def misses_between(result: RunResult, windows: Iterable[tuple[float, float]]) -> tuple[int, int]:
    """Interactive requests that arrived in any of the windows: how many missed their SLO, and all."""
    stream = result.workload.interactive
    assert stream is not None
    arrivals = np.asarray(stream.trace.arrival_s)
    inside = np.zeros(len(arrivals), dtype=bool)
    for start_s, end_s in windows:
        inside |= (start_s <= arrivals) & (arrivals < end_s)
    missed = ~attained_rows(result, stream)
    return int(np.count_nonzero(missed & inside)), int(np.count_nonzero(inside))


def batch_ends(result: RunResult) -> tuple[float, float]:
    """When the last batch request was complete, and the last time a batch instance was there."""
    stream = result.workload.batch
    assert stream is not None
    last = np.asarray(result.requests.last_token_s)[stream.first_id : stream.first_id + len(stream.trace)]
    present = [sample.time_s for sample in result.samples if sample.gauges.batch]
    return float(np.nanmax(last)), max(present, default=0.0)

"""`chiron simulate`: replay traces against simulated engines under one or several policies."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from .console import note
from .exits import CommandError
from .option_tables import with_options
from .run_outputs import STDOUT, check_outputs, input_errors, output_errors, write_text
from .simulation_options import (
    DEFAULT_PROFILE,
    FLEET_OPTIONS,
    SLO_OPTIONS,
    WORKLOAD_OPTIONS,
    WORLD_OPTIONS,
    check_traces_given,
    class_slos,
    world_settings,
)

if TYPE_CHECKING:
    from .simulation import PolicyRun


@with_options("world", WORLD_OPTIONS, "World")
@with_options("fleet", FLEET_OPTIONS, "Fleet")
@with_options("slo", SLO_OPTIONS, "Service level objectives")
@with_options("workload", WORKLOAD_OPTIONS, "Workload")
def simulate(
    workload: dict[str, Any],
    slo: dict[str, Any],
    fleet: dict[str, Any],
    world: dict[str, Any],
    profile: Annotated[
        str, Option(metavar="GPU/MODEL/tpN/precision", help="Step times and capacity of an instance.")
    ] = DEFAULT_PROFILE,
    policy: Annotated[
        str, Option(metavar="NAME[,NAME...]", help="Several are compared on the same workload.")
    ] = "chiron",
    json_file: Annotated[
        str | None, Option("--json", metavar="FILE", help="Where JSON goes; - is standard output.")
    ] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Figure over time: .png, .svg or .pdf.")] = None,
    bound: Annotated[bool, Option("--bound/--no-bound", help="Compute the least GPU-hours possible.")] = True,
    listing: Annotated[
        bool, Option("--list", help="List profiles, traces, policies and local autoscalers; run nothing.")
    ] = False,
) -> None:
    """Replay an interactive and a batch trace against simulated engines, in virtual time.

    The engines' own scheduler and the fleet's own policy decide; only step times are modelled. The
    same seed gives the same JSON, but for wall_s. A table goes to standard output, or to standard
    error with --json -.
    """
    if listing:
        with input_errors():
            check_outputs(json_file, None)
        _list_names(json_file)
        return
    with input_errors():
        check_outputs(json_file, plot)
    names = [name.strip() for name in policy.split(",")]
    runs, lines = _run(workload, slo, fleet, world, profile, names, bound)
    _write(json_file, runs)
    if plot is not None:
        _plot(plot, runs, lines)
    _print(runs, lines, json_file)


def _run(
    workload: dict[str, Any],
    slo: dict[str, Any],
    fleet: dict[str, Any],
    world: dict[str, Any],
    profile_name: str,
    policy_names: Sequence[str],
    bound: bool,
) -> tuple[list[PolicyRun], list[str]]:
    """The runs, and lines on what was run."""
    from chiron_engine.sim.feasibility import batch_1_step_s, check_feasible, check_length
    from chiron_engine.sim.profiles import load_profile
    from chiron_engine.sim.watchdog import Stuck
    from chiron_engine.sim.workload import capped_outputs

    from . import simulation

    with input_errors():
        check_traces_given(workload, slo)
        profile = load_profile(profile_name)
        settings = world_settings(fleet, world)
        simulation.check_policies(policy_names, fleet["local_autoscaler"], profile, settings)
        slos = class_slos(slo, batch_1_step_s(profile))
        seed = workload["seed"]
        asked = simulation.load_workload(
            workload["interactive"], workload["batch"], slos, seed, workload["duration"]
        )
        check_length(asked, settings)
        if settings.max_output_tokens is not None:
            asked = capped_outputs(asked, settings.max_output_tokens)
        for remark in check_feasible(asked, profile, settings.max_gpus, settings.block_size):
            note(f"chiron: {remark}")
        scaled = simulation.scale_workload(asked, profile, workload["load"], workload["batch_load"], seed)
    try:
        runs = simulation.run_policies(
            scaled,
            profile_name,
            policy_names,
            settings,
            seed,
            local_autoscaler=fleet["local_autoscaler"],
            bound=bound,
            load=workload["load"],
            batch_load=workload["batch_load"],
        )
    except Stuck as error:
        raise CommandError(str(error)) from error
    return runs, simulation.describe(scaled, profile_name, runs[0].summary)


def _list_names(json_file: str | None) -> None:
    from chiron_engine.policy.iteration.local_autoscaler import LOCAL_AUTOSCALERS
    from chiron_engine.sim.profiles import profile_names
    from chiron_engine.sim.traces.generate import KINDS
    from chiron_engine.sim.traces.packaged import trace_names

    from .simulation import POLICY_NAMES

    names = {
        "profiles": profile_names(),
        "traces": [*trace_names(), *(f"{kind}:..." for kind in KINDS)],
        "policies": list(POLICY_NAMES),
        "local_autoscalers": sorted(LOCAL_AUTOSCALERS),
    }
    if json_file is not None:
        write_text(json_file, json.dumps(names, indent=1))
        return
    for title, entries in names.items():
        print(title.replace("_", " "))
        print("".join(f"  {entry}\n" for entry in entries))


def _write(json_file: str | None, runs: Sequence[PolicyRun]) -> None:
    """One object, or a list of them where several policies ran."""
    if json_file is None:
        return
    summaries = [run.summary for run in runs]
    content = summaries if len(summaries) > 1 else summaries[0]
    write_text(json_file, json.dumps(content, indent=1, allow_nan=False))


def _plot(path: Path, runs: Sequence[PolicyRun], lines: Sequence[str]) -> None:
    from chiron_engine.sim.plot import PlottedRun, plot_runs

    plotted = [PlottedRun(run.summary["policy"], run.result.samples) for run in runs]
    try:
        plot_runs(plotted, path, subtitle="\n".join(lines))
    except OSError as error:
        raise CommandError(f"--plot: {path}: {error.strerror or error}") from error


def _print(runs: Sequence[PolicyRun], lines: Sequence[str], json_file: str | None) -> None:
    from chiron_engine.sim.report import print_table

    file = sys.stderr if json_file == STDOUT else sys.stdout
    if file is None:  # closed by whoever started the command
        return
    with output_errors():
        print(*lines, sep="\n", file=file)
        print_table([run.summary for run in runs], file)
        file.flush()

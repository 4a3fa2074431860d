#!/usr/bin/env python3
"""Measure the fleet policy in the simulator: one command for each measure, with its target.

    PYTHONPATH=.:kernels .venv/bin/python scripts/evaluate_policies.py mixed --scale 0.1 --json out.json

Every measure prints a table, one line for each target with what was seen, and, with --json, the
same as JSON. --scale shrinks the load (in instances), never the time. Exits with 0 whether targets are
met or not, and with 2 for what cannot be measured as asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from chiron_engine.commands.exits import ExitCode
from chiron_engine.sim.plot import check_plot_path
from scripts.policy_measures import batch_job, burst, mixed, speed, steady, step
from scripts.policy_measures.measure import Measured, Options

MEASURES = {
    "steady": steady.measure,
    "step": step.measure,
    "burst": burst.measure,
    "batch-job": batch_job.measure,
    "mixed": mixed.measure,
    "speed": speed.measure,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--scale", type=float, default=1.0, help="of the load, 1 is the measure as stated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="h100/llama-3.1-8b/tp1/bf16")
    parser.add_argument("--policy", default=None, metavar="NAME[,NAME...]", help="in place of the usual ones")
    parser.add_argument("--load-time", type=float, default=45.0, help="seconds (45)")
    parser.add_argument("--itl-slo", action="append", metavar="MS|Nx", help="mixed: one or several")
    parser.add_argument("--json", metavar="FILE", help="- is standard output; the table then goes to stderr")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="figure of the last workload")
    arguments = parser.parse_args()
    if not 0 < arguments.scale <= 100:
        parser.error(f"--scale is {arguments.scale}; it must be over 0 and at most 100")
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}; it must not be negative")
    if arguments.itl_slo and arguments.measure != "mixed":
        parser.error(f"--itl-slo is for mixed; {arguments.measure} has an ITL SLO of its own")
    if arguments.json not in (None, "-") and not Path(arguments.json).absolute().parent.is_dir():
        parser.error(f"--json: the folder of {arguments.json!r} does not exist")
    if arguments.plot is not None:
        try:
            check_plot_path(arguments.plot)
        except ValueError as error:
            parser.error(f"--plot: {error}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    options = Options(
        scale=arguments.scale,
        seed=arguments.seed,
        profile=arguments.profile,
        policies=tuple(arguments.policy.split(",")) if arguments.policy else (),
        load_time_s=arguments.load_time,
        itl_slos=tuple(arguments.itl_slo or ()),
        plot=arguments.plot,
    )
    try:
        measured = MEASURES[arguments.measure](options)
    except ValueError as error:
        # Profiles, policies, times and objectives are looked at before a run starts.
        print(f"evaluate_policies: {error}", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    report(arguments.measure, options, measured, arguments.json)


def report(name: str, options: Options, measured: Measured, json_file: str | None) -> None:
    out = sys.stderr if json_file == "-" else sys.stdout
    measured.print(name, options, out)
    text = json.dumps(measured.as_json(name, options), indent=1)
    if json_file == "-":
        print(text)
    elif json_file:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measure both loops in real processes: one command for each measure, with its target.

    PYTHONPATH=.:kernels .venv/bin/python scripts/measure_loops.py relay --json out.json

Every measure prints a table, the load of the machine while it ran, and one line for each target with what
was seen; with --json, the same as JSON. --scale shortens a measure. Exits with 0 whether targets are
met or not, and with 2 for what cannot be measured as asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from chiron_engine.commands.exits import ExitCode
from scripts.loop_measures import eviction, fleet50, local, relay, simulator
from scripts.loop_measures.measured import Options

MEASURES = {
    "local": local.measure,
    "eviction": eviction.measure,
    "relay": relay.measure,
    "fleet50": fleet50.measure,
    "simulator": simulator.measure,
}
WITH_MODEL = ("local", "eviction")
WITH_GATEWAYS = ("relay", "fleet50")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--scale", type=float, default=1.0, help="of times and counts, 1 is as stated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="local, eviction: the model on the CPU (smollm2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of that model (float32)")
    parser.add_argument("--gateways", type=int, help="relay, fleet50: processes that answer clients (1)")
    parser.add_argument("--json", metavar="FILE", help="- is standard output; the table then goes to stderr")
    arguments = parser.parse_args()
    if not 0 < arguments.scale <= 10:
        parser.error(f"--scale is {arguments.scale}; it must be over 0 and at most 10")
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}; it must not be negative")
    if arguments.measure not in WITH_MODEL and (arguments.model or arguments.dtype):
        parser.error(f"--model and --dtype are for {' and '.join(WITH_MODEL)}; {arguments.measure} has none")
    if arguments.measure not in WITH_GATEWAYS and arguments.gateways is not None:
        parser.error(f"--gateways is for {' and '.join(WITH_GATEWAYS)}")
    if arguments.gateways is not None and arguments.gateways < 1:
        parser.error(f"--gateways is {arguments.gateways}; it must be at least 1")
    if arguments.json not in (None, "-") and not Path(arguments.json).absolute().parent.is_dir():
        parser.error(f"--json: the folder of {arguments.json!r} does not exist")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    options = Options(
        scale=arguments.scale,
        seed=arguments.seed,
        model=arguments.model or "smollm2",
        dtype=arguments.dtype or "float32",
        gateways=arguments.gateways or 1,
    )
    try:
        measured = MEASURES[arguments.measure](options)
    except ValueError as error:
        print(f"measure_loops: {error}", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    measured.stop_watch()
    measured.print(arguments.measure, options, sys.stderr if arguments.json == "-" else sys.stdout)
    text = json.dumps(measured.as_json(arguments.measure, options), indent=1)
    if arguments.json == "-":
        print(text)
    elif arguments.json:
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

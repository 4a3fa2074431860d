"""The options of commands that run a fleet: `chiron serve` and `chiron coordinator`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from chiron_engine.policy.fleet.autoscalers import GLOBAL_AUTOSCALERS
from chiron_engine.policy.fleet.config import ADMISSIONS, FleetConfig

from .durations import parse_duration
from .exits import usage_errors
from .option_tables import TableOption, choice, with_options

DEFAULTS = FleetConfig()


def _targets(text: str) -> tuple[float, ...]:
    """`20ms,200ms` as seconds, the tightest first."""
    try:
        return tuple(sorted({parse_duration(part, "ms") for part in text.split(",")}))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _milliseconds(text: str) -> float:
    try:
        return parse_duration(text, "ms")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


FLEET_OPTIONS = {
    "policy": TableOption(
        "--policy",
        str,
        "chiron",
        {"help": "What scales the fleet.", "metavar": "|".join(GLOBAL_AUTOSCALERS)},
    ),
    "max_engines": TableOption(
        "--max-engines",
        int | None,
        None,
        {"help": "Engines there may be (all GPUs; on the CPU as many as at the start).", "min": 1},
    ),
    "min_engines": TableOption(
        "--min-engines",
        int,
        DEFAULTS.min_instances,
        {"help": "Engines kept for interactive requests at any load.", "min": 1},
    ),
    "itl_targets_s": TableOption(
        "--itl-slo",
        Any,
        "200ms",
        {
            "help": "ITL targets on offer to interactive requests; 20ms,200ms offers two.",
            "parser": _targets,
            "metavar": "TIME[,TIME]",
        },
    ),
    "batch_itl_s": TableOption(
        "--batch-itl-slo",
        Any,
        "2s",
        {"help": "ITL target that batch work is sized by.", "parser": _milliseconds, "metavar": "TIME"},
    ),
    "tick_s": TableOption(
        "--tick",
        Any,
        "1s",
        {"help": "Time between two looks at the fleet.", "parser": _seconds, "metavar": "TIME"},
    ),
    "admission": TableOption(
        "--admission",
        str,
        DEFAULTS.admission,
        {
            "help": "Interactive requests that find no room in time: run late, or refused with a retry hint.",
            **choice(ADMISSIONS),
        },
    ),
    "event_log": TableOption(
        "--event-log",
        Path | None,
        None,
        {"help": "Write every event and decision here, for `chiron replay`.", "dir_okay": False},
    ),
    "state_dir": TableOption(
        "--state-dir",
        Path | None,
        None,
        {
            "help": "Keep batches here (~/.local/state/chiron/MODEL-PORT; none outlives a port of 0).",
            "file_okay": False,
        },
    ),
    "gateways": TableOption(
        "--gateways",
        int,
        1,
        {
            "help": "Processes that answer clients, on one port; 1: the coordinator's own. One relays some "
            "10,000 tokens a second.",
            "min": 1,
            "max": 256,
        },
    ),
    "coordinator_port": TableOption(
        "--coordinator-port",
        int | None,
        None,
        {
            "help": "With --gateways: where engines and gateways reach the coordinator (--grpc-port + 1).",
            "min": 0,
            "max": 65535,
        },
    ),
    "metrics_port": TableOption(
        "--metrics-port",
        int | None,
        None,
        {"help": "Serve Prometheus metrics here (0: any free port; off).", "min": 0, "max": 65535},
    ),
}

with_fleet_options = with_options("fleet", FLEET_OPTIONS, "Fleet")


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """initial_engines: launched at the start. state_dir: where batches are kept; None for the default.
    gateways: processes that answer clients; where it is over 1, the coordinator has a port of its own,
    `coordinator_port`."""

    config: FleetConfig
    policy: str
    initial_engines: int
    event_log: Path | None
    state_dir: Path | None
    metrics_port: int | None = None
    gateways: int = 1
    coordinator_port: int | None = None


def fleet_options(fleet: Mapping[str, Any], initial_engines: int, most_engines: int) -> FleetOptions:
    """most_engines: where --max-engines is not given. Raises CommandError (usage)."""
    with usage_errors():
        if fleet["coordinator_port"] is not None and fleet["gateways"] == 1:
            raise ValueError("--coordinator-port is for --gateways over 1; else --grpc-port is that port")
        config = FleetConfig(
            max_gpus=fleet["max_engines"] or most_engines,
            min_instances=fleet["min_engines"],
            tick_s=fleet["tick_s"],
            itl_targets_s=fleet["itl_targets_s"],
            batch_itl_s=fleet["batch_itl_s"],
            admission=fleet["admission"],
        )
        if not config.min_instances <= config.max_gpus or initial_engines > config.max_gpus:
            raise ValueError(
                f"--engines is {initial_engines} and --min-engines {config.min_instances}; at most "
                f"{config.max_gpus} engines may run (--max-engines)"
            )
        return FleetOptions(
            config,
            fleet["policy"],
            initial_engines,
            fleet["event_log"],
            fleet["state_dir"],
            fleet["metrics_port"],
            fleet["gateways"],
            fleet["coordinator_port"],
        )

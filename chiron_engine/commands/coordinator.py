"""`chiron coordinator`: coordinator and gateway here, engines that join from any machine."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer
from typer import Option

from .engine_options import engine_config, with_engine_options, with_executor_options
from .exits import usage_error
from .fleet_options import fleet_options, with_fleet_options
from .local_engines import gpus_of, local_engines
from .logs import set_up_logging
from .serve import check_port
from .server_options import gateway_config, with_server_options


@with_engine_options
@with_executor_options
@with_fleet_options
@with_server_options
def coordinator(
    engine: dict[str, Any],
    executor_options: dict[str, Any],
    fleet: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for the engines: its tokenizer is read here.")
    ],
    engines: Annotated[int, Option(min=0, max=256, help="Engine processes to start on this machine.")] = 0,
) -> None:
    """Serve a model on engines that join from any machine: `chiron engine MODEL --join HOST:PORT`.

    Without --engines the fleet is what has joined; none is started or ended for the load. Engines of
    other machines need --host: an address they reach. Prints a request to copy once one is ready.
    """
    config = engine_config(model, {**engine, **executor_options})
    if engines == 0 and fleet["max_engines"] is not None:
        raise usage_error("--max-engines bounds what is started here: add --engines, or leave it out")
    if engines == 0 and fleet["policy"].startswith("static:"):
        raise usage_error("--policy static:N counts what is started here: add --engines, or leave it out")
    gpus = gpus_of(config) if engines else []
    options = fleet_options(fleet, engines, len(gpus) or max(1, engines))
    most = options.config.max_gpus
    listen = gateway_config(server, config.max_queued_requests * most)
    set_up_logging(server["log_level"])
    here = local_engines(config, most, gpus, server["log_level"]) if engines else None
    check_port(listen)
    from .fleet_service import FleetService

    sys.exit(asyncio.run(FleetService(listen, config, options, here, server["log_level"]).run()))

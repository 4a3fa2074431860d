"""`chiron serve`: coordinator and gateway in this process, engines in processes of their own."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer
from typer import Option

from chiron_engine.config import GatewayConfig

from .engine_options import engine_config, with_engine_options, with_executor_options
from .exits import port_errors
from .fleet_options import fleet_options, with_fleet_options
from .local_engines import gpus_of, local_engines
from .logs import set_up_logging
from .server_options import gateway_config, with_server_options


@with_engine_options
@with_executor_options
@with_fleet_options
@with_server_options
def serve(
    engine: dict[str, Any],
    executor_options: dict[str, Any],
    fleet: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or id, a .gguf file, or smollm2.")
    ],
    engines: Annotated[int, Option(min=1, max=256, help="Engine processes to start with.")] = 1,
) -> None:
    """Serve a model: a coordinator, a gateway, and engines on this machine, as many as the load asks
    for. Prints a request to copy when ready.

    SIGTERM drains and stops; Ctrl-C too; a second signal stops at once.
    """
    config = engine_config(model, {**engine, **executor_options})
    gpus = gpus_of(config)
    options = fleet_options(fleet, engines, len(gpus) or engines)
    most = options.config.max_gpus
    listen = gateway_config(server, config.max_queued_requests * most)
    set_up_logging(server["log_level"])
    engines_here = local_engines(config, most, gpus, server["log_level"])
    check_port(listen)
    from .fleet_service import FleetService

    sys.exit(asyncio.run(FleetService(listen, config, options, engines_here, server["log_level"]).run()))


def check_port(listen: GatewayConfig) -> None:
    """Before anything is started: a port in use should show in a second, not after a load."""
    from chiron_engine.rpc.port import check_free

    with port_errors():
        check_free(listen.host, listen.grpc_port)

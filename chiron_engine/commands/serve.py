"""`chiron serve`: coordinator and gateway in this process, engines in processes of their own."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Annotated, Any

import typer
from typer import Option

from chiron_engine.config import EngineConfig, GatewayConfig

from .engine_options import engine_config, to_arguments, with_engine_options, with_executor_options
from .exits import port_errors, usage_error
from .fleet_options import fleet_options, with_fleet_options
from .logs import set_up_logging
from .server_options import gateway_config, with_server_options

QUEUED_REQUESTS = 1 << 20
QUEUED_TOKENS = 1 << 40


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
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or id, or smollm2.")
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
    if most > 1 and config.step_log is not None:
        raise usage_error("--step-log is for one engine; several would write into the same file")
    if gpus and len(gpus) < most:
        raise usage_error(f"{most} engines take a GPU each and there are {len(gpus)}; or add --device cpu")
    _check_port(listen)
    from chiron_engine.cluster.local_launcher import threads_per_engine

    from .fleet_service import FleetService

    threads = config.threads or threads_per_engine(most)
    command = engine_command(config, threads, server["log_level"])
    sys.exit(asyncio.run(FleetService(listen, config, options, command, threads, gpus).run()))


def _check_port(listen: GatewayConfig) -> None:
    """Before anything is started: a port in use should show in a second, not after a load."""
    from chiron_engine.rpc.port import check_free

    with port_errors():
        check_free(listen.host, listen.grpc_port)


def gpus_of(config: EngineConfig) -> list[str]:
    """The GPUs that engines of this configuration run on, one each; none where they run on the CPU."""
    from chiron_engine.cluster.gpus import usable_gpus

    if config.executor == "simulated" or config.device not in ("auto", "cuda"):
        return []
    return usable_gpus()


def engine_command(config: EngineConfig, threads: int, log_level: str) -> list[str]:
    """The command line of an engine of a fleet, which queues whatever it is sent: the gateway bounds
    what waits."""
    config = replace(config, max_queued_requests=QUEUED_REQUESTS, max_queued_tokens=QUEUED_TOKENS)
    if config.executor == "torch":
        config = replace(config, threads=threads)
    # -P: no module of the folder this was started in may take the place of a real one.
    launch = [sys.executable, "-P", "-m", "chiron_engine", "engine", "--headless", "--grpc-port", "0"]
    return [*launch, "--log-level", log_level, *to_arguments(config)]

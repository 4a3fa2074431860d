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
from .logs import set_up_logging
from .server_options import gateway_config, with_server_options


@with_engine_options
@with_executor_options
@with_server_options
def serve(
    engine: dict[str, Any],
    executor_options: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or id, or smollm2.")
    ],
    engines: Annotated[int, Option(min=1, max=256, help="Engine processes on this machine.")] = 1,
) -> None:
    """Serve a model: a gateway, and engines on this machine. Prints a request to copy when ready.

    SIGTERM drains and stops; Ctrl-C too; a second signal stops at once.
    """
    config = engine_config(model, {**engine, **executor_options})
    listen = gateway_config(server, config.max_queued_requests * engines)
    set_up_logging(server["log_level"])
    if engines > 1 and config.step_log is not None:
        raise usage_error("--step-log is for one engine; several would write into the same file")
    gpus = gpus_for(config, engines)
    _check_port(listen)
    from .serve_engines import Service

    service = Service(listen, engine_command(config, engines, server["log_level"]), engines, config, gpus)
    sys.exit(asyncio.run(service.run()))


def _check_port(listen: GatewayConfig) -> None:
    """Before anything is started: a port in use should show in a second, not after a load."""
    from chiron_engine.rpc.port import check_free

    with port_errors():
        check_free(listen.host, listen.grpc_port)


def gpus_for(config: EngineConfig, engines: int) -> list[str]:
    """One GPU for each engine; none where they run on the CPU. Raises CommandError (usage)."""
    from chiron_engine.cluster.gpus import usable_gpus

    if config.executor == "simulated" or config.device not in ("auto", "cuda"):
        return []
    gpus = usable_gpus()
    if gpus and len(gpus) < engines:
        raise usage_error(f"{engines} engines take a GPU each and there are {len(gpus)}; or add --device cpu")
    return gpus[:engines]


def engine_command(config: EngineConfig, engines: int, log_level: str) -> list[str]:
    """The command line of one of `engines` equal engines. They share the cores and, where none was
    given, each takes its share of memory as it finds it."""
    from chiron_engine.cluster.local_launcher import threads_per_engine

    if config.executor == "torch":
        config = replace(config, threads=config.threads or threads_per_engine(engines))
    # -P: no module of the folder this was started in may take the place of a real one.
    launch = [sys.executable, "-P", "-m", "chiron_engine", "engine", "--headless", "--grpc-port", "0"]
    return [*launch, "--log-level", log_level, *to_arguments(config)]

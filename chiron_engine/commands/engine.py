"""`chiron engine`: one engine, alone with a gateway beside it, or headless under a coordinator."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from chiron_engine.config import EngineConfig, GatewayConfig

from .console import LoadPhases, note
from .engine_address import fleet_addresses
from .engine_options import engine_config, with_engine_options, with_executor_options
from .example_request import example_request
from .exits import CommandError, load_errors, port_errors, usage_error
from .logs import set_up_logging
from .model_text import model_text, text_directory
from .server_options import gateway_config, reachable, with_server_options

if TYPE_CHECKING:
    from chiron_engine.serving.core_setup import LoadedModel
    from chiron_engine.serving.fleet_member import Join


@with_engine_options
@with_executor_options
@with_server_options
def engine(
    engine: dict[str, Any],
    executor_options: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or id, a .gguf file, or smollm2.")
    ],
    headless: Annotated[
        bool,
        Option("--headless", help="Only the Engine service; reports on standard output as JSON lines."),
    ] = False,
    join: Annotated[
        str | None,
        Option("--join", metavar="HOST:PORT", help="Join this coordinator's fleet; implies --headless."),
    ] = None,
    advertise_host: Annotated[
        str | None,
        Option("--advertise-host", help="Where the fleet's gateways reach this engine, with --join."),
    ] = None,
    orphan_timeout: Annotated[
        float,
        Option("--orphan-timeout", help="Seconds without its coordinator, then it drains and ends.", min=0.1),
    ] = 120.0,
    instance_id: Annotated[int | None, Option(hidden=True)] = None,
    parent_pid: Annotated[int | None, Option(hidden=True)] = None,
    outlives_parent: Annotated[bool, Option("--outlive-parent", hidden=True)] = False,
) -> None:
    """Run one engine: alone, answering clients through a gateway beside it, or in a fleet."""
    config = engine_config(model, {**engine, **executor_options})
    listen = gateway_config(server, config.max_queued_requests)
    set_up_logging(server["log_level"])
    if join is None:
        if advertise_host is not None:
            raise usage_error("--advertise-host is for engines in a fleet: --join HOST:PORT")
        sys.exit(_run_headless(config, listen, parent_pid) if headless else _run_alone(config, listen))
    from chiron_engine.serving.fleet_member import Join

    listen, advertised = fleet_addresses(listen, join, advertise_host)
    membership = Join(join, instance_id, advertised, orphan_timeout)
    sys.exit(_run_headless(config, listen, parent_pid, membership, outlives_parent=outlives_parent))


def _run_alone(config: EngineConfig, listen: GatewayConfig) -> int:
    from chiron_engine.gateway.engine_pool import EnginePool
    from chiron_engine.gateway.server import Gateway
    from chiron_engine.rpc.port import check_free

    with port_errors():
        check_free(listen.host, listen.grpc_port)
    phases = LoadPhases()
    with load_errors():
        # The gateway answers, with "loading", before the weights are there; it needs the tokenizer.
        text = model_text(text_directory(config, phases))

    def announce(port: int, loaded: LoadedModel) -> None:
        phases.done()
        note(f"serving {loaded.name} on {reachable(listen.host, port)}; try:")
        print(example_request(reachable(listen.host, port), text), flush=True)

    def gateway(address: str) -> Gateway:
        name = config.served_model_name or config.model
        return Gateway(text, name, EnginePool([address]), listen.max_queued_requests, config.seed)

    from .engine_runner import EngineRunner

    return asyncio.run(EngineRunner(config, listen, phases).run(announce, gateway))


def _run_headless(
    config: EngineConfig,
    listen: GatewayConfig,
    parent_pid: int | None,
    join: Join | None = None,
    *,
    outlives_parent: bool = False,
) -> int:
    """A failure is a report too: the parent tells its cause. outlives_parent: from when a coordinator
    knows the engine; one that still loads ends with its parent in any case."""
    from chiron_engine.cluster.engine_report import EngineFailed, EngineReady, LoadPhase
    from chiron_engine.cluster.parent_death import die_with_parent, outlive_parent

    from .engine_runner import EngineRunner
    from .report_channel import ReportChannel

    if parent_pid is not None:
        die_with_parent(parent_pid)
    channel = ReportChannel()

    def announce(port: int, loaded: LoadedModel) -> None:
        channel.send(
            EngineReady(
                reachable(listen.host, port), os.getpid(), "" if loaded.path is None else str(loaded.path)
            )
        )

    def progress(phase: str, fraction: float) -> None:
        channel.send(LoadPhase(phase, fraction))

    try:
        runner = EngineRunner(config, listen, progress, join)
        on_joined = outlive_parent if outlives_parent else lambda: None
        return asyncio.run(runner.run(announce, on_joined=on_joined))
    except CommandError as error:
        channel.send(EngineFailed(error.code, error.message))
        return error.code

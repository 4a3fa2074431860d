"""`chiron engine`: one engine, alone with a gateway beside it, or headless under a coordinator."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from chiron_engine.config import EngineConfig, GatewayConfig

from .console import LoadPhases, note
from .engine_options import engine_config, with_engine_options
from .example_request import example_request
from .exits import CommandError, load_errors, port_errors, stop_code
from .logs import set_up_logging
from .report_channel import ReportChannel
from .server_options import gateway_config, reachable, with_server_options

if TYPE_CHECKING:
    from chiron_engine.serving.core_setup import LoadedModel, Progress
    from chiron_engine.serving.engine_process import LoadedEngine


@with_engine_options
@with_server_options
def engine(
    engine: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or id, or smollm2.")
    ],
    headless: Annotated[
        bool,
        Option("--headless", help="Only the Engine service; reports on standard output as JSON lines."),
    ] = False,
    parent_pid: Annotated[int | None, Option(hidden=True)] = None,
) -> None:
    """Run one engine. Without --headless it answers clients itself, through a gateway beside it."""
    config = engine_config(model, engine)
    listen = gateway_config(server, config.max_queued_requests)
    set_up_logging(server["log_level"])
    if headless:
        sys.exit(_run_headless(config, listen, parent_pid))
    sys.exit(asyncio.run(_serve_alone(config, listen)))


async def _serve_alone(config: EngineConfig, listen: GatewayConfig) -> int:
    from chiron_engine.gateway.server import Gateway
    from chiron_engine.gateway.text import ModelText
    from chiron_engine.model.source import resolve_model
    from chiron_engine.rpc.port import check_free

    with port_errors():
        check_free(listen.host, listen.grpc_port)
    phases = LoadPhases()
    with load_errors():
        # The gateway answers, with "loading", before the weights are there; it needs the tokenizer.
        path = resolve_model(config.model, phases)
        text = ModelText.from_directory(path)

    def announce(port: int) -> None:
        phases.done()
        note(f"ready on {reachable(listen.host, port)}")
        print(example_request(reachable(listen.host, port), text.has_chat_template), flush=True)

    name = config.served_model_name or config.model
    return await _run(
        config,
        listen,
        phases,
        companion=lambda address: Gateway(text, name, [address], listen.max_queued_requests),
        on_ready=announce,
    )


def _run_headless(config: EngineConfig, listen: GatewayConfig, parent_pid: int | None) -> int:
    """A failure is a report too: the parent tells its cause."""
    from chiron_engine.cluster.engine_report import EngineFailed, EngineReady, LoadPhase
    from chiron_engine.cluster.parent_death import die_with_parent

    if parent_pid is not None:
        die_with_parent(parent_pid)
    channel = ReportChannel()
    loaded: list[LoadedModel] = []

    def announce(port: int) -> None:
        channel.send(EngineReady(reachable(listen.host, port), os.getpid(), str(loaded[0].path)))

    def progress(phase: str, fraction: float) -> None:
        channel.send(LoadPhase(phase, fraction))

    try:
        return asyncio.run(_run(config, listen, progress, on_ready=announce, on_loaded=loaded.append))
    except CommandError as error:
        channel.send(EngineFailed(error.code, error.message))
        return error.code


async def _run(
    config: EngineConfig,
    listen: GatewayConfig,
    progress: Progress,
    *,
    companion: Any = None,
    on_ready: Any,
    on_loaded: Any = lambda loaded: None,
) -> int:
    from chiron_engine.model.source import resolve_model
    from chiron_engine.rpc.shutdown import Shutdown
    from chiron_engine.serving.core_setup import load_core
    from chiron_engine.serving.engine_process import EngineFailed, LoadedEngine, run_engine
    from chiron_engine.serving.engine_service import EngineDescription

    shutdown = Shutdown(listen.drain_timeout_s)
    shutdown.install()
    with ExitStack() as resources:

        def load(report_phase: Any) -> LoadedEngine:
            def report(phase: str, fraction: float) -> None:
                report_phase(phase)
                progress(phase, fraction)

            with load_errors():
                resolve_model(config.model, report)  # says what is wrong before torch is imported
                loaded = load_core(config, resources, report)
            on_loaded(loaded)
            description = EngineDescription(
                loaded.name, loaded.architecture, loaded.dtype, loaded.eos_token_ids
            )
            return LoadedEngine(loaded.core, description)

        try:
            with port_errors():
                await run_engine(
                    load,
                    host=listen.host,
                    port=listen.grpc_port,
                    seed=config.seed,
                    reflection=listen.reflection,
                    max_message_bytes=listen.max_message_bytes,
                    shutdown=shutdown,
                    companion=companion,
                    on_ready=on_ready,
                )
        except EngineFailed as error:
            raise CommandError(str(error)) from error
    return stop_code(shutdown.signal)

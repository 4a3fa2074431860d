"""`chiron gateway`: answers clients in a process of its own, routed by a coordinator elsewhere."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from chiron_engine.config import EngineConfig, GatewayConfig

from .console import note
from .engine_address import route_address
from .engine_options import engine_config, with_engine_options, with_executor_options
from .example_request import example_request
from .exits import CommandError, ExitCode, load_errors, port_errors, stop_code
from .logs import set_up_logging
from .model_text import engine_model_name, model_text, text_directory
from .server_options import gateway_config, reachable, with_server_options
from .steady_heap import freeze_heap

if TYPE_CHECKING:
    from chiron_engine.gateway.text import ModelText

SEEDS_APART = 1 << 32
PASSED_ON = ("chiron.v1.Batch", "chiron.v1.Coordinator")


@with_engine_options
@with_executor_options
@with_server_options
def gateway(
    engine: dict[str, Any],
    executor_options: dict[str, Any],
    server: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for the engines: its tokenizer is read here.")
    ],
    coordinator: Annotated[
        str, Option("--coordinator", metavar="HOST:PORT", help="Who routes, and runs batches.")
    ],
    shared_port: Annotated[bool, Option("--shared-port", hidden=True)] = False,
    index: Annotated[int, Option(hidden=True)] = 0,
    parent_pid: Annotated[int | None, Option(hidden=True)] = None,
) -> None:
    """Answer clients beside the coordinator's own gateway: tokens come from the engines directly.

    Any number may run, on any machine that reaches the coordinator and its engines. While the coordinator
    is away, streams go on and new requests are refused. Batches are passed on to it.
    """
    config = engine_config(model, {**engine, **executor_options})
    # Or all would draw the same seeds, one after another, for requests that bring none.
    config = replace(config, seed=config.seed + index * SEEDS_APART)
    listen = gateway_config(server, config.max_queued_requests)
    set_up_logging(server["log_level"])
    route_address(coordinator, "--coordinator")
    if parent_pid is not None:
        from chiron_engine.cluster.parent_death import die_with_parent

        die_with_parent(parent_pid)
    service = _GatewayService(config, listen, coordinator, shared_port, parent_pid is not None)
    sys.exit(asyncio.run(service.run()))


class _GatewayService:
    def __init__(
        self, config: EngineConfig, listen: GatewayConfig, coordinator: str, shares_port: bool, is_child: bool
    ) -> None:
        """is_child: of a coordinator that started it, and waits for a word when it is ready."""
        self._config = config
        self._listen = listen
        self._coordinator = coordinator
        self._shares_port = shares_port
        self._is_child = is_child

    async def run(self) -> int:
        """Until a signal, or until the coordinator refuses it. Raises CommandError."""
        from chiron_engine.gateway.fleet_router import FleetRouter
        from chiron_engine.gateway.server import Gateway, open_server, serve_gateway
        from chiron_engine.rpc.pass_through import PassThrough
        from chiron_engine.rpc.shutdown import Shutdown

        config, listen = self._config, self._listen
        shutdown = Shutdown(listen.drain_timeout_s)
        shutdown.install()
        with load_errors():
            directory = text_directory(config)
            text = model_text(directory)
        with port_errors():
            server, port = open_server(listen, shares_port=self._shares_port)
        router = FleetRouter(self._coordinator, engine_model_name(config, directory))
        name = config.served_model_name or config.model
        gateway = Gateway(text, name, router, listen.max_queued_requests, config.seed)
        passed_on = PassThrough(self._coordinator, PASSED_ON, max_message_bytes=listen.max_message_bytes)
        server.add_generic_rpc_handlers((passed_on,))
        serving = asyncio.create_task(
            serve_gateway(
                listen,
                gateway,
                server,
                shutdown=shutdown,
                more_services=PASSED_ON,
                on_ready=lambda: self._announce(port, text),
            )
        )
        either: set[asyncio.Future[Any]] = {serving, router.line.refused}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if router.line.refused.done():
            shutdown.request()
        await serving
        await passed_on.close()
        if router.line.refused.done():
            reason = router.line.refused.result()
            raise CommandError(f"the coordinator refused this gateway: {reason}", ExitCode.RUNTIME)
        return stop_code(shutdown.signal)

    def _announce(self, port: int, text: ModelText) -> None:
        freeze_heap()
        if self._is_child:
            from chiron_engine.cluster.gateway_processes import READY

            print(READY, flush=True)
            return
        address = reachable(self._listen.host, port)
        note(f"serving {self._config.model} on {address}; try:")
        print(example_request(address, text), flush=True)

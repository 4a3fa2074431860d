"""What `chiron serve` runs: a coordinator and a gateway in this process, engines in their own."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiron_engine.cluster.batch_service import BATCH_SERVICE
from chiron_engine.cluster.coordinator import Coordinator
from chiron_engine.cluster.coordinator_service import CoordinatorService
from chiron_engine.cluster.engine_records import EngineRecords, can_outlive
from chiron_engine.cluster.engine_report import LoadPhase
from chiron_engine.cluster.engines import LaunchError
from chiron_engine.cluster.event_log import EventLog
from chiron_engine.cluster.local_launcher import LocalLauncher
from chiron_engine.cluster.routing_service import RoutingService
from chiron_engine.config import EngineConfig, GatewayConfig
from chiron_engine.gateway.server import Gateway, open_server, serve_gateway
from chiron_engine.rpc.port import check_free
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc, routing_pb2_grpc

from .console import LoadPhases, note
from .engine_address import EVERY_ADDRESS
from .example_request import example_request
from .exits import CommandError, ExitCode, load_errors, port_errors, stop_code
from .fleet_batch import batch_service, state_directory
from .fleet_options import FleetOptions
from .local_engines import LocalEngines
from .model_text import engine_model_name, model_text, text_directory
from .server_options import reachable
from .shared_gateways import SharedGateways, coordinator_listen
from .steady_heap import freeze_heap

if TYPE_CHECKING:
    from chiron_engine.gateway.text import ModelText

log = logging.getLogger(__name__)

MOST_CPU_ENGINES = 256
"""What `chiron scale` may ask for where no GPUs bound it, as `--engines` may; --max-engines may be more."""
COORDINATOR_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name


class FleetService:
    """One gateway and the engines that the fleet policy asks for. `run` returns the exit code."""

    def __init__(
        self,
        listen: GatewayConfig,
        config: EngineConfig,
        fleet: FleetOptions,
        engines: LocalEngines | None,
        log_level: str = "info",
    ) -> None:
        """listen: where clients come. engines: what is started here; None where all of them come by
        themselves."""
        self._clients = listen
        self._listen = coordinator_listen(listen, fleet)
        self._config = config
        self._fleet = fleet
        self._engines = engines
        self._log_level = log_level
        self._phases: dict[int, LoadPhases] = {}

    async def run(self) -> int:
        """Until a signal. Raises CommandError where it cannot start."""
        shutdown = Shutdown(self._listen.drain_timeout_s)
        shutdown.install()
        with load_errors():
            directory = text_directory(self._config, self._phases_of(0))
            text = model_text(directory)
        with port_errors():
            server, port = open_server(self._listen)
        with ExitStack() as resources:
            state = state_directory(
                self._fleet.state_dir,
                self._config.model,
                self._clients.grpc_port or port,
                self._clients.grpc_port,
                resources,
            )
            launcher = None
            if self._engines is not None:
                launcher = self._launcher(self._engines, port, self._records(state))
            name = engine_model_name(self._config, directory)
            coordinator = self._coordinator(launcher, name, resources)
            coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorService(coordinator), server)
            routing_pb2_grpc.add_RoutingServicer_to_server(RoutingService(coordinator), server)
            self._serve_metrics(coordinator, resources)
            config = self._config
            gateway = Gateway(
                text,
                config.served_model_name or config.model,
                coordinator,
                self._listen.max_queued_requests,
                config.seed,
            )

            gateways = self._shared_gateways(port)

            def announce() -> None:
                freeze_heap()
                if gateways is None:
                    self._announce(port, text)

            async with batch_service(state, server, coordinator, gateway, text, shutdown):
                if launcher is not None:  # no other process has `state` now
                    await launcher.recover(self._fleet.config.max_gpus)
                if self._fleet.initial_engines == 0:
                    note(f"waiting for engines: chiron engine {config.model} --join {self._join_at(port)}")
                serving = asyncio.create_task(
                    serve_gateway(
                        self._listen,
                        gateway,
                        server,
                        shutdown=shutdown,
                        more_services=[COORDINATOR_SERVICE, BATCH_SERVICE],
                        on_ready=announce,
                        drain_first=lambda: _drain_other_gateways(coordinator, gateways),
                    )
                )
                if gateways is None:
                    await self._follow(serving, coordinator.roster.failed, shutdown)
                    return stop_code(shutdown.signal)
                gateways.start(lambda: self._announce(gateways.port, text))
                try:
                    await self._follow(serving, coordinator.roster.failed, shutdown, gateways.failed)
                finally:
                    await gateways.close()
        return stop_code(shutdown.signal)

    async def _follow(
        self,
        serving: asyncio.Task[None],
        no_engine: asyncio.Future[LaunchError],
        shutdown: Shutdown,
        no_gateway: asyncio.Future[str] | None = None,
    ) -> None:
        """Until it has ended; also where the first engine of all, or a gateway, cannot be had."""
        either: set[asyncio.Future[Any]] = {serving, no_engine}
        if no_gateway is not None:
            either.add(no_gateway)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            shutdown.request()
        await serving
        if no_engine.done():
            failed = no_engine.result()
            code = ExitCode(failed.code) if failed.code in set(ExitCode) else ExitCode.RUNTIME
            raise CommandError(f"engine 0: {failed}", code)
        if no_gateway is not None and no_gateway.done():
            raise CommandError(no_gateway.result())

    def _announce(self, port: int, text: ModelText) -> None:
        address = reachable(self._clients.host, port)
        note(f"serving {self._config.model} on {address}; try:")
        print(example_request(address, text), flush=True)

    def _shared_gateways(self, port: int) -> SharedGateways | None:
        """port: the coordinator's."""
        count = self._fleet.gateways
        if count == 1:
            return None
        coordinator = reachable(self._listen.host, port)
        with port_errors():
            return SharedGateways(self._config, self._clients, count, coordinator, self._log_level)

    def _records(self, state: Path) -> EngineRecords | None:
        """None where no coordinator can come back for the engines: its port would be another one."""
        if self._listen.grpc_port == 0 or not can_outlive():
            return None
        try:
            return EngineRecords(state)
        except OSError as error:
            raise CommandError(
                f"cannot use the state directory {state}: {error.strerror}; choose another one with "
                "--state-dir",
                ExitCode.USAGE,
            ) from error

    def _join_at(self, port: int) -> str:
        """Where engines of other machines join, as far as this one can tell."""
        host = self._listen.host
        return f"{socket.gethostname()}:{port}" if host in EVERY_ADDRESS else reachable(host, port)

    def _launcher(self, engines: LocalEngines, port: int, records: EngineRecords | None) -> LocalLauncher:
        return LocalLauncher(
            [*engines.command, "--join", reachable(self._listen.host, port)],
            threads=engines.threads,
            gpus=engines.gpus,
            on_phase=self._show_phase,
            on_log=lambda instance_id, line: note(f"[engine {instance_id}] {line}"),
            records=records,
        )

    def _coordinator(self, launcher: LocalLauncher | None, model: str, resources: ExitStack) -> Coordinator:
        event_log = None
        if self._fleet.event_log is not None:
            try:
                event_log = resources.enter_context(EventLog(self._fleet.event_log))
            except OSError as error:
                raise CommandError(
                    f"cannot write the event log {self._fleet.event_log}: {error.strerror}", ExitCode.USAGE
                ) from error
        return Coordinator(
            self._fleet.policy,
            self._fleet.config,
            launcher,
            initial_engines=self._fleet.initial_engines,
            event_log=event_log,
            model=model,
            most_devices=self._most_devices(),
        )

    def _most_devices(self) -> int | None:
        """None where engines join by themselves."""
        if self._engines is None:
            return None
        return len(self._engines.gpus) or max(MOST_CPU_ENGINES, self._fleet.config.max_gpus)

    def _serve_metrics(self, coordinator: Coordinator, resources: ExitStack) -> None:
        port, host = self._fleet.metrics_port, self._listen.host
        if port is None:
            return
        from chiron_engine.cluster.metrics import MetricsServer

        with port_errors():
            check_free(host, port)
        name = self._config.served_model_name or self._config.model
        metrics = MetricsServer(coordinator, name, host, port)
        resources.callback(metrics.close)
        note(f"metrics on http://{reachable(host, metrics.port)}/metrics")

    def _phases_of(self, instance_id: int) -> LoadPhases:
        live = self._fleet.config.max_gpus == 1
        return self._phases.setdefault(instance_id, LoadPhases(f"engine {instance_id}", live=live))

    def _show_phase(self, instance_id: int, phase: LoadPhase) -> None:
        self._phases_of(instance_id)(phase.phase, phase.fraction)


async def _drain_other_gateways(coordinator: Coordinator, started_here: SharedGateways | None) -> None:
    drains = [coordinator.drain_gateways()]
    if started_here is not None:
        drains.append(started_here.drain())
    await asyncio.gather(*drains)

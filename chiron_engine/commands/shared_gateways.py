"""The gateway processes of `chiron serve --gateways N`, on one port beside the coordinator's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace

from chiron_engine.cluster.gateway_processes import GatewayProcesses, reserve_port
from chiron_engine.config import EngineConfig, GatewayConfig
from chiron_engine.rpc.port import BindError, check_free

from .console import note
from .engine_options import to_arguments
from .exits import port_errors
from .fleet_options import FleetOptions

TELL_CLIENTS_S = 3.0


def coordinator_listen(listen: GatewayConfig, fleet: FleetOptions) -> GatewayConfig:
    """Where the coordinator listens, for clients that come to `listen`. Raises CommandError (usage)."""
    if fleet.gateways == 1:
        return listen
    port = fleet.coordinator_port
    if port is None:
        port = listen.grpc_port + 1 if listen.grpc_port else 0
    with port_errors():
        if port == listen.grpc_port != 0:
            raise BindError(f"--coordinator-port is {port}, where the gateways listen; choose another one")
        return replace(listen, grpc_port=port)


class SharedGateways:
    """port: where clients come. failed: set, with the cause, where one ends before it was ever ready."""

    def __init__(
        self,
        config: EngineConfig,
        listen: GatewayConfig,
        count: int,
        coordinator: str,
        log_level: str,
    ) -> None:
        """listen: for all of them; its bound of waiting requests is shared out. coordinator: its address.
        Raises BindError."""
        check_free(listen.host, listen.grpc_port)  # names the holder
        try:
            self._reserved = reserve_port(listen.host, listen.grpc_port)
        except OSError as error:
            raise BindError(f"cannot share port {listen.grpc_port}: {error.strerror}") from None
        self.port: int = self._reserved.getsockname()[1]
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        share = max(1, listen.max_queued_requests // count)
        self._processes = GatewayProcesses(
            _command(replace(config, max_queued_requests=share), listen, self.port, coordinator, log_level),
            count,
            lambda index, line: note(f"[gateway {index}] {line}"),
        )
        self._opening: asyncio.Task[None] | None = None

    def start(self, on_ready: Callable[[], None]) -> None:
        """on_ready: called once, when all of them serve."""
        self._processes.start()
        self._opening = asyncio.create_task(self._open(on_ready))

    async def drain(self) -> None:
        """Returns when their requests have ended, and they with them."""
        await self._processes.drain()

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        await self._processes.close()
        self._reserved.close()

    async def _open(self, on_ready: Callable[[], None]) -> None:
        try:
            await self._processes.wait_ready()
        except RuntimeError as error:
            self.failed.set_result(str(error))
        else:
            on_ready()


def drain_timeout_s(listen: GatewayConfig) -> float:
    """A little less than their parent's: once that is over, engines end and so do they, and clients are to
    hear of it before."""
    parent_s = listen.drain_timeout_s
    return max(parent_s / 2, parent_s - TELL_CLIENTS_S)


def _command(
    config: EngineConfig, listen: GatewayConfig, port: int, coordinator: str, log_level: str
) -> list[str]:
    # -P: no module of the folder this was started in may take the place of a real one.
    command = [sys.executable, "-P", "-m", "chiron_engine", "gateway", "--shared-port"]
    command += ["--coordinator", coordinator, "--host", listen.host, "--grpc-port", str(port)]
    command += ["--drain-timeout", str(drain_timeout_s(listen)), "--log-level", log_level]
    if listen.reflection:
        command.append("--grpc-reflection")
    return [*command, *to_arguments(config)]

"""The gateway: the Inference service and its links to engines, put together and run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc.aio

from chiron_engine.config import GatewayConfig
from chiron_engine.rpc.client import INFERENCE_SERVICE
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import Health, create_server, enable_reflection
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import inference_pb2, inference_pb2_grpc

from .engine_router import EngineRouter
from .inference_service import InferenceService
from .text import ModelText

log = logging.getLogger(__name__)

CLOSE_GRACE_S = 2.0


class Gateway:
    """A gateway to be put on any server: its own (`serve_gateway`) or an engine's.

    Its health is SERVING while an engine is ready and it does not drain.
    """

    services = (INFERENCE_SERVICE,)

    def __init__(
        self,
        text: ModelText,
        model_name: str,
        router: EngineRouter,
        max_queued_requests: int = 1024,
        seed: int = 0,
    ) -> None:
        """router: runs the requests. model_name: the name clients see. seed: where the seeds of requests
        that bring none start."""
        self._router = router
        self._service = InferenceService(text, model_name, router, max_queued_requests, seed)
        self._changed = asyncio.Event()
        self._draining = False
        self._health_task: asyncio.Task[None] | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(self._service, server)

    async def resolve(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
        """`InferenceService.resolve`."""
        return await self._service.resolve(request)

    def start(self, health: Health, services: Sequence[str] = services) -> None:
        """Connect to the engines; from now on `services` follow this gateway's readiness."""
        self._router.on_change(self._changed.set)
        self._health_task = asyncio.create_task(self._follow_health(health, services))
        self._router.start()

    @property
    def is_ready(self) -> bool:
        return not self._draining and self._router.num_ready > 0

    async def wait_ready(self) -> None:
        ready = asyncio.Event()
        self._router.on_change(ready.set)
        while not self.is_ready:
            await ready.wait()
            ready.clear()

    async def drain(self) -> None:
        """Refuse new requests; return when those here have ended."""
        self._draining = True
        self._changed.set()
        await self._service.drain()

    async def close(self) -> None:
        """Drop the links; engines abort what is left."""
        if self._health_task is not None:
            self._health_task.cancel()
        await self._router.close()
        self._service.close()

    async def _follow_health(self, health: Health, services: Sequence[str]) -> None:
        while True:
            self._changed.clear()
            await health.set_serving(self.is_ready, services)
            await self._changed.wait()


def open_server(config: GatewayConfig, *, shares_port: bool = False) -> tuple[grpc.aio.Server, int]:
    """A server bound to the configured port, not yet started, and the port it got. shares_port: with
    gateways of other processes. Raises PortInUse or BindError."""
    server = create_server(config.max_message_bytes, shares_port=shares_port)
    return server, bind(server, config.host, config.grpc_port, shares_port=shares_port)


async def serve_gateway(
    config: GatewayConfig,
    gateway: Gateway,
    server: grpc.aio.Server,
    *,
    shutdown: Shutdown,
    more_services: Sequence[str] = (),
    on_ready: Callable[[], None] = lambda: None,
    drain_first: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Run a gateway on `server` until asked to stop, then drain it.

    on_ready: called once, when the first engine is ready; until then the server answers, with
    UNAVAILABLE. more_services: others that were added to the server. drain_first: what else has requests
    that the engines are still needed for.
    """
    gateway.add_to(server)
    health = Health(server)
    everything = ("", *gateway.services)
    await health.set_serving(False, everything)
    if config.reflection:
        enable_reflection(server, (*gateway.services, *more_services))
    await server.start()
    gateway.start(health, everything)
    ready = asyncio.create_task(_report_ready(gateway, on_ready))
    try:
        await shutdown.drain.wait()
        log.info("draining: no new requests; %g s for those running", config.drain_timeout_s)
        drains = [gateway.drain()] if drain_first is None else [gateway.drain(), drain_first()]
        if not await shutdown.wait_drained(*(asyncio.create_task(drain) for drain in drains)):
            log.warning("not drained in time; the requests left end with an error")
    finally:
        ready.cancel()
        await gateway.close()
        await server.stop(CLOSE_GRACE_S)
        shutdown.finished()


async def _report_ready(gateway: Gateway, on_ready: Callable[[], None]) -> None:
    await gateway.wait_ready()
    on_ready()

"""What every gRPC server of ours has: limits, clean failures, health, and reflection if asked for."""

from __future__ import annotations

from collections.abc import Iterable

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .options import MAX_CONCURRENT_RPCS, MAX_MESSAGE_BYTES, server_options
from .raw_handlers import RawHandlers

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def create_server(
    max_message_bytes: int = MAX_MESSAGE_BYTES, *, shares_port: bool = False
) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=[RawHandlers()],
        options=server_options(max_message_bytes, shares_port=shares_port),
        maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
    )


class Health:
    """The health service; everything is NOT_SERVING until said otherwise."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self, serving: bool, services: Iterable[str]) -> None:
        for service in services:
            await self._servicer.set(service, SERVING if serving else NOT_SERVING)


def enable_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)

"""The Routing service: gateways of other processes have their requests routed here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from chiron_engine import __version__
from chiron_engine.rpc.errors import RpcFailure, invalid_argument
from chiron_engine.rpc.raw_handlers import send_headers
from chiron_engine.rpc.v1 import routing_pb2, routing_pb2_grpc

from .coordinator import Coordinator
from .gateway_line import GatewayLine


class RoutingService(routing_pb2_grpc.RoutingServicer):
    """Runs on the coordinator's event loop."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def Attach(
        self, reports: AsyncIterator[routing_pb2.GatewayReports], context: grpc.aio.ServicerContext
    ) -> None:
        first = await anext(reports, None)
        if first is None or len(first.reports) != 1 or first.reports[0].WhichOneof("report") != "attach":
            raise invalid_argument("the first report of a gateway must be an AttachGateway, and alone")
        self._check(first.reports[0].attach)
        await send_headers(context)  # a line that ends in its first write could send no status else
        line = GatewayLine(self._coordinator)
        self._coordinator.attach(line)
        sender = asyncio.create_task(_send(line, context))
        reader = asyncio.create_task(_read(line, reports))
        try:
            await asyncio.wait([sender, reader], return_when=asyncio.FIRST_COMPLETED)
            for end in (sender, reader):
                if end.done():
                    end.result()  # raises what ended the line
        finally:
            sender.cancel()
            reader.cancel()
            await asyncio.gather(sender, reader, return_exceptions=True)
            self._coordinator.detach(line)
            line.close()

    def _check(self, attach: routing_pb2.AttachGateway) -> None:
        if attach.version != __version__:
            raise _refused(f"version is {attach.version}; this coordinator runs {__version__}")
        hello = self._coordinator.hello
        model = hello.model if hello is not None else ""
        if attach.model and model and attach.model != model:
            raise _refused(f"model is {attach.model}; this coordinator serves {model}")


async def _read(line: GatewayLine, reports: AsyncIterator[routing_pb2.GatewayReports]) -> None:
    async for batch in reports:
        for report in batch.reports:
            line.take_in(report)


async def _send(line: GatewayLine, context: grpc.aio.ServicerContext) -> None:
    async for orders in line.batches():
        await context.write(orders)


def _refused(reason: str) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, reason, error_code="gateway_refused")

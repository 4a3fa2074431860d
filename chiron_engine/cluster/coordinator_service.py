"""The Coordinator service: the lines of engines, and what operators see and ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc.aio

from chiron_engine.rpc.errors import RpcFailure, invalid_argument
from chiron_engine.rpc.raw_handlers import send_headers
from chiron_engine.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc

from .coordinator import Coordinator
from .engines import Engine
from .fleet_message import fleet_message


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """Runs on the coordinator's event loop."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def Join(
        self, reports: AsyncIterator[coordinator_pb2.EngineReport], context: grpc.aio.ServicerContext
    ) -> None:
        first = await anext(reports, None)
        if first is None or first.WhichOneof("report") != "register":
            raise invalid_argument("the first report of an engine must be a Register")
        await send_headers(context)  # a line that ends in its first write could send no status else
        engine = self._coordinator.roster.joined(first.register)
        sender = asyncio.create_task(_send_orders(engine, context))
        reader = asyncio.create_task(self._read(engine, reports))
        try:
            await asyncio.wait([sender, reader], return_when=asyncio.FIRST_COMPLETED)
            for end in (sender, reader):
                if end.done():
                    end.result()  # raises what ended the line
        finally:
            sender.cancel()
            reader.cancel()
            await asyncio.gather(sender, reader, return_exceptions=True)

    async def _read(self, engine: Engine, reports: AsyncIterator[coordinator_pb2.EngineReport]) -> None:
        async for report in reports:
            if report.WhichOneof("report") == "telemetry":
                self._coordinator.roster.reported(engine, report.telemetry)
        self._coordinator.roster.left(engine)

    async def GetFleet(
        self, request: coordinator_pb2.GetFleetRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.Fleet:
        return fleet_message(self._coordinator)

    async def DrainInstance(
        self, request: coordinator_pb2.DrainInstanceRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.DrainInstanceResponse:
        with _known(request.instance_id):
            return coordinator_pb2.DrainInstanceResponse(
                gone=self._coordinator.drain(request.instance_id) is None
            )

    async def RetireInstance(
        self, request: coordinator_pb2.RetireInstanceRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.RetireInstanceResponse:
        with _known(request.instance_id):
            return coordinator_pb2.RetireInstanceResponse(
                gone=self._coordinator.retire(request.instance_id) is None
            )

    async def ScaleFleet(
        self, request: coordinator_pb2.ScaleFleetRequest, context: grpc.aio.ServicerContext
    ) -> coordinator_pb2.ScaleFleetResponse:
        try:
            self._coordinator.scale(
                request.min_instances if request.HasField("min_instances") else None,
                request.max_devices if request.HasField("max_devices") else None,
            )
        except ValueError as error:
            raise invalid_argument(str(error)) from None
        config = self._coordinator.config
        return coordinator_pb2.ScaleFleetResponse(
            min_instances=config.min_instances, max_devices=config.max_gpus
        )


@contextmanager
def _known(instance_id: int) -> Iterator[None]:
    """A KeyError in here is about an instance that never was."""
    try:
        yield
    except KeyError:
        raise RpcFailure(
            grpc.StatusCode.NOT_FOUND, f"there is no instance {instance_id}", error_code="not_found"
        ) from None


async def _send_orders(engine: Engine, context: grpc.aio.ServicerContext) -> None:
    """Until the engine is given up: its line ends then, and if it lives it joins anew."""
    orders = engine.orders
    while (order := await orders.get()) is not None:
        await context.write(order)

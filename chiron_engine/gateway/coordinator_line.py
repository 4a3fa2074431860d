"""A gateway's line to its coordinator: reports out and orders in, attaching again when it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol

import grpc
import grpc.aio

from chiron_engine import __version__
from chiron_engine.rpc.options import channel_options
from chiron_engine.rpc.v1 import routing_pb2, routing_pb2_grpc

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 1.0
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


class LineOwner(Protocol):
    async def attached(self) -> None:
        """The line is up, for the first time or again: the coordinator knows of no request."""
        ...

    def detached(self) -> None: ...

    async def obey(self, order: routing_pb2.GatewayOrder) -> None: ...


class CoordinatorLine:
    """Used from one event loop, and not again once closed. Orders are carried out one after another."""

    def __init__(self, address: str, model: str, owner: LineOwner) -> None:
        """model: what engines call theirs; empty where that is not known."""
        self.is_up = False
        self.refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set, with the reason, where the coordinator does not take this gateway; it is not tried again."""
        self._address = address
        self._attach = routing_pb2.AttachGateway(version=__version__, model=model)
        self._owner = owner
        self._reports: list[routing_pb2.GatewayReport] = []
        self._unsent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_attached(), name="coordinator-line")

    async def close(self) -> None:
        self._is_closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def report(self, report: routing_pb2.GatewayReport) -> None:
        """To be sent after those before it. Lost where the line is down: the coordinator has forgotten
        what it would be about."""
        if self.is_up:
            self._reports.append(report)
            self._unsent.set()

    async def _keep_attached(self) -> None:
        """Until it is closed: a cancellation as a call fails is lost in gRPC, as for an `EngineLink`."""
        retry_s = FIRST_RETRY_S
        while not self.refused.done():
            was_up = False
            try:
                was_up = await self._attach_once()
            except Exception:  # of an order that makes no sense
                log.exception("the line to the coordinator failed, and is opened again")
            if self._is_closing:
                return
            retry_s = FIRST_RETRY_S if was_up else min(2 * retry_s, LONGEST_RETRY_S)
            await asyncio.sleep(retry_s * random.uniform(0.8, 1.2))

    async def _attach_once(self) -> bool:
        """One connection, to its end. Returns whether the coordinator answered."""
        # A pool of its own, or a new channel would wait out the old one's reconnection backoff.
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        answered = False
        try:
            async with grpc.aio.insecure_channel(self._address, options=options) as channel:
                call = routing_pb2_grpc.RoutingStub(channel).Attach()
                attach = routing_pb2.GatewayReport(attach=self._attach)
                await call.write(routing_pb2.GatewayReports(reports=[attach]))
                answered = await self._exchange(call)
        except grpc.aio.AioRpcError as error:
            self._note_failure(error)
        finally:
            self._go_down()
        return answered

    async def _exchange(self, call: grpc.aio.StreamStreamCall) -> bool:
        sender: asyncio.Task[None] | None = None
        try:
            while (orders := await call.read()) is not grpc.aio.EOF:
                for order in orders.orders:
                    if order.HasField("welcome"):
                        sender = asyncio.create_task(self._send(call))
                        self.is_up = True
                        log.info("attached to the coordinator at %s", self._address)
                        await self._owner.attached()
                    else:
                        await self._owner.obey(order)
        finally:
            if sender is not None:
                sender.cancel()
            call.cancel()
        return sender is not None

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            await self._unsent.wait()
            self._unsent.clear()
            reports, self._reports = self._reports, []
            try:
                await call.write(routing_pb2.GatewayReports(reports=reports))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader learns the reason

    def _go_down(self) -> None:
        self._reports = []
        self._unsent.clear()
        if self.is_up:
            self.is_up = False
            self._owner.detached()

    def _note_failure(self, error: grpc.aio.AioRpcError) -> None:
        if error.code() in REFUSALS:
            self.refused.set_result(error.details() or error.code().name)
            return
        level = logging.WARNING if self.is_up else logging.DEBUG
        log.log(level, "coordinator %s: %s: %s", self._address, error.code().name, error.details())

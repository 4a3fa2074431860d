"""The line of one gateway of another process: its requests in, where they run out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from chiron_engine.rpc.errors import RpcFailure, invalid_argument, unavailable
from chiron_engine.rpc.v1 import routing_pb2

from .engines import Engine
from .fleet_requests import AskedRequest
from .remote_stream import RemoteStream

MAX_WAITED_S = 1e9
LOST = unavailable("the request failed at its gateway", "gateway_failed")


class RequestTaker(Protocol):
    """The coordinator, as a line uses it."""

    clock: Callable[[], float]

    def take(self, stream: RemoteStream, asked: AskedRequest, received: float) -> None: ...

    def evicted(self, stream: RemoteStream, saved_tokens: int) -> None: ...

    def dropped(self, stream: RemoteStream) -> None: ...

    def ended(self, stream: RemoteStream) -> None: ...


class GatewayLine:
    """The requests that came over it, by the ids of the gateway; orders that wait to be sent, in order.
    Used from the coordinator's event loop."""

    def __init__(self, coordinator: RequestTaker) -> None:
        self._coordinator = coordinator
        self._streams: dict[int, RemoteStream] = {}
        self._orders: list[routing_pb2.GatewayOrder] = []
        self._unsent = asyncio.Event()
        self._introduced: set[int] = set()
        self._is_welcome = False

    async def batches(self) -> AsyncIterator[routing_pb2.GatewayOrders]:
        """All orders that wait, whenever there are some."""
        while True:
            await self._unsent.wait()
            self._unsent.clear()
            orders, self._orders = self._orders, []
            yield routing_pb2.GatewayOrders(orders=orders)

    def close(self) -> None:
        """The gateway is gone, or starts anew: what it had is no request any more."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._coordinator.dropped(stream)

    # What the gateway reports.

    def take_in(self, report: routing_pb2.GatewayReport) -> None:
        """Raises RpcFailure for what no gateway of ours sends."""
        kind = report.WhichOneof("report")
        if kind == "arrival":
            self._arrived(report.arrival)
        elif kind == "departure":
            self._departed(report.departure)
        elif kind == "ending":
            self._ended(report.ending)
        else:
            raise invalid_argument(f"a gateway reported {kind or 'nothing'}; it attaches once, at first")

    def _arrived(self, arrival: routing_pb2.Arrival) -> None:
        if arrival.id in self._streams:
            raise invalid_argument(f"request {arrival.id} has arrived already")
        if not 0.0 <= arrival.waited_s <= MAX_WAITED_S:
            raise invalid_argument(f"waited_s is {arrival.waited_s}; it must be 0 or more, and finite")
        received = self._coordinator.clock() - arrival.waited_s
        max_tokens = arrival.max_tokens if arrival.HasField("max_tokens") else None
        asked = AskedRequest(
            arrival.slo, arrival.prompt_tokens, max_tokens, arrival.prefix or None, arrival.output_tokens
        )
        stream = self._streams[arrival.id] = RemoteStream(arrival.id, asked, received, self)
        self._coordinator.take(stream, asked, received)

    def _departed(self, departure: routing_pb2.Departure) -> None:
        """Of an older attempt where it crossed with the end of its engine: the policy has moved it then."""
        stream = self._streams.get(departure.id)
        if stream is None or stream.attempt != departure.attempt:
            return
        stream.output_tokens = departure.output_tokens
        self._coordinator.evicted(stream, departure.saved_tokens)

    def _ended(self, ending: routing_pb2.Ending) -> None:
        stream = self._streams.pop(ending.id, None)
        if stream is not None:
            stream.end(ending, LOST)
            self._coordinator.ended(stream)

    # What the coordinator orders.

    def welcome(self) -> None:
        """Its requests can be taken from now on."""
        if not self._is_welcome:
            self._is_welcome = True
            self._order(routing_pb2.GatewayOrder(welcome=routing_pb2.Welcome()))

    def engine_up(self, engine: Engine) -> None:
        """Said once of each engine, before anything is placed there."""
        register = engine.register
        if register is None or engine.instance_id in self._introduced:
            return
        self._introduced.add(engine.instance_id)
        up = routing_pb2.EngineUp(
            instance_id=engine.instance_id, address=register.address, boot_id=register.boot_id
        )
        self._order(routing_pb2.GatewayOrder(engine_up=up))

    def engine_gone(self, engine: Engine) -> None:
        if engine.instance_id in self._introduced:
            self._introduced.discard(engine.instance_id)
            gone = routing_pb2.EngineGone(instance_id=engine.instance_id, was_killed=engine.was_killed)
            self._order(routing_pb2.GatewayOrder(engine_gone=gone))

    def forget(self, engine: Engine, key: int) -> None:
        if engine.instance_id in self._introduced:
            forget = routing_pb2.ForgetSaved(instance_id=engine.instance_id, key=key)
            self._order(routing_pb2.GatewayOrder(forget=forget))

    def place(self, stream: RemoteStream, instance_id: int) -> None:
        placement = routing_pb2.Placement(
            id=stream.id,
            key=stream.key,
            attempt=stream.attempt,
            instance_id=instance_id,
            evictions=stream.gave_way,
        )
        self._order(routing_pb2.GatewayOrder(placement=placement))

    def move(self, stream: RemoteStream) -> None:
        self._order(routing_pb2.GatewayOrder(move=routing_pb2.Move(id=stream.id, attempt=stream.attempt)))

    def refuse(self, stream: RemoteStream, failure: RpcFailure) -> None:
        self._streams.pop(stream.id, None)
        refusal = routing_pb2.Refusal(
            id=stream.id,
            code=failure.code.value[0],
            message=failure.message,
            error_code=failure.error_code or "",
            retry_after_ms=failure.retry_after_ms,
        )
        self._order(routing_pb2.GatewayOrder(refusal=refusal))
        self._coordinator.ended(stream)

    def _order(self, order: routing_pb2.GatewayOrder) -> None:
        self._orders.append(order)
        self._unsent.set()

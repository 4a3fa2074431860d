"""Routes the streams of a gateway that runs apart from its coordinator.

The coordinator decides where each runs and hears what becomes of it; tokens come from the engines, over
links of this gateway's own. So streams go on while the coordinator is away.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.errors import RpcFailure, unavailable
from chiron_engine.rpc.prompt_prefix import prompt_prefix
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, routing_pb2

from .coordinator_line import CoordinatorLine

log = logging.getLogger(__name__)

REFUSED_PAUSE_S = 0.1
"""An engine that refuses requests is about to tell the coordinator why; until then it would be chosen
again."""
UNREACHABLE_S = 30.0
"""An engine that the coordinator reaches and this gateway does not, for so long: what was placed there
fails. One that has died is known by then."""
AWAY_S = 120.0
"""Without the coordinator for so long, what waits for a place fails."""
STATUS = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(slots=True, eq=False)
class Place:
    """An engine and the streams placed there. adrift: those that wait for its link to come up. giving_up:
    on them, unless it does; None while it is up."""

    instance_id: int
    link: EngineLink
    streams: set[TokenStream] = field(default_factory=set)
    adrift: set[TokenStream] = field(default_factory=set)
    giving_up: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class Routed:
    """A stream and what the coordinator calls it. id: on the line that is up; 0 while it has not been told
    of. attempt: number of its last placement. place: where that is, None while it waits for one."""

    stream: TokenStream
    received: float
    id: int = 0
    attempt: int = 0
    place: Place | None = None


class FleetRouter:
    """An `EngineRouter`. Used from one event loop."""

    def __init__(self, coordinator: str, model: str = "") -> None:
        """coordinator: its address. model: what its engines are to call theirs; empty: anything."""
        self.line = CoordinatorLine(coordinator, model, self)
        self._hello: engine_pb2.Hello | None = None
        self._places: dict[int, Place] = {}
        self._routed: dict[TokenStream, Routed] = {}
        self._by_id: dict[int, Routed] = {}
        self._ids = itertools.count(1)
        self._listeners: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._giving_up: asyncio.TimerHandle | None = None
        self._has_given_up = False
        """On the coordinator, until it is back."""

    # What a gateway asks of it.

    @property
    def hello(self) -> engine_pb2.Hello | None:
        return self._hello

    @property
    def num_ready(self) -> int:
        """0 while the coordinator is away: nobody would place a new request."""
        return sum(place.link.is_ready for place in self._places.values()) if self.line.is_up else 0

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def start(self) -> None:
        self.line.start()

    async def close(self) -> None:
        for stream in list(self._routed):
            stream.fail(unavailable("the server was shut down before the request ended", "draining"))
        await self.line.close()
        _call_off(self._giving_up)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(_close(place) for place in self._places.values()))

    def submit(self, stream: TokenStream, received: float) -> None:
        self._routed[stream] = routed = Routed(stream, received)
        if self.line.is_up:
            self._announce(routed)
        else:
            stream.fail(_away())

    # What streams tell.

    def paused(self, stream: TokenStream) -> None:
        routed, pause = self._routed[stream], stream.pause
        place = routed.place
        if place is None or pause is None or self._is_over(stream):
            return
        if pause.evicted:
            self._depart(routed, pause.saved_tokens)
        elif pause.rejected is not None:
            self._spawn_departure(routed)
        elif self._has_given_up:
            stream.fail(_away())
        else:
            place.adrift.add(stream)

    def ended(self, stream: TokenStream) -> None:
        routed = self._routed.pop(stream)
        _leave(routed)
        if self._by_id.pop(routed.id, None) is not None:
            self.line.report(routing_pb2.GatewayReport(ending=_ending(routed)))

    # What the line tells.

    async def attached(self) -> None:
        """Nothing of before holds: engines are met anew, and every request goes on from its tokens. Those
        that run do so until now."""
        _call_off(self._giving_up)
        self._has_given_up = False
        for routed in self._routed.values():
            _leave(routed)
        self._by_id.clear()
        places, self._places = self._places, {}
        await asyncio.gather(*(_close(place) for place in places.values()))
        for routed in list(self._routed.values()):
            if routed.id in self._by_id:  # it came while the links were closed
                continue
            if not self._is_over(routed.stream):
                self._announce(routed)
        self._changed()

    def detached(self) -> None:
        self._giving_up = asyncio.get_running_loop().call_later(AWAY_S, self._give_up)
        self._changed()

    async def obey(self, order: routing_pb2.GatewayOrder) -> None:
        kind = order.WhichOneof("order")
        if kind == "placement":
            self._place(order.placement)
        elif kind == "engine_up":
            self._engine_up(order.engine_up)
        elif kind == "engine_gone":
            await self._engine_gone(order.engine_gone)
        elif kind == "move":
            self._move(order.move)
        elif kind == "refusal":
            self._refused(order.refusal)
        elif kind == "forget" and (place := self._places.get(order.forget.instance_id)) is not None:
            place.link.forget(order.forget.key)

    # Orders.

    def _engine_up(self, up: routing_pb2.EngineUp) -> None:
        link = EngineLink(up.address, lambda: self._link_changed(place), up.boot_id)
        place = self._places[up.instance_id] = Place(up.instance_id, link)
        self._await_link(place)
        link.start()

    async def _engine_gone(self, gone: routing_pb2.EngineGone) -> None:
        """Once its link is closed none of its tokens comes any more: its streams may go on elsewhere."""
        place = self._places.pop(gone.instance_id, None)
        if place is None:
            return
        await _close(place)
        for stream in list(place.streams):
            _leave(self._routed[stream])
            if self._hello is not None:
                stream.engine_ended(self._hello, gone.was_killed)
        self._changed()

    def _place(self, placement: routing_pb2.Placement) -> None:
        routed, place = self._by_id.get(placement.id), self._places.get(placement.instance_id)
        if routed is None:
            return  # it has ended meanwhile, and the coordinator is about to hear
        if place is None:
            raise ValueError(f"a request is placed at the unknown instance {placement.instance_id}")
        stream = routed.stream
        stream.key, stream.gave_way = placement.key, placement.evictions
        routed.attempt, routed.place = placement.attempt, place
        place.streams.add(stream)
        place.link.run(stream)

    def _move(self, move: routing_pb2.Move) -> None:
        routed = self._by_id.get(move.id)
        if routed is None or routed.place is None or routed.attempt != move.attempt:
            return
        if routed.stream in routed.place.adrift:
            self._depart(routed, 0)
        else:
            routed.stream.move()

    def _refused(self, refusal: routing_pb2.Refusal) -> None:
        routed = self._by_id.pop(refusal.id, None)
        if routed is None:
            return
        failure = RpcFailure(
            STATUS.get(refusal.code, grpc.StatusCode.UNAVAILABLE),
            refusal.message,
            error_code=refusal.error_code or None,
            retry_after_ms=refusal.retry_after_ms if refusal.HasField("retry_after_ms") else None,
        )
        routed.stream.fail(failure)

    # Reports.

    def _announce(self, routed: Routed) -> None:
        stream = routed.stream
        routed.id = next(self._ids)
        self._by_id[routed.id] = routed
        arrival = routing_pb2.Arrival(
            id=routed.id,
            slo=stream.slo,
            prompt_tokens=stream.prompt_tokens,
            output_tokens=stream.output_tokens,
            prefix=prompt_prefix(stream.prompt_ids) or "",
            waited_s=max(0.0, time.monotonic() - routed.received),
        )
        if stream.sampling.HasField("max_tokens"):
            arrival.max_tokens = stream.sampling.max_tokens
        self.line.report(routing_pb2.GatewayReport(arrival=arrival))

    def _depart(self, routed: Routed, saved_tokens: int) -> None:
        _leave(routed)
        departure = routing_pb2.Departure(
            id=routed.id,
            attempt=routed.attempt,
            output_tokens=routed.stream.output_tokens,
            saved_tokens=saved_tokens,
        )
        self.line.report(routing_pb2.GatewayReport(departure=departure))

    def _spawn_departure(self, routed: Routed) -> None:
        async def depart(id: int, attempt: int) -> None:
            await asyncio.sleep(REFUSED_PAUSE_S)
            if (routed.id, routed.attempt) == (id, attempt) and routed.place is not None:
                self._depart(routed, 0)

        task = asyncio.get_running_loop().create_task(depart(routed.id, routed.attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What does not come back.

    def _await_link(self, place: Place) -> None:
        place.giving_up = asyncio.get_running_loop().call_later(UNREACHABLE_S, self._give_up_on, place)

    def _give_up_on(self, place: Place) -> None:
        self._await_link(place)
        if not self.line.is_up:
            return  # it may have ended, and nobody could tell
        address = place.link.address
        log.error(
            "engine %d at %s, which the coordinator reaches, cannot be reached from here; %d requests fail",
            place.instance_id,
            address,
            len(place.adrift),
        )
        message = f"the engine at {address} cannot be reached from this gateway"
        for stream in list(place.adrift):
            stream.fail(unavailable(message, "engine_unreachable"))

    def _give_up(self) -> None:
        self._has_given_up = True
        waiting = [stream for stream in self._routed if not stream.is_running]
        log.error(
            "no coordinator for %.0f s; %d requests that do not run fail now, and others once their engine "
            "is lost",
            AWAY_S,
            len(waiting),
        )
        for stream in waiting:
            stream.fail(_away())

    def _link_changed(self, place: Place) -> None:
        if place.link.is_connected:
            _call_off(place.giving_up)
            place.giving_up = None
        elif place.giving_up is None:
            self._await_link(place)
        if place.link.is_ready:
            self._hello = place.link.hello
            adrift, place.adrift = place.adrift, set()
            for stream in adrift:
                place.link.run(stream)
        self._changed()

    def _is_over(self, stream: TokenStream) -> bool:
        return self._hello is not None and stream.finish_if_over(self._hello)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _away() -> RpcFailure:
    return unavailable("the coordinator cannot be reached; try again shortly", "coordinator_away")


def _call_off(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def _close(place: Place) -> None:
    await place.link.close()
    _call_off(place.giving_up)


def _leave(routed: Routed) -> None:
    if routed.place is not None:
        routed.place.streams.discard(routed.stream)
        routed.place.adrift.discard(routed.stream)
        routed.place = None


def _ending(routed: Routed) -> routing_pb2.Ending:
    stream, times = routed.stream, routed.stream.times
    ending = routing_pb2.Ending(id=routed.id, output_tokens=stream.output_tokens)
    if times.count:
        ending.first_token_s = times.first - routed.received
        ending.last_token_s = times.last - routed.received
        ending.gaps_s.extend(times.gaps)
    if stream.finished is not None:
        ending.reason = stream.finished.reason
    return ending

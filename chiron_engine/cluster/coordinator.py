"""The coordinator's shell: tells the fleet policy what happens, and does what it orders.

One of two interpreters of the policy's effects (the simulator is the other). It decides nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc

from chiron_engine.policy.fleet.autoscalers import make_global_autoscaler
from chiron_engine.policy.fleet.capacity import target_out_of_reach
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetEvent,
    FleetRequest,
    FleetResized,
    Forget,
    InstanceLost,
    Launch,
    Reject,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFinished,
    RetireAsked,
    Route,
    SetRole,
    Tick,
)
from chiron_engine.policy.fleet.resize import resized
from chiron_engine.rpc.errors import RpcFailure, exhausted, internal, invalid_argument, unavailable
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import coordinator_pb2, engine_pb2, types_pb2

from .engine_roster import EngineRoster
from .engines import Engine, Launcher
from .event_log import EventLog
from .fleet_counters import FleetCounters
from .fleet_requests import AskedRequest, asked_by, fleet_request
from .gateway_line import GatewayLine
from .register_checks import instance_spec
from .remote_stream import RemoteStream, RoutedStream

log = logging.getLogger(__name__)

REFUSED_PAUSE_S = 0.1
DRAIN_POLL_S = 0.05
StartStream = Callable[[], Awaitable[TokenStream]]


class Coordinator:
    """Routes streams (an `EngineRouter` to the gateway) and keeps the number of engines right.

    Used from one event loop. The fleet policy starts with the first engine: what one instance can do
    is known from then on; streams that come before are refused as the model is loading.
    """

    def __init__(
        self,
        policy: str,
        config: FleetConfig,
        launcher: Launcher | None,
        *,
        initial_engines: int = 1,
        event_log: EventLog | None = None,
        clock: Callable[[], float] = time.monotonic,
        model: str | None = None,
        most_devices: int | None = None,
    ) -> None:
        """policy: name of the global autoscaler. launcher: None where engines come by themselves. model:
        the only one that engines may bring; where None, the first engine says. most_devices: what the
        GPU cap may be raised to; None bounds it by nothing."""
        self.config = config
        self.clock = clock
        self.started_at = clock()
        self.fleet: FleetState | None = None
        self.counters = FleetCounters()
        self.roster = EngineRoster(launcher, config, clock, self, model)
        self._policy = policy
        self._most_devices = most_devices
        self._initial_engines = initial_engines
        self._num_joined = 0
        self._event_log = event_log
        self._keys = itertools.count(1)
        self._streams: dict[int, RoutedStream] = {}
        self._gateways: list[GatewayLine] = []
        self._starts: dict[int, StartStream] = {}
        self._placed: dict[int, Engine] = {}
        self._hello: engine_pb2.Hello | None = None
        self._listeners: list[Callable[[], None]] = []
        self._events: deque[FleetEvent] = deque()
        self._is_telling = False
        self._is_draining = False
        self._effects: dict[type, Callable[[Any], None]] = {
            Launch: self._launch,
            SetRole: self._set_role,
            Drain: self._drain,
            Route: self._route,
            Forget: self._forget,
            Reject: self._reject,
        }

    # What a gateway asks of it.

    @property
    def hello(self) -> engine_pb2.Hello | None:
        return self._hello

    @property
    def num_ready(self) -> int:
        return self.roster.num_ready

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def start(self) -> None:
        """Take over or launch the first engines, and begin to tick."""
        self.roster.spawn(self._keep_ticking())
        self._initial_engines = self.roster.start(self._initial_engines)

    async def drain_gateways(self) -> None:
        """Returns when no gateway of another process has a request on engines that end with this
        coordinator; new ones are refused. Engines that joined outlive it, with what runs there."""
        if not self.roster.can_launch:
            return
        self._is_draining = True
        while any(isinstance(stream, RemoteStream) for stream in self._streams.values()):
            await asyncio.sleep(DRAIN_POLL_S)

    async def close(self) -> None:
        """End what is left of the requests here, then the engines that were launched. What gateways of
        other processes have is theirs to end."""
        for stream in list(self._streams.values()):
            if isinstance(stream, TokenStream):
                stream.fail(unavailable("the server was shut down before the request ended", "draining"))
        await self.roster.abandon()
        await self.roster.stop_all()

    def submit(self, stream: TokenStream, received: float) -> None:
        self.take(stream, asked_by(stream), received)

    def take(self, stream: RoutedStream, asked: AskedRequest, received: float) -> None:
        """Take over a stream, wherever its tokens go. received: on `clock`."""
        stream.key = self.next_key()
        hello = self._hello
        if self.fleet is None or hello is None:
            stream.fail(unavailable("no engine is ready yet; the model is loading", "model_loading"))
            return
        if self._is_draining and not asked.produced:
            stream.fail(unavailable("the server is shutting down and takes no new requests", "draining"))
            return
        try:
            request = fleet_request(stream.key, asked, received, hello.max_model_len, self.config)
        except ValueError as error:
            stream.fail(invalid_argument(str(error)))
            return
        self._streams[stream.key] = stream
        self.tell(RequestArrived(request))

    def paused(self, stream: TokenStream) -> None:
        engine, pause = self._placed.get(stream.key), stream.pause
        if engine is None or pause is None or self._hello is None:
            return  # its engine is gone, and `release` saw to it
        if stream.finish_if_over(self._hello):
            return
        if pause.evicted:
            self.evicted(stream, pause.saved_tokens)
        elif pause.rejected is not None:
            self.roster.spawn(self._send_back(stream, engine))
        else:
            engine.adrift[stream.key] = stream

    def evicted(self, stream: RoutedStream, saved_tokens: int) -> None:
        """It has left the engine where it was, and asks for another place."""
        self._leave(stream.key)
        self.tell(RequestEvicted(stream.key, stream.output_tokens, saved_tokens))

    def dropped(self, stream: RoutedStream) -> None:
        """Whoever had it is gone, and with it what became of it."""
        if self._streams.pop(stream.key, None) is not None:
            self._leave(stream.key)
            self.tell(RequestCancelled(stream.key))

    def ended(self, stream: RoutedStream) -> None:
        if self._streams.pop(stream.key, None) is None:
            return
        self._leave(stream.key)
        if self.fleet is not None and (tracked := self.fleet.dispatcher.tracked.get(stream.key)) is not None:
            self.counters.request_ended(stream, tracked.request, self.clock())
        finished = stream.finished
        if finished is None or finished.reason == types_pb2.FINISH_REASON_ABORT:
            self.tell(RequestCancelled(stream.key))
        else:
            self.tell(RequestFinished(stream.key, stream.output_tokens))

    # Gateways of other processes.

    def attach(self, gateway: GatewayLine) -> None:
        """From now on it hears of every engine, and is welcome once there was one."""
        self._gateways.append(gateway)
        if self._hello is not None:
            gateway.welcome()
        for engine in self.roster.engines.values():
            if engine.is_ready:
                gateway.engine_up(engine)

    def detach(self, gateway: GatewayLine) -> None:
        self._gateways.remove(gateway)

    # What the owner of a queue asks of it.

    def next_key(self) -> int:
        """For a request to enqueue."""
        return next(self._keys)

    def enqueue(self, request: FleetRequest, start: StartStream) -> None:
        """Take over a request whose tokens lie elsewhere: `start` fetches them once it has a place, and
        makes the stream, whose owner is this coordinator."""
        self._starts[request.request_id] = start
        self.tell(RequestArrived(request))

    def cancel(self, key: int) -> None:
        """Drop a request that was enqueued and has not been started; a stream can be aborted."""
        if self._starts.pop(key, None) is not None:
            self._placed.pop(key, None)
            self.tell(RequestCancelled(key))

    # What operators ask of it.

    def drain(self, instance_id: int) -> Engine | None:
        """Have an engine end once its requests have; None where it has ended already. Raises KeyError for
        one that never was."""
        engine = self.roster.engines.get(instance_id)
        if engine is None:
            if self.fleet is None or instance_id >= self.fleet.instances.next_id:
                raise KeyError(instance_id)
            return None
        if not engine.is_draining:
            self.tell(RetireAsked(instance_id))
        return engine

    def retire(self, instance_id: int) -> Engine | None:
        """`drain`, with what runs there going on elsewhere at once."""
        engine = self.drain(instance_id)
        if engine is None:
            return None
        for stream in list(engine.streams.values()):
            if stream.key in engine.adrift:
                self.evicted(stream, 0)
            else:
                stream.move()
        return engine

    def scale(self, min_instances: int | None, max_devices: int | None) -> None:
        """Change the bounds of the fleet's size; None leaves one as it is. Raises ValueError."""
        if self.fleet is None:
            raise ValueError("the fleet has no engine yet; its bounds can change once the first is there")
        if not self.roster.can_launch:
            raise ValueError("engines join this coordinator by themselves; start or drain one to change that")
        most = None if self._most_devices is None else self._most_devices + self._num_joined
        self.config = resized(
            self.config,
            self._policy,
            self.fleet.model.spec,
            min_instances=min_instances,
            max_gpus=max_devices,
            most_gpus=most,
        )
        self.tell(FleetResized(self.config.min_instances, self.config.max_gpus))

    # The fleet policy.

    def tell(self, event: FleetEvent) -> None:
        """Have the policy handle an event, and carry out its effects. What those bring about comes
        after them. What fails costs the requests of that event, and no one else."""
        self._events.append(event)
        if self._is_telling or self.fleet is None:
            return
        self._is_telling = True
        while self._events:
            event = self._events.popleft()
            try:
                self._handle(self.fleet, event)
            except Exception:
                log.exception("the fleet policy, or what it ordered, failed at %s", event)
                self._fail_requests_of(event)
        self._is_telling = False

    def _handle(self, fleet: FleetState, event: FleetEvent) -> None:
        now = self.clock()
        if self._event_log is not None:
            self._event_log.event(event, now)
        effects = fleet.handle(event, now)
        if self._event_log is not None:
            self._event_log.effects(effects)
        self.counters.happened(event, effects)
        for effect in effects:
            self._effects[type(effect)](effect)

    def _fail_requests_of(self, event: FleetEvent) -> None:
        """Nobody knows any more where they are to go."""
        keys: list[int] = []
        if isinstance(event, RequestArrived):
            keys = [event.request.request_id]
        elif isinstance(event, RequestEvicted):
            keys = [event.request_id]
        elif isinstance(event, InstanceLost):
            keys = list(event.produced)
        for key in keys:
            if (stream := self._streams.get(key)) is not None:
                stream.fail(internal("the server could not place this request; its log says why"))

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(self.config.tick_s)
            self.roster.bury_dead()
            if self.fleet is not None:
                self.tell(Tick())

    # Effects.

    def _launch(self, effect: Launch) -> None:
        engine = self.roster.engines.get(effect.instance_id) or self.roster.launch(effect.instance_id)
        engine.role = SetRole(effect.instance_id, effect.role, effect.itl_target_s)

    def _set_role(self, effect: SetRole) -> None:
        if (engine := self.roster.engines.get(effect.instance_id)) is not None:
            self.roster.set_role(engine, effect)

    def _drain(self, effect: Drain) -> None:
        if (engine := self.roster.engines.get(effect.instance_id)) is not None:
            self.roster.drain(engine)

    def _route(self, effect: Route) -> None:
        key, engine = effect.request_id, self.roster.engines.get(effect.instance_id)
        if engine is None:
            return  # it has ended meanwhile, and the policy is about to be told
        self._placed[key] = engine
        stream = self._streams.get(key)
        if stream is not None:
            stream.gave_way = effect.evictions
            _run(stream, engine)
        elif key in self._starts:
            self.roster.spawn(self._start_stream(key, self._starts[key]))

    async def _start_stream(self, key: int, start: StartStream) -> None:
        try:
            stream = await start()
        except Exception:
            log.exception("request %d could not be started", key)
            self.cancel(key)
            return
        if stream.has_ended:  # before it was one of ours: nobody else says so
            self.cancel(key)
            return
        if self._starts.pop(key, None) is None:
            return
        stream.key = key
        self._streams[key] = stream
        if (engine := self._placed.get(key)) is not None:  # perhaps another one by now
            _run(stream, engine)

    def _forget(self, effect: Forget) -> None:
        engine = self.roster.engines.get(effect.instance_id)
        if engine is None or engine.link is None:
            return
        engine.link.forget(effect.request_id)
        for gateway in self._gateways:  # one of them has the connection that it was evicted from
            gateway.forget(engine, effect.request_id)

    def _reject(self, effect: Reject) -> None:
        stream = self._streams.pop(effect.request_id, None)
        if stream is not None:
            stream.fail(_refusal(effect))
        elif (start := self._starts.pop(effect.request_id, None)) is not None:
            self.roster.spawn(_refuse(start, effect))

    # What the roster tells.

    @property
    def next_instance_id(self) -> int:
        assert self.fleet is not None  # an engine has registered
        return self.fleet.instances.next_id

    def first_registered(self, register: coordinator_pb2.Register, load_s: float) -> None:
        """From now on the policy rules."""
        spec, now = instance_spec(register, load_s), self.clock()
        if (reason := target_out_of_reach(spec, self.config)) is not None:
            log.warning("%s; requests are served with longer gaps", reason)
        autoscaler = make_global_autoscaler(self._policy, self.config, spec)
        self.fleet = FleetState(spec, self.config, autoscaler)
        initial = self._initial_engines
        if self._event_log is not None:
            self._event_log.begin(self._policy, spec, self.config, initial, now)
        for launch in self.fleet.start(initial, now):
            self.counters.launched(launch)
            self._launch(launch)

    def joined_by_itself(self, change: int) -> None:
        """Their owner wants them there: the fleet keeps as many more, and launches none in their place."""
        before = self._num_joined
        self._num_joined += change
        # Where the fleet is what has joined, bounds of 0 would make none.
        least = 0 if self.roster.can_launch else 1
        added = max(least, self._num_joined) - max(least, before)
        config = self.config
        self.config = replace(
            config,
            min_instances=max(1, config.min_instances + added),
            max_gpus=max(1, config.max_gpus + added),
        )
        self.tell(FleetResized(self.config.min_instances, self.config.max_gpus))

    def linked(self, engine: Engine) -> None:
        assert engine.link is not None
        self._hello = engine.link.hello
        adrift, engine.adrift = engine.adrift, {}
        for stream in adrift.values():
            engine.link.run(stream)
        for gateway in self._gateways:
            gateway.welcome()
            gateway.engine_up(engine)
        self._changed()

    def unlinked(self, engine: Engine) -> None:
        self._changed()

    def release(self, engine: Engine) -> dict[int, int]:
        self.counters.engine_ended(engine.instance_id, engine.telemetry)
        streams = [stream for stream in engine.streams.values() if not stream.has_ended]
        for key in [key for key, placed in self._placed.items() if placed is engine]:
            del self._placed[key]
        for gateway in self._gateways:
            gateway.engine_gone(engine)
        for stream in streams:
            if isinstance(stream, TokenStream) and self._hello is not None:  # else its gateway sees to it
                stream.engine_ended(self._hello, engine.was_killed)
        self._changed()
        return {stream.key: _known_tokens(stream) for stream in streams if not stream.has_ended}

    async def _send_back(self, stream: TokenStream, engine: Engine) -> None:
        """An engine that refuses requests is about to tell why; until then no other choice is better."""
        await asyncio.sleep(REFUSED_PAUSE_S)
        if self._placed.get(stream.key) is engine and not stream.has_ended:
            self.evicted(stream, 0)

    def _leave(self, key: int) -> None:
        engine = self._placed.pop(key, None)
        if engine is not None:
            engine.streams.pop(key, None)
            engine.adrift.pop(key, None)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _run(stream: RoutedStream, engine: Engine) -> None:
    assert engine.link is not None  # the policy routes to ready engines
    engine.streams[stream.key] = stream
    if isinstance(stream, TokenStream):
        engine.link.run(stream)
    else:
        stream.place(engine.instance_id)


def _known_tokens(stream: RoutedStream) -> int:
    """At least so many of one that ran. What came of it at a gateway of another process is heard only once
    it departs or ends; till then it counts as begun, since what was begun is not refused any more."""
    if isinstance(stream, RemoteStream):
        return max(1, stream.output_tokens)
    return stream.output_tokens


async def _refuse(start: StartStream, effect: Reject) -> None:
    (await start()).fail(_refusal(effect))


def _refusal(effect: Reject) -> RpcFailure:
    if effect.retry_after_s:
        return exhausted(effect.reason, "rate_limit_exceeded", int(1e3 * effect.retry_after_s))
    return RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, effect.reason, error_code="slo_not_offered")

"""The coordinator's shell: tells the fleet policy what happens, and does what it orders.

One of two interpreters of the policy's effects (the simulator is the other). It decides nothing but
whether an engine is alive.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from chiron_engine.policy.fleet.autoscalers import make_global_autoscaler
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetEvent,
    FleetRequest,
    Forget,
    InstanceExited,
    InstanceJoined,
    InstanceLost,
    InstanceReady,
    InstanceSpec,
    Launch,
    LaunchFailed,
    Reject,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFinished,
    RetireAsked,
    Role,
    Route,
    SetRole,
    Tick,
)
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.errors import RpcFailure, invalid_argument, unavailable
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import coordinator_pb2, engine_pb2, types_pb2

from .engines import Engine, Launcher, LaunchError, reported
from .event_log import EventLog
from .fleet_requests import fleet_request

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.25
SILENT_S = 5.0
"""Without a report, and without a link, for so long: dead."""
STALLED_S = 30.0
"""Reports that show no step, with requests running, for so long: dead."""
REFUSED_PAUSE_S = 0.1
MOST_LOST_ATTEMPTS = 3
"""Engines that one request may lose before it is taken for the cause."""
STOP_GRACE_S = 10.0
KILL_GRACE_S = 0.0


StartStream = Callable[[], Awaitable[TokenStream]]


class Coordinator:
    """Routes streams (an `EngineRouter` to the gateway), holds engines, and keeps their number right.

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
    ) -> None:
        self.config = config
        self.engines: dict[int, Engine] = {}
        self.fleet: FleetState | None = None
        self.trouble = ""
        self.started_at = clock()
        self.clock = clock
        self._policy = policy
        self._launcher = launcher
        self._initial_engines = initial_engines
        self._event_log = event_log
        self._keys = itertools.count(1)
        self._streams: dict[int, TokenStream] = {}
        self._starts: dict[int, StartStream] = {}
        self._placed: dict[int, Engine] = {}
        self._hello: engine_pb2.Hello | None = None
        self._listeners: list[Callable[[], None]] = []
        self._events: deque[FleetEvent] = deque()
        self._is_telling = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self.failed: asyncio.Future[LaunchError] = asyncio.get_running_loop().create_future()
        """Set where the first engine of all could not be launched."""
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
        return sum(engine.is_ready for engine in self.engines.values())

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def start(self) -> None:
        """Launch the first engines, and begin to tick."""
        self._spawn(self._keep_ticking())
        if self._launcher is not None:
            for instance_id in range(self._initial_engines):
                self._start_process(self._new_engine(instance_id))

    async def close(self) -> None:
        """End what is left of the requests, then the engines that were launched."""
        self._closing = True
        for stream in list(self._streams.values()):
            stream.fail(unavailable("the server was shut down before the request ended", "draining"))
        await self.abandon()
        if self._launcher is not None:
            await self._launcher.stop_all(STOP_GRACE_S)

    async def abandon(self) -> None:
        """Drop the links; the engines go on, and may be taken over by another coordinator."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        links = [engine.link for engine in self.engines.values() if engine.link is not None]
        await asyncio.gather(*(link.close() for link in links))

    def submit(self, stream: TokenStream, received: float) -> None:
        stream.key = next(self._keys)
        hello = self._hello
        if self.fleet is None or hello is None:
            stream.fail(unavailable("no engine is ready yet; the model is loading", "model_loading"))
            return
        try:
            request = fleet_request(stream, received, hello)
        except ValueError as error:
            stream.fail(invalid_argument(str(error)))
            return
        self._streams[stream.key] = stream
        self.tell(RequestArrived(request))

    def enqueue(self, request: FleetRequest, start: StartStream) -> None:
        """Take over a request whose tokens lie elsewhere: `start` fetches them once it has a place, and
        makes the stream, whose owner is this coordinator."""
        self._starts[request.request_id] = start
        self.tell(RequestArrived(request))

    def cancel(self, key: int) -> None:
        """Drop a request that was enqueued, if its stream has not been started; that one can be aborted."""
        if self._starts.pop(key, None) is not None and key not in self._streams:
            self._placed.pop(key, None)
            self.tell(RequestCancelled(key))

    def next_key(self) -> int:
        """For a request to enqueue."""
        return next(self._keys)

    def paused(self, stream: TokenStream) -> None:
        engine, pause = self._placed.get(stream.key), stream.pause
        if engine is None or pause is None or self._hello is None:
            return  # its engine is gone, and the fleet knows
        if (reason := stream.end_of(self._hello)) is not None:
            stream.finish(engine_pb2.Finished(reason=reason))
        elif pause.evicted:
            self._leave(stream)
            self.tell(RequestEvicted(stream.key, len(stream.tokens), pause.saved_tokens))
        elif pause.rejected is not None:
            self._spawn(self._send_back(stream, engine))
        else:
            engine.adrift[stream.key] = stream

    def ended(self, stream: TokenStream) -> None:
        if self._streams.pop(stream.key, None) is None:
            return
        self._leave(stream)
        finished = stream.finished
        if finished is None or finished.reason == types_pb2.FINISH_REASON_ABORT:
            self.tell(RequestCancelled(stream.key))
        else:
            self.tell(RequestFinished(stream.key, len(stream.tokens)))

    # What operators ask.

    def retire(self, instance_id: int) -> bool:
        """Drain an engine; False where there is none of that id."""
        if instance_id not in self.engines:
            return False
        self.tell(RetireAsked(instance_id))
        return True

    # What engines say.

    def joined(self, register: coordinator_pb2.Register) -> Engine:
        """An engine has come, for the first time or again. Raises RpcFailure where it does not fit."""
        now = self.clock()
        self._check(register)
        engine = self._known(register)
        if engine is None:
            engine = self._adopt(register, now)
        engine.heard_at = engine.progressed_at = now
        engine.orders = asyncio.Queue()
        engine.orders.put_nowait(
            coordinator_pb2.EngineOrder(
                joined=coordinator_pb2.Joined(instance_id=engine.instance_id, report_every_s=REPORT_EVERY_S)
            )
        )
        if engine.role is not None:
            self._order_targets(engine)
        if engine.is_draining:
            engine.orders.put_nowait(coordinator_pb2.EngineOrder(drain=coordinator_pb2.DrainOrder()))
        if engine.register is None:
            engine.register = register
            self._connect(engine)
        return engine

    def reported(self, engine: Engine, telemetry: coordinator_pb2.Telemetry) -> None:
        """What an engine reports under a boot id other than its own is of a process that is no more."""
        register = engine.register
        if register is None or telemetry.boot_id != register.boot_id:
            return
        engine.note(telemetry, self.clock())
        if engine.is_ready and telemetry.phase == "ready":
            self.tell(reported(engine.instance_id, telemetry))

    # The fleet policy.

    def tell(self, event: FleetEvent) -> None:
        """Have the policy handle an event, and carry out its effects. What those bring about comes
        after them."""
        self._events.append(event)
        if self._is_telling or self.fleet is None:
            return
        self._is_telling = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._is_telling = False

    def _handle(self, event: FleetEvent) -> None:
        assert self.fleet is not None
        now = self.clock()
        effects = self.fleet.handle(event, now)
        if self._event_log is not None:
            self._event_log.write(event, effects, now)
        for effect in effects:
            self._effects[type(effect)](effect)

    def _start_fleet(self, register: coordinator_pb2.Register, load_s: float) -> None:
        """The first engine has come: from now on the policy rules."""
        spec = _spec(register, load_s)
        autoscaler = make_global_autoscaler(self._policy, self.config, spec)
        self.fleet = FleetState(spec, self.config, autoscaler)
        now = self.clock()
        if self._event_log is not None:
            self._event_log.begin(self._policy, spec, self.config, self._initial_engines, now)
        if self._launcher is not None:
            for launch in self.fleet.start(self._initial_engines, now):
                self._launch(launch)

    # Effects.

    def _launch(self, effect: Launch) -> None:
        engine = self.engines.get(effect.instance_id)
        is_new = engine is None
        if engine is None:
            engine = self._new_engine(effect.instance_id)
        engine.role = SetRole(effect.instance_id, effect.role, effect.itl_target_s)
        if is_new:
            self._start_process(engine)

    def _set_role(self, effect: SetRole) -> None:
        engine = self.engines.get(effect.instance_id)
        if engine is None:
            return
        engine.role = effect
        self._order_targets(engine)

    def _drain(self, effect: Drain) -> None:
        engine = self.engines.get(effect.instance_id)
        if engine is None:
            return
        engine.is_draining = True
        if engine.is_ready:
            engine.orders.put_nowait(coordinator_pb2.EngineOrder(drain=coordinator_pb2.DrainOrder()))
        else:
            self._spawn(self._stop(engine, STOP_GRACE_S))

    def _route(self, effect: Route) -> None:
        key, engine = effect.request_id, self.engines.get(effect.instance_id)
        if engine is None:
            return  # it has ended meanwhile, and the policy is about to be told
        self._placed[key] = engine
        stream = self._streams.get(key)
        if stream is not None:
            self._run(stream, engine)
        elif key in self._starts:
            self._spawn(self._start_stream(key, self._starts[key], engine))

    async def _start_stream(self, key: int, start: StartStream, engine: Engine) -> None:
        try:
            stream = await start()
        except Exception:
            log.exception("request %d could not be started", key)
            self.cancel(key)
            return
        if key not in self._starts or stream.has_ended:
            return
        stream.key = key
        del self._starts[key]
        self._streams[key] = stream
        if (placed := self._placed.get(key)) is not None:  # perhaps another engine by now
            self._run(stream, placed)

    def _run(self, stream: TokenStream, engine: Engine) -> None:
        engine.streams[stream.key] = stream
        assert engine.link is not None  # the policy routes to ready engines
        engine.link.run(stream)

    def _forget(self, effect: Forget) -> None:
        engine = self.engines.get(effect.instance_id)
        if engine is not None and engine.link is not None:
            engine.link.forget(effect.request_id)

    def _reject(self, effect: Reject) -> None:
        stream = self._streams.pop(effect.request_id, None)
        if stream is not None:
            stream.fail(_refusal(effect))
        elif (start := self._starts.pop(effect.request_id, None)) is not None:
            self._spawn(_refuse(start, effect))

    # The lives of engines.

    def _new_engine(self, instance_id: int) -> Engine:
        engine = self.engines[instance_id] = Engine(instance_id, self.clock())
        return engine

    def _start_process(self, engine: Engine) -> None:
        self._spawn(self._run_process(engine))

    async def _run_process(self, engine: Engine) -> None:
        """From its launch to its end."""
        if self._launcher is None:
            self._launch_failed(engine, "engines join this coordinator by themselves")
            return
        engine.is_launched = True
        try:
            running = await self._launcher.launch(engine.instance_id)
        except LaunchError as error:
            if engine.is_draining:
                await self._end(engine, "its launch was cancelled")
            else:
                self._launch_failed(engine, str(error), error.code)
            return
        code = await asyncio.shield(running.exited)
        if not self._closing:
            await self._end(engine, f"its process ended with code {code}")

    def _launch_failed(self, engine: Engine, cause: str, code: int = 1) -> None:
        log.error("engine %d failed to start: %s", engine.instance_id, cause)
        self.trouble = cause
        if self.fleet is None and not self.failed.done():
            self.failed.set_result(LaunchError(cause, code))
        self.engines.pop(engine.instance_id, None)
        self._changed()
        self.tell(LaunchFailed(engine.instance_id, cause))

    def _known(self, register: coordinator_pb2.Register) -> Engine | None:
        """The engine that registers, if it was launched here or joined before."""
        if not register.HasField("instance_id"):
            return None
        engine = self.engines.get(register.instance_id)
        if engine is None or (engine.register and engine.register.boot_id != register.boot_id):
            return None
        return engine

    def _adopt(self, register: coordinator_pb2.Register, now: float) -> Engine:
        """An engine that this coordinator did not launch: started by hand, or by the coordinator
        before this one."""
        if self.fleet is None:
            self._start_fleet(register, self.config.tick_s)
        assert self.fleet is not None
        engine = self._new_engine(self.fleet.instances.next_id)
        target = self.config.itl_targets_s[0]
        engine.role = SetRole(engine.instance_id, Role.MIXED, target)
        self.tell(InstanceJoined(engine.instance_id, Role.MIXED, target))
        return engine

    def _connect(self, engine: Engine) -> None:
        assert engine.register is not None
        if self.fleet is None:
            self._start_fleet(engine.register, max(1.0, self.clock() - engine.launched_at))
        engine.link = EngineLink(engine.register.address, lambda: self._link_changed(engine))
        engine.link.start()

    def _link_changed(self, engine: Engine) -> None:
        link = engine.link
        if link is None or not link.is_ready:
            self._changed()
            return
        self._hello = link.hello
        if not engine.is_ready:
            engine.is_ready = True
            self.trouble = ""
            log.info("engine %d is ready at %s", engine.instance_id, link.address)
            self.tell(InstanceReady(engine.instance_id))
        adrift, engine.adrift = engine.adrift, {}
        for stream in adrift.values():
            link.run(stream)
        self._changed()

    async def _end(self, engine: Engine, cause: str) -> None:
        """The engine is gone with what it ran. Once its link is closed, none of its tokens comes
        any more, so that what its requests have is final."""
        if self.engines.pop(engine.instance_id, None) is None:
            return
        streams = dict(engine.streams)
        for key in [key for key, placed in self._placed.items() if placed is engine]:
            del self._placed[key]
        if engine.link is not None:
            await engine.link.close()
        engine.orders.put_nowait(None)
        log.log(
            logging.INFO if engine.is_draining else logging.ERROR, "engine %d: %s", engine.instance_id, cause
        )
        lost = [stream for stream in streams.values() if not stream.has_ended]
        for stream in lost:
            self._finish_if_complete(stream)
        produced = {stream.key: len(stream.tokens) for stream in lost if not stream.has_ended}
        if engine.is_draining and not produced:
            self.tell(InstanceExited(engine.instance_id))
        else:
            self.tell(InstanceLost(engine.instance_id, produced))
        self._changed()

    def _finish_if_complete(self, stream: TokenStream) -> None:
        """The engine may have gone between a request's last token and the word that it was the last."""
        if self._hello is not None and (reason := stream.end_of(self._hello)) is not None:
            stream.finish(engine_pb2.Finished(reason=reason))
        elif stream.num_attempts >= MOST_LOST_ATTEMPTS:
            stream.fail(unavailable("every engine that served this request was lost", "engine_lost"))

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(self.config.tick_s)
            now = self.clock()
            for engine in list(self.engines.values()):
                cause = _cause_of_death(engine, now)
                if cause is not None:
                    self._spawn(self._bury(engine, cause))
            self.tell(Tick())

    async def _bury(self, engine: Engine, cause: str) -> None:
        """A process that does not answer must not come back."""
        await self._stop(engine, KILL_GRACE_S)
        await self._end(engine, cause)

    async def _stop(self, engine: Engine, grace_s: float) -> None:
        if self._launcher is not None and engine.is_launched:
            await self._launcher.stop(engine.instance_id, grace_s)

    async def _send_back(self, stream: TokenStream, engine: Engine) -> None:
        """An engine that refuses requests is about to tell why; until then, no other choice is better."""
        await asyncio.sleep(REFUSED_PAUSE_S)
        if self._placed.get(stream.key) is engine and not stream.has_ended:
            self._leave(stream)
            self.tell(RequestEvicted(stream.key, len(stream.tokens), 0))

    def _leave(self, stream: TokenStream) -> None:
        engine = self._placed.pop(stream.key, None)
        if engine is not None:
            engine.streams.pop(stream.key, None)
            engine.adrift.pop(stream.key, None)

    def _order_targets(self, engine: Engine) -> None:
        assert engine.role is not None
        order = coordinator_pb2.SetTargets(
            role=engine.role.role.value,
            interactive_itl_s=engine.role.itl_target_s,
            batch_itl_s=self.config.batch_itl_s,
        )
        engine.orders.put_nowait(coordinator_pb2.EngineOrder(set_targets=order))

    def _check(self, register: coordinator_pb2.Register) -> None:
        """One model for all: those that joined before say which."""
        for engine in self.engines.values():
            known = engine.register
            if known is None:
                continue
            for name in ("model", "version", "max_model_len"):
                mine, theirs = getattr(known, name), getattr(register, name)
                if mine != theirs:
                    raise RpcFailure(
                        _FAILED_PRECONDITION,
                        f"{name} is {theirs}; the engines of this coordinator have {mine}",
                        error_code="engine_refused",
                    )
            return

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the coordinator failed", exc_info=task.exception())


_FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def _cause_of_death(engine: Engine, now: float) -> str | None:
    """Why an engine that came once is to be taken for dead; None while it is not."""
    if engine.register is None:
        return None
    linked = engine.link is not None and engine.link.is_connected
    if now - engine.heard_at > SILENT_S and not linked:
        return f"nothing was heard of it for {SILENT_S:.0f} s"
    if now - engine.heard_at > 2 * SILENT_S:
        return f"it did not report for {2 * SILENT_S:.0f} s"
    if now - engine.progressed_at > STALLED_S:
        return f"it has made no step for {STALLED_S:.0f} s, with requests running"
    return None


def _spec(register: coordinator_pb2.Register, load_s: float) -> InstanceSpec:
    costs = register.costs
    return InstanceSpec(
        costs=StepCosts(
            costs.base_s,
            costs.per_request_s,
            costs.per_kv_token_s,
            costs.per_prompt_token_s,
            costs.per_prompt_context_s,
        ),
        kv_capacity_tokens=register.kv_capacity_tokens,
        max_slots=register.max_slots,
        max_model_len=register.max_model_len,
        load_s=load_s,
    )


async def _refuse(start: StartStream, effect: Reject) -> None:
    (await start()).fail(_refusal(effect))


def _refusal(effect: Reject) -> RpcFailure:
    return RpcFailure(_FAILED_PRECONDITION, effect.reason, error_code="slo_not_offered")

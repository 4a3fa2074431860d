"""The engine processes of a fleet: launched or joined, watched, and seen to their end."""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import grpc

from chiron_engine import __version__
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import (
    FleetEvent,
    InstanceExited,
    InstanceJoined,
    InstanceLost,
    InstanceReady,
    LaunchFailed,
    RetireAsked,
    Role,
    SetRole,
)
from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.errors import RpcFailure, unavailable
from chiron_engine.rpc.v1 import coordinator_pb2

from .engine_records import EngineRecord
from .engines import Engine, Launcher, LaunchError, reported
from .register_checks import check_register

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.25
LONGEST_REPORT_S = 1.0
MOST_REPORTS_PER_S = 100
SILENT_S = 5.0
"""Without a report, and without a link, for so long: dead."""
STALLED_S = 30.0
"""Reports that show no step, with requests running, for so long: dead."""
STOP_GRACE_S = 10.0
KILL_GRACE_S = 0.0
ADOPT_WITHIN_S = 5.0
"""For an engine of a coordinator before this one to come back; then another takes its place."""
NONE_HERE = "no engine is here; start one with chiron engine MODEL --join HOST:PORT"
MUST_AGREE = ("model", "max_model_len")


class RosterOwner(Protocol):
    """Whom the roster tells of its engines."""

    @property
    def next_instance_id(self) -> int:
        """For an engine that joins without having been launched."""
        ...

    def tell(self, event: FleetEvent) -> None: ...

    def first_registered(self, register: coordinator_pb2.Register, load_s: float) -> None:
        """The first engine of all says what one instance can do."""
        ...

    def joined_by_itself(self, change: int) -> None:
        """There are so many more, or fewer, engines that were not launched here."""
        ...

    def linked(self, engine: Engine) -> None:
        """Its link is up, for the first time or again: it takes requests."""
        ...

    def unlinked(self, engine: Engine) -> None:
        """Its link is down; whether it lives is not known yet."""
        ...

    def release(self, engine: Engine) -> dict[int, int]:
        """The engine has ended and its link is closed. Returns the tokens of each request that ran
        there and goes on elsewhere, by key."""
        ...


class EngineRoster:
    """Used from one event loop. An engine that is lost is out of `engines` before its owner hears."""

    def __init__(
        self,
        launcher: Launcher | None,
        config: FleetConfig,
        clock: Callable[[], float],
        owner: RosterOwner,
        model: str | None = None,
    ) -> None:
        """model: name of the one that engines must have; where None, the first one's."""
        self.coordinator_id = uuid.uuid4().hex
        self.engines: dict[int, Engine] = {}
        self.trouble = ""
        """Why launches fail; empty once one succeeds."""
        self.failed: asyncio.Future[LaunchError] = asyncio.get_running_loop().create_future()
        """Set where an engine could not be launched before any was there."""
        self._launcher = launcher
        self._config = config
        self._clock = clock
        self._owner = owner
        self._model = model
        self._has_started = False
        self._has_registered = False
        self._closing = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def can_launch(self) -> bool:
        return self._launcher is not None

    @property
    def num_ready(self) -> int:
        return sum(engine.is_ready for engine in self.engines.values())

    # Orders.

    def start(self, count: int) -> int:
        """Take over the engines that are left of a coordinator before this one, and launch others until
        there are `count`. Returns how many there are to be; their ids count from 0."""
        self._has_started = True
        if self._launcher is None:
            return 0
        survivors = list(self._launcher.survivors)
        for instance_id, survivor in enumerate(survivors):
            engine = self._add(instance_id)
            engine.survivor = survivor
            self.spawn(self._take_over(engine, self._launcher, survivor))
        for instance_id in range(len(survivors), count):
            self.launch(instance_id)
        return max(count, len(survivors))

    def launch(self, instance_id: int) -> Engine:
        """Start an engine; the owner hears InstanceReady or LaunchFailed."""
        engine = self._add(instance_id)
        self.spawn(self._run_process(engine))
        return engine

    def set_role(self, engine: Engine, role: SetRole) -> None:
        engine.role = role
        order = coordinator_pb2.SetTargets(
            role=role.role.value,
            interactive_itl_s=role.itl_target_s,
            batch_itl_s=self._config.batch_itl_s,
        )
        engine.orders.put_nowait(coordinator_pb2.EngineOrder(set_targets=order))

    def drain(self, engine: Engine) -> None:
        """Have it end once its requests have: the owner hears InstanceExited."""
        was_leaving, engine.is_draining = engine.is_draining, True
        if not engine.is_ready:
            self.spawn(self._stop(engine, STOP_GRACE_S))
        elif not was_leaving:
            _order_drain(engine)

    # What engines say.

    def joined(self, register: coordinator_pb2.Register) -> Engine:
        """An engine has come, for the first time or again. Raises RpcFailure where it does not fit."""
        if not self._has_started:
            raise unavailable("the coordinator is starting", "starting")
        self._check(register)
        now = self._clock()
        engine = self._known(register) or self._add_joined(register)
        engine.heard_at = engine.progressed_at = now
        engine.orders = asyncio.Queue()
        welcome = coordinator_pb2.Joined(
            instance_id=engine.instance_id,
            report_every_s=report_every_s(len(self.engines)),
            coordinator_id=self.coordinator_id,
        )
        engine.orders.put_nowait(coordinator_pb2.EngineOrder(joined=welcome))
        if engine.register is None:
            self._connect(engine, register)
        if engine.role is not None:
            self.set_role(engine, engine.role)
        if engine.is_draining:
            _order_drain(engine)
        return engine

    def reported(self, engine: Engine, telemetry: coordinator_pb2.Telemetry) -> None:
        """A report under a boot id other than the engine's own is of a process that is no more."""
        register = engine.register
        if register is None or telemetry.boot_id != register.boot_id:
            return
        engine.note(telemetry, self._clock())
        if engine.is_ready and telemetry.phase == "ready":
            self._owner.tell(reported(engine.instance_id, telemetry))
        elif telemetry.phase == "draining" and not engine.is_draining:
            engine.is_draining = True  # a signal ends it
            self._owner.tell(RetireAsked(engine.instance_id))

    def left(self, engine: Engine) -> None:
        """Its line has ended. Where it said before that it takes no more, it is about to exit."""
        if engine.telemetry is None or engine.telemetry.phase == "ready" or engine.is_launched:
            return
        if self.engines.get(engine.instance_id) is engine:
            self.spawn(self._end(engine, "it has left"))

    # Their lives.

    def bury_dead(self) -> None:
        """End what does not answer or does not move; called every tick."""
        now = self._clock()
        for engine in list(self.engines.values()):
            cause = None if engine.is_dead else _cause_of_death(engine, now)
            if cause is not None:
                engine.is_dead = True
                self.spawn(self._bury(engine, cause))

    async def abandon(self) -> None:
        """Drop the links; the engines go on, and may be taken over by another coordinator."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        links = [engine.link for engine in self.engines.values() if engine.link is not None]
        await asyncio.gather(*(link.close() for link in links))

    async def stop_all(self) -> None:
        """End every process that was launched."""
        if self._launcher is not None:
            await self._launcher.stop_all(STOP_GRACE_S)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run this until it ends or the roster is closed; a failure is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _add(self, instance_id: int) -> Engine:
        engine = self.engines[instance_id] = Engine(instance_id, self._clock())
        return engine

    async def _run_process(self, engine: Engine) -> None:
        """From its launch to its end."""
        if self._launcher is None:
            self._launch_failed(engine, LaunchError(NONE_HERE, 1))
            return
        engine.is_launched = True
        engine.launched_at = self._clock()
        try:
            running = await self._launcher.launch(engine.instance_id)
        except LaunchError as error:
            if engine.is_draining:
                await self._end(engine, "its launch was cancelled")
            else:
                self._launch_failed(engine, error)
            return
        await self._see_end(engine, running.exited)

    async def _take_over(self, engine: Engine, launcher: Launcher, survivor: EngineRecord) -> None:
        """Like `_run_process`, which is what becomes of it where the engine does not come back."""
        engine.is_launched = True
        try:
            exited = launcher.adopt(engine.instance_id, survivor)
        except LaunchError as error:
            log.warning("engine %d cannot be taken over: %s", engine.instance_id, error)
        else:
            joined = asyncio.create_task(engine.joined.wait())
            either: list[asyncio.Future[Any]] = [exited, joined]
            await asyncio.wait(either, timeout=ADOPT_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
            joined.cancel()
            if engine.joined.is_set():
                log.info("engine %d is process %d, taken over", engine.instance_id, survivor.pid)
                await self._see_end(engine, exited)
                return
            log.warning("process %d did not come back as engine %d", survivor.pid, engine.instance_id)
            await self._stop(engine, KILL_GRACE_S)
        engine.survivor = None
        if engine.is_draining:
            await self._end(engine, "it did not come back")
        else:
            await self._run_process(engine)

    async def _see_end(self, engine: Engine, exited: asyncio.Future[int | None]) -> None:
        code = await asyncio.shield(exited)
        if not self._closing:
            engine.was_killed = code == -signal.SIGKILL and not engine.is_dead
            await self._end(engine, "its process ended" + ("" if code is None else f" with code {code}"))

    def _launch_failed(self, engine: Engine, error: LaunchError) -> None:
        if self._launcher is not None:
            log.error("engine %d failed to start: %s", engine.instance_id, error)
        self.trouble = str(error)
        if not self._has_registered and not self.failed.done():
            self.failed.set_result(error)
        self.engines.pop(engine.instance_id, None)
        self._owner.tell(LaunchFailed(engine.instance_id, str(error)))

    def _known(self, register: coordinator_pb2.Register) -> Engine | None:
        """The engine that registers, if it was launched here, is to be taken over, or joined before."""
        if register.coordinator_id not in ("", self.coordinator_id):  # its instance id is not of here
            engine = next((e for e in self.engines.values() if _survives_as(e, register.boot_id)), None)
        elif register.HasField("instance_id"):
            engine = self.engines.get(register.instance_id)
        else:
            return None
        if engine is None or (engine.register is not None and engine.register.boot_id != register.boot_id):
            return None
        return engine

    def _add_joined(self, register: coordinator_pb2.Register) -> Engine:
        """An engine that this coordinator did not launch: started by hand, or thought dead too soon."""
        self._register_first(register, self._config.tick_s)
        self._owner.joined_by_itself(1)
        engine = self._add(self._owner.next_instance_id)
        target = self._config.itl_targets_s[0]
        engine.role = SetRole(engine.instance_id, Role.MIXED, target)
        self._owner.tell(InstanceJoined(engine.instance_id, Role.MIXED, target))
        return engine

    def _connect(self, engine: Engine, register: coordinator_pb2.Register) -> None:
        survivor = engine.survivor
        load_s = max(1.0, self._clock() - engine.launched_at if survivor is None else survivor.load_s)
        self._register_first(register, load_s)
        engine.register = register
        if self._launcher is not None and engine.is_launched:
            self._launcher.joined(engine.instance_id, register.boot_id, load_s)
        engine.joined.set()
        engine.link = EngineLink(register.address, lambda: self._link_changed(engine), register.boot_id)
        engine.link.start()

    def _register_first(self, register: coordinator_pb2.Register, load_s: float) -> None:
        if not self._has_registered:
            self._has_registered = True
            self._owner.first_registered(register, load_s)

    def _link_changed(self, engine: Engine) -> None:
        if engine.link is None or not engine.link.is_ready:
            self._owner.unlinked(engine)
            return
        if not engine.is_ready:
            engine.is_ready = True
            self.trouble = ""
            log.info("engine %d is ready at %s", engine.instance_id, engine.link.address)
            self._owner.linked(engine)
            self._owner.tell(InstanceReady(engine.instance_id))
        else:
            self._owner.linked(engine)

    async def _bury(self, engine: Engine, cause: str) -> None:
        """A process that does not answer must not come back."""
        await self._stop(engine, KILL_GRACE_S)
        await self._end(engine, cause)

    async def _end(self, engine: Engine, cause: str) -> None:
        """Once its link is closed none of its tokens comes any more, so that what its requests have
        by then is final."""
        if self.engines.pop(engine.instance_id, None) is None:
            return
        if engine.link is not None:
            await engine.link.close()
        engine.orders.put_nowait(None)
        log.log(
            logging.INFO if engine.is_draining else logging.ERROR, "engine %d: %s", engine.instance_id, cause
        )
        produced = self._owner.release(engine)
        if not engine.is_launched:
            self._owner.joined_by_itself(-1)
        if engine.is_draining and not produced:
            self._owner.tell(InstanceExited(engine.instance_id))
        else:
            self._owner.tell(InstanceLost(engine.instance_id, produced))

    async def _stop(self, engine: Engine, grace_s: float) -> None:
        if self._launcher is not None and engine.is_launched:
            await self._launcher.stop(engine.instance_id, grace_s)

    def _check(self, register: coordinator_pb2.Register) -> None:
        """One version and one model for all. What else must agree, those that joined before say."""
        if register.version != __version__:
            raise _refused(f"version is {register.version}; this coordinator runs {__version__}")
        check_register(register)
        if self._model is not None and register.model != self._model:
            raise _refused(f"model is {register.model}; this coordinator serves {self._model}")
        known = next((e.register for e in self.engines.values() if e.register is not None), None)
        if known is None:
            return
        for name in MUST_AGREE:
            mine, theirs = getattr(known, name), getattr(register, name)
            if mine != theirs:
                raise _refused(f"{name} is {theirs}; the engines of this coordinator have {mine}")

    def _forget_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the coordinator failed", exc_info=task.exception())


def _refused(reason: str) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, reason, error_code="engine_refused")


def _survives_as(engine: Engine, boot_id: str) -> bool:
    return engine.survivor is not None and engine.survivor.boot_id == boot_id


def _order_drain(engine: Engine) -> None:
    engine.orders.put_nowait(coordinator_pb2.EngineOrder(drain=coordinator_pb2.DrainOrder()))


def _cause_of_death(engine: Engine, now: float) -> str | None:
    """Why an engine that came once is to be taken for dead; None while it is not."""
    if engine.register is None:
        return None
    linked = engine.link is not None and engine.link.is_connected
    silent_s = now - engine.heard_at
    if silent_s > SILENT_S and not linked:
        return f"nothing was heard of it for {SILENT_S:.0f} s"
    if silent_s > 2 * SILENT_S:
        return f"it did not report for {2 * SILENT_S:.0f} s"
    if now - engine.progressed_at > STALLED_S:
        return f"it has made no step for {STALLED_S:.0f} s, with requests running"
    return None


def report_every_s(num_engines: int) -> float:
    """A large fleet reports less often, so that listening to it does not grow with it."""
    return min(LONGEST_REPORT_S, max(REPORT_EVERY_S, num_engines / MOST_REPORTS_PER_S))

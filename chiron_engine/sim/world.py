"""A fleet in virtual time: real engine cores and the real fleet policy, joined by events.

The world is one of two interpreters of the fleet policy's effects; the other one starts processes.
It decides nothing: it delivers what is said, with the delay that takes, and writes down what
happens. Equal arguments give equal results, in any process.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from chiron_engine.policy.fleet.capacity import target_out_of_reach
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetEffect,
    FleetEvent,
    Forget,
    InstanceExited,
    InstanceLost,
    InstanceReady,
    InstanceSpec,
    InstanceState,
    Launch,
    LaunchFailed,
    Reject,
    RequestArrived,
    Route,
    SetRole,
    Tick,
)

from .engine_instance import EngineInstance
from .engine_setup import EngineSetup, engine_shape
from .event_heap import EventHeap
from .faults import FaultDice, LaunchFate
from .initial_instances import initial_instances
from .profile import Profile
from .request_book import RequestBook
from .request_source import Arrival, RequestSource
from .run_result import FleetSample, InstanceLife, ItlHistogram, RunResult
from .sim_policy import SimPolicy
from .watchdog import Watchdog
from .workload import BATCH_SLO, INTERACTIVE_SLO, Workload
from .world_settings import WorldSettings

PROGRESS_PERIOD_S = 0.1
GOLDEN_RATIO = 0.6180339887498949
"""Its multiples, modulo 1, lie evenly: when in each period an instance reports."""


class World:
    """One simulation; `run` may be called once. Raises ValueError for requests that no instance
    could hold."""

    def __init__(
        self, workload: Workload, profile: Profile, policy: SimPolicy, settings: WorldSettings, seed: int
    ) -> None:
        self._settings = settings
        self._profile = profile
        shape = engine_shape(profile, settings.block_size, settings.host_kv_share)
        interactive = workload.interactive.slo if workload.interactive else INTERACTIVE_SLO
        batch = workload.batch.slo if workload.batch else BATCH_SLO
        self._setup = EngineSetup(
            profile, shape, policy.local_autoscaler, interactive.itl_s, batch.itl_s, settings.step_noise, seed
        )
        spec = InstanceSpec(
            costs=profile.fit,
            kv_capacity_tokens=shape.num_device_blocks * shape.block_size,
            max_slots=profile.max_slots,
            max_model_len=shape.max_model_len,
            gpus=profile.gpus,
            load_s=settings.load_time_s,
        )
        config = FleetConfig(
            max_gpus=settings.max_gpus,
            tick_s=settings.tick_s,
            itl_targets_s=(interactive.itl_s,),
            batch_itl_s=batch.itl_s,
        )
        if (reason := target_out_of_reach(spec, config)) is not None:
            raise ValueError(reason)
        self._fleet = policy.make_fleet(spec, config)
        self._initial = initial_instances(workload, spec, config, policy, settings)
        self._source = RequestSource(workload, shape, settings.max_output_tokens)
        self._span_s = max((stream.trace.span_s for stream in workload.streams), default=0.0)
        self._dice = FaultDice(settings.faults, settings.load_time_s, settings.load_jitter, seed)
        self._book = RequestBook(workload.num_requests, settings.rpc_delay_s)
        self._watchdog = Watchdog(self._book, settings.load_time_s)
        self._events = EventHeap()
        self._engines: dict[int, EngineInstance] = {}
        self._ended: set[int] = set()
        self._known_ended: set[int] = set()
        self._result = RunResult(workload, self._book.columns, [], [], ItlHistogram(), 0.0)
        self._progress: Callable[[float], None] | None = None
        self._progress_at = -math.inf
        self._effects: dict[type, Callable[[Any], None]] = {
            Launch: self._launch,
            SetRole: self._set_role,
            Drain: self._drain,
            Route: self._route,
            Forget: self._forget,
            Reject: self._reject,
        }

    def run(self, progress: Callable[[float], None] | None = None) -> RunResult:
        """Until every request is served or rejected. `progress` is told the share of simulated time
        that has passed, at most ten times a second. Raises Stuck when nothing would ever serve what
        is left."""
        self._progress = progress
        extrapolated = self._profile.step_times.extrapolated
        with _collector_at_rest():
            self._start()
            events, book = self._events, self._book
            while book.unserved:
                events.run_next()
        self._finish(extrapolated)
        return self._result

    def _start(self) -> None:
        for launch in self._fleet.start(self._initial, 0.0):
            self._ready(self._new_engine(launch))
            self._tell_fleet(InstanceReady(launch.instance_id))
        self._schedule_arrival()
        self._events.add(self._settings.tick_s, self._tick, None)

    def _finish(self, extrapolated_before: int) -> None:
        result = self._result
        result.end_s = self._book.last_served_s
        result.samples.append(self._sample())  # what ended since the last tick, too
        for engine in self._engines.values():
            engine.stop_coasting(self._events.now)
            self._count(engine)
        result.extrapolated_steps = self._profile.step_times.extrapolated - extrapolated_before
        if self._progress is not None:
            self._progress(1.0)

    # Events from outside of the engines.

    def _schedule_arrival(self) -> None:
        arrival = self._source.next_arrival()
        if arrival is not None:
            self._events.add(arrival[0], self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._schedule_arrival()
        request, live = self._source.make(arrival)
        self._book.arrive(live)
        self._tell_fleet(RequestArrived(request))

    def _tick(self, _: None) -> None:
        now = self._events.now
        self._events.add(now + self._settings.tick_s, self._tick, None)
        self._tell_fleet(Tick())
        self._result.samples.append(self._sample())
        busy = any(engine.is_busy for engine in self._engines.values())
        self._watchdog.look(now, busy, len(self._engines))
        self._report_progress()

    def _sample(self) -> FleetSample:
        ready = [engine for engine in self._engines.values() if engine.core is not None]
        for engine in ready:
            engine.catch_up(self._events.now)
        count = max(1, len(ready))
        attained, ended = self._book.take_sample()
        return FleetSample(
            time_s=self._events.now,
            gauges=self._fleet.gauges(self._events.now),
            mean_running=sum(engine.running for engine in ready) / count,
            mean_limit=sum(engine.limit for engine in ready) / count,
            latency_backpressure=sum(engine.latency_backpressure for engine in ready) / count,
            attained=attained,
            ended=ended,
        )

    def _report_progress(self) -> None:
        if self._progress is None or time.monotonic() < self._progress_at + PROGRESS_PERIOD_S:
            return
        self._progress_at = time.monotonic()
        self._progress(min(1.0, self._events.now / self._span_s) if self._span_s else 0.0)

    # What the fleet is told, and what it orders.

    def _send_to_fleet(self, event: FleetEvent) -> None:
        self._events.add(self._events.now + self._settings.rpc_delay_s, self._tell_fleet, event)

    def _send_end(self, event: InstanceLost | InstanceExited | LaunchFailed, delay_s: float) -> None:
        self._events.add(self._events.now + delay_s, self._tell_end, event)

    def _tell_fleet(self, event: FleetEvent) -> None:
        handlers = self._effects
        for effect in self._fleet.handle(event, self._events.now):
            handlers[type(effect)](effect)

    def _tell_end(self, event: InstanceLost | InstanceExited | LaunchFailed) -> None:
        """From here on the fleet knows that the instance is no more."""
        self._known_ended.add(event.instance_id)
        self._tell_fleet(event)

    def _send_to_engine(self, handler: Callable[[Any], None], effect: FleetEffect) -> None:
        self._events.add(self._events.now + self._settings.rpc_delay_s, handler, effect)

    def _launch(self, effect: Launch) -> None:
        self._result.launches += 1
        self._result.scaling_actions += 1
        engine = self._new_engine(effect)
        fate = self._dice.launch()
        self._events.add(self._events.now + fate.seconds, self._loaded, (engine, fate))

    def _set_role(self, effect: SetRole) -> None:
        self._result.role_changes += 1
        self._send_to_engine(self._change_role, effect)

    def _drain(self, effect: Drain) -> None:
        self._result.scaling_actions += 1
        self._send_to_engine(self._begin_drain, effect)

    def _route(self, effect: Route) -> None:
        if effect.instance_id in self._known_ended:
            raise RuntimeError(
                f"the fleet policy routes request {effect.request_id} to instance {effect.instance_id}, "
                "which has ended, as it was told"
            )
        self._send_to_engine(self._submit, effect)

    def _forget(self, effect: Forget) -> None:
        self._send_to_engine(self._drop_saved, effect)

    def _reject(self, effect: Reject) -> None:
        self._book.reject(effect.request_id, self._events.now)

    # What reaches the engines.

    def _submit(self, effect: Route) -> None:
        engine = self._reach(effect.instance_id)
        live = self._book.live.get(effect.request_id)
        if engine is None:
            return
        if live is None:
            raise RuntimeError(f"request {effect.request_id} is routed, but it was served or never came")
        engine.add(live, effect.evictions, self._events.now)
        self._begin_step(engine)

    def _change_role(self, effect: SetRole) -> None:
        engine = self._reach(effect.instance_id)
        if engine is not None:
            engine.set_role(effect.role, effect.itl_target_s, self._events.now)

    def _drop_saved(self, effect: Forget) -> None:
        engine = self._reach(effect.instance_id)
        if engine is not None:
            engine.forget(effect.request_id, self._events.now)

    def _begin_drain(self, effect: Drain) -> None:
        engine = self._reach(effect.instance_id)
        if engine is None:
            return
        if engine.state is InstanceState.READY:
            engine.drain(self._events.now)
        else:
            engine.state = InstanceState.DRAINING
        self._exit_if_spent(engine)

    def _reach(self, instance_id: int) -> EngineInstance | None:
        """The engine of that id, None once its process has ended. Raises RuntimeError for an id that
        never was."""
        engine = self._engines.get(instance_id)
        if engine is None and instance_id not in self._ended:
            raise RuntimeError(f"the fleet policy names instance {instance_id}, which it never launched")
        if engine is not None:
            self._stop_coasting(engine)
        return engine

    # The lives of engines.

    def _new_engine(self, launch: Launch) -> EngineInstance:
        life = InstanceLife(launch.instance_id, self._profile.gpus, self._events.now, math.nan, math.nan)
        self._result.instances.append(life)
        engine = EngineInstance(
            launch.instance_id, self._setup, life, self._book, self._result.itl, self._send_to_fleet
        )
        engine.set_role(launch.role, launch.itl_target_s, self._events.now)
        self._engines[launch.instance_id] = engine
        return engine

    def _loaded(self, payload: tuple[EngineInstance, LaunchFate]) -> None:
        engine, fate = payload
        if engine.state is not InstanceState.LOADING:
            return
        if not fate.fails:
            self._ready(engine)
            self._send_to_fleet(InstanceReady(engine.instance_id))
            return
        engine.life.failed = True
        self._result.failed_launches += 1
        self._end(engine)
        cause = "the process ended while it loaded the model"
        self._send_end(LaunchFailed(engine.instance_id, cause), self._settings.rpc_delay_s)

    def _ready(self, engine: EngineInstance) -> None:
        now, settings = self._events.now, self._settings
        engine.start(now)
        life_s = self._dice.life_s()
        if math.isfinite(life_s):
            self._events.add(now + life_s, self._lose, engine)
        phase = engine.instance_id * GOLDEN_RATIO % 1.0
        self._events.add(now + settings.telemetry_s * (1.0 - phase), self._report, engine)

    def _lose(self, engine: EngineInstance) -> None:
        if engine.core is None:
            return
        engine.stop_coasting(self._events.now)
        produced = engine.lose(self._events.now)
        self._end(engine)
        self._result.lost_instances += 1
        detection_s = max(self._settings.faults.detection_s, self._settings.rpc_delay_s)
        self._send_end(InstanceLost(engine.instance_id, produced), detection_s)

    def _exit_if_spent(self, engine: EngineInstance) -> None:
        if engine.is_spent:
            self._end(engine)
            self._send_end(InstanceExited(engine.instance_id), self._settings.rpc_delay_s)

    def _end(self, engine: EngineInstance) -> None:
        self._count(engine)
        engine.end(self._events.now)
        del self._engines[engine.instance_id]
        self._ended.add(engine.instance_id)

    def _count(self, engine: EngineInstance) -> None:
        if engine.core is not None:
            self._result.steps += engine.core.scheduler.step
            self._result.preemptions += engine.core.scheduler.num_preemptions

    # Steps of engines.

    def _begin_step(self, engine: EngineInstance) -> None:
        events = self._events
        engine.begin_step(events.next_time() if self._settings.fast_forward else events.now)
        self._await_step(engine)

    def _await_step(self, engine: EngineInstance) -> None:
        if engine.due is not None and engine.due != engine.awaited:
            engine.awaited = engine.due
            self._events.add_step(engine.due, engine.instance_id, self._complete_step, engine)

    def _complete_step(self, engine: EngineInstance) -> None:
        if engine.core is None or engine.due != self._events.now:
            return  # it has ended, or was disturbed while it coasted
        engine.awaited = None
        engine.complete_step(self._events.now)
        self._begin_step(engine)
        self._exit_if_spent(engine)

    def _stop_coasting(self, engine: EngineInstance) -> None:
        """Something comes in."""
        if engine.is_coasting:
            engine.stop_coasting(self._events.now)
            self._await_step(engine)

    def _report(self, engine: EngineInstance) -> None:
        if engine.core is None:
            return
        self._stop_coasting(engine)
        self._send_to_fleet(engine.report(self._events.now))
        self._events.add(self._events.now + self._settings.telemetry_s, self._report, engine)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Without the cycle collector, which finds nothing here and looks at everything."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

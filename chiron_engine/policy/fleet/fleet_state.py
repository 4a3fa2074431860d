"""The fleet as a reducer: events in, effects out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .capacity import CapacityModel
from .config import FleetConfig
from .dispatcher import Dispatcher, Effects
from .fleet_view import Decision, GlobalAutoscaler
from .instances import Instances
from .messages import (
    FleetEffect,
    FleetEvent,
    FleetGauges,
    FleetResized,
    InstanceExited,
    InstanceJoined,
    InstanceLost,
    InstanceReady,
    InstanceReported,
    InstanceSpec,
    InstanceState,
    Launch,
    LaunchFailed,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFinished,
    RetireAsked,
    Role,
    Tick,
)
from .router import Router
from .scaling import Scaling

NO_DECISION = Decision(
    pools=(), batch=0, busy=0.0, theta=1.0, interactive_backpressure=0.0, batch_backpressure=0
)
"""What gauges show before the first tick."""


class FleetState:
    """What a coordinator knows and decides. Requests go through `dispatcher`, instances through
    `scaling`; both work on the same book-keeping. Events of unknown requests and instances are
    late news of what has ended, and change nothing."""

    def __init__(self, spec: InstanceSpec, config: FleetConfig, autoscaler: GlobalAutoscaler) -> None:
        self.instances = Instances()
        self.model = CapacityModel(spec, config)
        self.router = Router(config, self.model)
        lead_s = spec.load_s + config.tick_s
        self.dispatcher = Dispatcher(config, self.model, self.instances, self.router, lead_s)
        self.scaling = Scaling(config, self.model, self.instances, self.dispatcher, self.router, autoscaler)
        self._handlers: dict[type, Callable[[Any, float, Effects], None]] = {
            RequestArrived: self._on_arrived,
            RequestFinished: self._on_finished,
            RequestEvicted: self._on_evicted,
            RequestCancelled: self._on_cancelled,
            InstanceReady: self._on_ready,
            InstanceJoined: self._on_joined,
            RetireAsked: self._on_retire_asked,
            FleetResized: self._on_resized,
            LaunchFailed: self._on_launch_failed,
            InstanceLost: self._on_lost,
            InstanceExited: self._on_exited,
            InstanceReported: self._on_reported,
            Tick: self._on_tick,
        }

    @property
    def has_work(self) -> bool:
        """Whether an accepted request has not ended."""
        return bool(self.dispatcher.tracked)

    def start(self, instances: int, now: float) -> list[Launch]:
        """Launch mixed instances that the interpreter makes ready at once. Raises ValueError if the
        GPU cap does not hold them."""
        return self.scaling.launch_initial(instances, now)

    def handle(self, event: FleetEvent, now: float) -> list[FleetEffect]:
        out: Effects = []
        self._handlers[type(event)](event, now, out)
        return out

    def gauges(self, now: float) -> FleetGauges:
        ready = self.instances.ready
        decision = self.scaling.decision or NO_DECISION
        return FleetGauges(
            interactive=len(ready[Role.INTERACTIVE]),
            mixed=len(ready[Role.MIXED]),
            batch=len(ready[Role.BATCH]),
            loading=self.instances.num_loading,
            draining=self.instances.num_draining,
            busy=decision.busy,
            theta=decision.theta,
            interactive_backpressure=decision.interactive_backpressure,
            batch_backpressure=decision.batch_backpressure,
            target=sum(pool.total for pool in decision.pools),
            batch_target=decision.batch,
            held_interactive=len(self.dispatcher.held),
            queued_batch=self.dispatcher.queue.num_queued,
        )

    def _on_arrived(self, event: RequestArrived, now: float, out: Effects) -> None:
        self.dispatcher.arrive(event.request, now, out)

    def _on_finished(self, event: RequestFinished, now: float, out: Effects) -> None:
        self.dispatcher.finish(event.request_id, event.output_tokens, now, out)

    def _on_evicted(self, event: RequestEvicted, now: float, out: Effects) -> None:
        self.dispatcher.evicted(event.request_id, event.produced, event.saved_tokens, now, out)

    def _on_cancelled(self, event: RequestCancelled, now: float, out: Effects) -> None:
        self.dispatcher.cancel(event.request_id, now, out)

    def _on_ready(self, event: InstanceReady, now: float, out: Effects) -> None:
        instance = self.instances.by_id.get(event.instance_id)
        if instance is not None and instance.state is InstanceState.LOADING:
            self.scaling.ready(instance, now, out)

    def _on_joined(self, event: InstanceJoined, now: float, out: Effects) -> None:
        if event.instance_id != self.instances.next_id:
            raise ValueError(
                f"instance {event.instance_id} joins; the next new one is {self.instances.next_id}"
            )
        self.scaling.join(event.role, event.itl_target_s, now)

    def _on_retire_asked(self, event: RetireAsked, now: float, out: Effects) -> None:
        instance = self.instances.by_id.get(event.instance_id)
        if instance is not None and instance.state is not InstanceState.DRAINING:
            self.scaling.retire(instance, now, out)

    def _on_resized(self, event: FleetResized, now: float, out: Effects) -> None:
        self.scaling.resize(event.min_instances, event.max_gpus)

    def _on_launch_failed(self, event: LaunchFailed, now: float, out: Effects) -> None:
        instance = self.instances.by_id.get(event.instance_id)
        if instance is not None:
            self.scaling.launch_failed(instance, now, out)

    def _on_lost(self, event: InstanceLost, now: float, out: Effects) -> None:
        self.scaling.gone(event.instance_id, event.produced, now, out)

    def _on_exited(self, event: InstanceExited, now: float, out: Effects) -> None:
        self.scaling.gone(event.instance_id, {}, now, out)

    def _on_reported(self, event: InstanceReported, now: float, out: Effects) -> None:
        instance = self.instances.by_id.get(event.instance_id)
        if instance is None or instance.state is InstanceState.LOADING:
            return
        if event.last_step is not None:
            self.model.learn(event.last_step, instance.load)
        instance.max_running = event.max_running
        instance.batch_paused = False
        self.dispatcher.take_in_report(instance, event.batch_tokens_total, now)
        self.dispatcher.fill(instance, now, out)

    def _on_tick(self, event: Tick, now: float, out: Effects) -> None:
        self.scaling.tick(now, out)

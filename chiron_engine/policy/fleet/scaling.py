"""The tick: shows the fleet to the global autoscaler and carries out what it decides, launches, roles,
closing and draining."""

from __future__ import annotations

import math
from dataclasses import replace

from chiron_engine.policy.iteration.request import SloClass

from .capacity import CapacityModel
from .config import FleetConfig
from .demand import MOST_BACKLOG
from .dispatcher import Dispatcher, Effects
from .fleet_view import BatchView, Decision, FleetView, GlobalAutoscaler, PoolView
from .instances import Instance, Instances
from .load_lead import LoadLead
from .messages import Drain, InstanceState, Launch, Role, SetRole
from .reconcile import CLOSE, OPEN, Order, Reconciler
from .request_groups import group_work
from .resize import capped
from .router import Router
from .waiting_time import Throughput

MOST_CLOSING_S = 120.0
"""How long a closing instance may finish its work before batch requests are taken back from it."""
MOST_BACKOFF_S = 60.0
BACKOFF_JITTER = 0.2
MOST_FAILED_LAUNCHES = 5
"""In a row; from then on there is one attempt every FAILED_PAUSE_S, or when the operator resizes."""
FAILED_PAUSE_S = 300.0
GOLDEN_RATIO = 0.6180339887498949
THROUGHPUT_CV = 0.05
"""cv_T of the waiting time: how far the throughput to come may stray from the one measured."""


class Scaling:
    """Lives of instances from launch to exit, decided once a tick.

    An instance not needed is first closed: it gets no more requests, ends those it has, and may be
    opened again. Once it is empty, or after MOST_CLOSING_S, it is drained, which is for good.
    """

    def __init__(
        self,
        config: FleetConfig,
        model: CapacityModel,
        instances: Instances,
        dispatcher: Dispatcher,
        router: Router,
        autoscaler: GlobalAutoscaler,
    ) -> None:
        self._config = config
        self._model = model
        self._instances = instances
        self._dispatcher = dispatcher
        self._router = router
        self._autoscaler = autoscaler
        self._most = config.max_gpus // model.spec.gpus
        self._lead = LoadLead(model.spec.load_s, config.tick_s)
        self._no_launch_before = 0.0
        self._failed_at = -math.inf
        self.failed_launches = 0
        """In a row, up to MOST_FAILED_LAUNCHES; those under way together count as one."""
        self.decision: Decision | None = None

    def launch_initial(self, count: int, now: float) -> list[Launch]:
        if not 0 <= count <= self._most:
            raise ValueError(f"{count} instances to start with; the GPU cap holds 0 to {self._most}")
        launches = []
        for _ in range(count):
            instance, launch = self._launch(Role.MIXED, self._config.itl_targets_s[0], now)
            instance.is_initial = True
            launches.append(launch)
        return launches

    def tick(self, now: float, out: Effects) -> None:
        self._follow_model()
        self._dispatcher.serve_held(now, out)
        self._dispatcher.throughput.forget_old(self._config.tick_s)
        view = self._view(now)
        self.decision = self._autoscaler.decide(view)
        decision = self.decision
        if sum(not instance.closing for instance in self._instances.staying()) > self._most:
            decision = capped(decision, self._most)  # the cap has been lowered
        for order in list(Reconciler(self._instances, self._free_launches(now)).orders(decision)):
            self._carry_out(order, now, out)
        self._drain_closed(now, out)
        self._fill_all(now, out)

    def ready(self, instance: Instance, now: float, out: Effects) -> None:
        if not instance.is_initial:
            self._lead.observe(now - instance.launched_at)
        self.failed_launches = 0
        self._instances.set_ready(instance)
        self._router.refresh(instance)
        self._dispatcher.serve_held(now, out)
        self._dispatcher.fill(instance, now, out)

    def join(self, role: Role, target_s: float, now: float) -> None:
        """An instance that was not launched, under the next id. Its load time tells nothing."""
        instance, _ = self._launch(role, target_s, now)
        instance.is_initial = True

    def retire(self, instance: Instance, now: float, out: Effects) -> None:
        """Drain it, whatever it has to do."""
        if not instance.closing:
            self._close(instance, now)
        self._drain(instance, out)

    def launch_failed(self, instance: Instance, now: float, out: Effects) -> None:
        """The next launch waits: twice as long after each failure in a row."""
        if instance.launched_at > self._failed_at:
            self._failed_at = now
            self.failed_launches = min(self.failed_launches + 1, MOST_FAILED_LAUNCHES)
            backoff_s = min(MOST_BACKOFF_S, self._config.tick_s * 2**self.failed_launches)
            wait_s = FAILED_PAUSE_S if self.has_given_up else backoff_s
            self._no_launch_before = now + wait_s * _jitter(instance.instance_id)
        self.gone(instance.instance_id, {}, now, out)

    @property
    def has_given_up(self) -> bool:
        """Whether failures have stopped launches, but for an attempt now and then."""
        return self.failed_launches >= MOST_FAILED_LAUNCHES

    def resize(self, min_instances: int, max_gpus: int) -> None:
        self._config = replace(self._config, min_instances=min_instances, max_gpus=max_gpus)
        self._most = max_gpus // self._model.spec.gpus
        self.failed_launches = 0
        self._no_launch_before = 0.0

    def gone(self, instance_id: int, produced: dict[int, int], now: float, out: Effects) -> None:
        instance = self._instances.by_id.get(instance_id)
        if instance is None:
            return
        instance.closing = True
        self._instances.remove(instance)
        self._dispatcher.lose(instance, produced, now, out)

    def _launch(self, role: Role, target_s: float, now: float) -> tuple[Instance, Launch]:
        spec = self._model.spec
        instance = self._instances.launch(role, target_s, self._model.kv_capacity, spec.max_slots, now)
        instance.room_s = self._model.room_s(target_s)
        return instance, Launch(instance.instance_id, role, target_s)

    def _free_launches(self, now: float) -> int:
        if now < self._no_launch_before:
            return 0
        free = max(0, self._most - len(self._instances))
        if self.has_given_up:
            free = min(free, 1)
        return free

    def _carry_out(self, order: Order, now: float, out: Effects) -> None:
        if order.instance is None:
            out.append(self._launch(order.role, order.target_s, now)[1])
        elif order.action == CLOSE:
            self._close(order.instance, now)
        elif order.action == OPEN:
            order.instance.closing = False
            self._router.refresh(order.instance)
        else:
            self._dispatcher.set_role(order.instance, order.role, order.target_s)
            out.append(SetRole(order.instance.instance_id, order.role, order.target_s))

    def _close(self, instance: Instance, now: float) -> None:
        instance.closing = True
        instance.closing_since = now
        self._dispatcher.withdraw(instance)

    def _drain_closed(self, now: float, out: Effects) -> None:
        for instance in self._instances.staying():
            overdue = now - instance.closing_since >= MOST_CLOSING_S
            if instance.closing and (instance.is_empty or overdue):
                self._drain(instance, out)

    def _drain(self, instance: Instance, out: Effects) -> None:
        self._dispatcher.release_saved(instance, out)
        self._instances.set_draining(instance)
        out.append(Drain(instance.instance_id))

    def _follow_model(self) -> None:
        """Loads under the step model of now."""
        for instance in self._instances.by_id.values():
            instance.room_s = self._model.room_s(instance.target_s)
            instance.refresh_load()
            self._router.refresh(instance)

    def _fill_all(self, now: float, out: Effects) -> None:
        if not self._dispatcher.queue.num_queued:
            return
        for role in (Role.BATCH, Role.MIXED):
            for instance in list(self._instances.ready[role].values()):
                self._dispatcher.fill(instance, now, out)

    def _view(self, now: float) -> FleetView:
        pools = [self._pool_view(target, now) for target in self._config.itl_targets_s]
        least = self._config.min_instances
        return FleetView(now, self._lead.seconds, self._most, pools, self._batch_view(now), least)

    def _pool_view(self, target_s: float, now: float) -> PoolView:
        dispatcher = self._dispatcher
        pool = [
            instance
            for instance in self._instances.staying()
            if instance.role is not Role.BATCH and instance.target_s == target_s and not instance.closing
        ]
        loading = [self._ready_in(i, now) for i in pool if i.state is InstanceState.LOADING]
        arrived = dispatcher.take_arrived(target_s)
        return PoolView(
            target_s=target_s,
            instances=len(pool),
            busy_instances=sum(bool(instance.interactive) for instance in pool),
            load=sum(min(1.0, instance.load) for instance in pool),
            backlog=_backlog(pool, dispatcher.held_load(target_s)),
            arrived_work_s=arrived.work_s,
            arrived_squares=arrived.squares,
            arrived_load=arrived.load,
            loading=len(loading),
            next_ready_s=min(loading, default=self._lead.seconds),
        )

    def _batch_view(self, now: float) -> BatchView:
        queue, outputs = self._dispatcher.queue, self._dispatcher.outputs[SloClass.BATCH]
        groups = [group_work(group, self._model, outputs) for group in queue.groups()]
        return BatchView(groups, self._batch_throughput(now), queue.num_queued)

    def _batch_throughput(self, now: float) -> Throughput:
        batch = [i for i in self._instances.staying() if i.role is Role.BATCH and not i.closing]
        ready_in = sorted(self._ready_in(instance, now) for instance in batch)
        mixed = self._instances.ready[Role.MIXED].values()
        free = sum(max(0.0, 1.0 - instance.load) for instance in mixed if instance.is_open)
        measured = self._dispatcher.throughput
        return Throughput(measured.spare_rate * free, measured.rate, tuple(ready_in), THROUGHPUT_CV)

    def _ready_in(self, instance: Instance, now: float) -> float:
        if instance.state is InstanceState.READY:
            return 0.0
        return max(self._config.tick_s, instance.launched_at + self._lead.seconds - now)


def _jitter(instance_id: int) -> float:
    """About 1, another one for each instance, and the same one in a replay."""
    return 1.0 + BACKOFF_JITTER * (2.0 * (GOLDEN_RATIO * instance_id % 1.0) - 1.0)


def _backlog(pool: list[Instance], held: float) -> float:
    """u of what is held, or over 1 on an instance, in bounds."""
    fits = sum(min(1.0, instance.load) for instance in pool)
    backlog = held + sum(max(0.0, instance.load - 1.0) for instance in pool)
    return min(backlog, MOST_BACKLOG * max(1.0, fits))

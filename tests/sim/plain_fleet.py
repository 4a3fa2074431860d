"""A fleet policy for tests of the world: simple enough to be right by reading, and it can be told
what to do when."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetEffect,
    FleetEvent,
    FleetGauges,
    FleetRequest,
    Forget,
    InstanceExited,
    InstanceLost,
    InstanceReady,
    InstanceSpec,
    Launch,
    LaunchFailed,
    RequestArrived,
    RequestEvicted,
    RequestFinished,
    Role,
    Route,
    Tick,
)
from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.sim_policy import SimPolicy

Script = dict[float, list[FleetEffect]]


class PlainFleet:
    """Keeps `size` instances and sends each request to the ready one that has the fewest; at most
    `batch_each` batch requests on one. A request with saved KV goes home where home has room.
    `script` adds effects at the first tick from a time on."""

    def __init__(
        self, spec: InstanceSpec, config: FleetConfig, size: int, batch_each: int, script: Script
    ) -> None:
        self.itl_s = config.itl_targets_s[0]
        self.size = size
        self.batch_each = batch_each
        self.script = dict(script)
        self.launched = 0
        self.loading: set[int] = set()
        self.ready: dict[int, dict[int, FleetRequest]] = {}
        self.leaving: dict[int, dict[int, FleetRequest]] = {}
        self.queue: dict[int, FleetRequest] = {}
        self.events: list[FleetEvent] = []

    def start(self, instances: int, now: float) -> list[Launch]:
        return [self._launch() for _ in range(instances)]

    def handle(self, event: FleetEvent, now: float) -> Iterable[FleetEffect]:
        self.events.append(event)
        effects: list[FleetEffect] = []
        match event:
            case RequestArrived(request):
                self.queue[request.request_id] = request
            case RequestFinished(request_id, _):
                self._take(request_id)
            case RequestEvicted(request_id, produced, saved_tokens):
                request, instance = self._take(request_id)
                request.produced = produced
                request.evictions += 1
                request.home = instance if saved_tokens else None
                self.queue[request_id] = request
            case InstanceReady(instance_id):
                self.loading.discard(instance_id)
                self.ready[instance_id] = {}
            case LaunchFailed(instance_id, _):
                self.loading.discard(instance_id)
            case InstanceLost(instance_id, produced_by):
                lost = self.ready.pop(instance_id, None) or self.leaving.pop(instance_id, {})
                for request in lost.values():
                    request.produced = produced_by.get(request.request_id, request.produced)
                    self.queue[request.request_id] = request
                self._forget_home(instance_id)
            case InstanceExited(instance_id):
                self.leaving.pop(instance_id, None)
                self.loading.discard(instance_id)
                self._forget_home(instance_id)
            case Tick():
                effects += self._scripted(now)
                missing = self.size - len(self.ready) - len(self.loading)
                effects += [self._launch() for _ in range(missing)]
        return [*effects, *self._route()]

    def gauges(self, now: float) -> FleetGauges:
        return FleetGauges(
            0, len(self.ready), 0, len(self.loading), len(self.leaving), 0, 1, 0, 0, 0, 0, 0, 0
        )

    def _launch(self) -> Launch:
        self.launched += 1
        self.loading.add(self.launched - 1)
        return Launch(self.launched - 1, Role.MIXED, self.itl_s)

    def _scripted(self, now: float) -> list[FleetEffect]:
        effects = []
        for when in [when for when in self.script if when <= now]:
            for effect in self.script.pop(when):
                if isinstance(effect, Drain) and effect.instance_id in self.ready:
                    self.leaving[effect.instance_id] = self.ready.pop(effect.instance_id)
                    self._forget_home(effect.instance_id)
                effects.append(effect)
        return effects

    def _route(self) -> list[FleetEffect]:
        effects: list[FleetEffect] = []
        if not self.ready:
            return effects
        for request in [*self.queue.values()]:
            instance = self._place(request)
            if instance is None:
                continue
            if request.home is not None and request.home != instance:
                effects.append(Forget(request.request_id, request.home))
            request.home = None
            self.ready[instance][request.request_id] = self.queue.pop(request.request_id)
            effects.append(Route(request.request_id, instance, request.evictions))
        return effects

    def _place(self, request: FleetRequest) -> int | None:
        if request.slo.slo_class is SloClass.INTERACTIVE:
            return min(self.ready, key=lambda i: (len(self.ready[i]), i))
        room = {i: self._batch_on(i) for i in self.ready if self._batch_on(i) < self.batch_each}
        if request.home in room:
            return request.home
        return min(room, key=lambda i: (room[i], i), default=None)

    def _batch_on(self, instance: int) -> int:
        return sum(r.slo.slo_class is SloClass.BATCH for r in self.ready[instance].values())

    def _take(self, request_id: int) -> tuple[FleetRequest, int]:
        for instance, requests in (*self.ready.items(), *self.leaving.items()):
            if request_id in requests:
                return requests.pop(request_id), instance
        raise AssertionError(f"request {request_id} is on no instance")

    def _forget_home(self, instance_id: int) -> None:
        for request in self.queue.values():
            if request.home == instance_id:
                request.home = None


def plain_policy(
    size: int = 1,
    batch_each: int = 16,
    script: Script | None = None,
    local_autoscaler: str = "adaptive",
    made: Callable[[PlainFleet], None] = lambda fleet: None,
) -> SimPolicy:
    """`made` is given the fleet of the run."""

    def make_fleet(spec: InstanceSpec, config: FleetConfig) -> PlainFleet:
        fleet = PlainFleet(spec, config, size, batch_each, script or {})
        made(fleet)
        return fleet

    return SimPolicy(f"plain:{size}", local_autoscaler, make_fleet)

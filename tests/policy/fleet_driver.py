"""A fleet's surroundings for tests: obeys the effects of a FleetState and checks each of them."""

from __future__ import annotations

from chiron_engine.policy.fleet.autoscalers import make_global_autoscaler
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.fleet_state import FleetState
from chiron_engine.policy.fleet.messages import (
    Drain,
    FleetEffect,
    FleetEvent,
    FleetRequest,
    Forget,
    InstanceExited,
    InstanceLost,
    InstanceReady,
    InstanceReported,
    InstanceSpec,
    Launch,
    LaunchFailed,
    Reject,
    RequestArrived,
    RequestCancelled,
    RequestEvicted,
    RequestFinished,
    Role,
    Route,
    SetRole,
    Tick,
)
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.policy.iteration.step_costs import StepCosts

SPEC = InstanceSpec(
    costs=StepCosts(6e-3, 1e-5, 4e-8, 2e-5, 5e-10),
    kv_capacity_tokens=400_000,
    max_slots=512,
    max_model_len=32_768,
    load_s=45.0,
)


def interactive(request_id: int, now: float, prompt: int = 1000, **slo: float) -> FleetRequest:
    return FleetRequest(request_id, Slo(SloClass.INTERACTIVE, **slo), now, prompt, 4096)


def batch(request_id: int, now: float, deadline: float, prompt: int = 1000) -> FleetRequest:
    return FleetRequest(request_id, Slo(SloClass.BATCH, 3600.0, 2.0, deadline), now, prompt, 4096)


class FleetDriver:
    """loading, ready and draining: ids of instances. on: where each routed request runs. saved:
    instances that keep KV of a request. ended: requests that finished, by count."""

    def __init__(
        self, policy: str = "chiron", config: FleetConfig | None = None, spec: InstanceSpec = SPEC
    ) -> None:
        self.config = config or FleetConfig(max_gpus=16)
        self.fleet = FleetState(spec, self.config, make_global_autoscaler(policy, self.config, spec))
        self.now = 0.0
        self.loading: dict[int, float] = {}
        self.ready: dict[int, Role] = {}
        self.draining: dict[int, None] = {}
        self.accepted: dict[int, FleetRequest] = {}
        self.on: dict[int, int] = {}
        self.saved: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.rejected: dict[int, str] = {}
        self.launches: list[tuple[float, Launch]] = []
        self.drains: list[tuple[float, Drain]] = []
        self.role_changes: list[tuple[float, SetRole]] = []

    def start(self, instances: int) -> FleetDriver:
        for launch in self.fleet.start(instances, self.now):
            self.ready[launch.instance_id] = launch.role
            self.send(InstanceReady(launch.instance_id))
        return self

    def send(self, event: FleetEvent) -> list[FleetEffect]:
        effects = self.fleet.handle(event, self.now)
        for effect in effects:
            self._obey(effect)
        return effects

    # What happens to a fleet.

    def arrive(self, request: FleetRequest) -> list[FleetEffect]:
        self.accepted[request.request_id] = request
        return self.send(RequestArrived(request))

    def finish(self, request_id: int, output_tokens: int = 200) -> None:
        del self.on[request_id]
        self.ended[request_id] = self.ended.get(request_id, 0) + 1
        self.send(RequestFinished(request_id, output_tokens))

    def cancel(self, request_id: int) -> None:
        self.on.pop(request_id, None)
        self.ended[request_id] = self.ended.get(request_id, 0) + 1
        self.send(RequestCancelled(request_id))

    def evict(self, request_id: int, produced: int = 10, saved: int = 1000) -> list[FleetEffect]:
        instance = self.on.pop(request_id)
        if saved:
            self.saved[request_id] = instance
        return self.send(RequestEvicted(request_id, produced, saved))

    def become_ready(self, instance_id: int) -> None:
        del self.loading[instance_id]
        self.ready[instance_id] = self.fleet.instances.by_id[instance_id].role
        self.send(InstanceReady(instance_id))

    def fail_launch(self, instance_id: int) -> None:
        del self.loading[instance_id]
        self.send(LaunchFailed(instance_id, "no memory"))

    def lose(self, instance_id: int, produced: dict[int, int] | None = None) -> None:
        self.ready.pop(instance_id, None)
        self.draining.pop(instance_id, None)
        self._drop_requests(instance_id)
        self.send(InstanceLost(instance_id, produced or {}))

    def exit(self, instance_id: int) -> None:
        """A draining instance gives its batch requests back, then ends."""
        for request_id in [r for r, i in self.on.items() if i == instance_id and self._is_batch(r)]:
            self.evict(request_id, saved=0)
        if instance_id in self.on.values():
            return
        del self.draining[instance_id]
        self._drop_requests(instance_id)
        self.send(InstanceExited(instance_id))

    def report(self, instance_id: int, max_running: int = 512, tokens: int = 0) -> None:
        mine = [r for r, i in self.on.items() if i == instance_id]
        batch_running = sum(self._is_batch(r) for r in mine)
        self.send(
            InstanceReported(
                instance_id=instance_id,
                running_interactive=len(mine) - batch_running,
                running_batch=batch_running,
                waiting=0,
                kv_tokens=0,
                max_running=max_running,
                token_budget=8192,
                itl_s=0.01,
                batch_tokens_total=tokens,
                output_tokens_total=tokens,
                preemptions_total=0,
            )
        )

    def tick(self) -> list[FleetEffect]:
        self.now += self.config.tick_s
        return self.send(Tick())

    def run_ticks(self, count: int, load_s: float = 45.0) -> None:
        """Time passes: launches succeed after `load_s`, drained instances exit."""
        for _ in range(count):
            self.tick()
            for instance_id in [i for i, at in self.loading.items() if self.now >= at + load_s]:
                self.become_ready(instance_id)
            for instance_id in list(self.draining):
                self.exit(instance_id)

    # Checks.

    def check_places(self) -> None:
        """Every accepted request is in exactly one place, and the books agree with the world."""
        dispatcher = self.fleet.dispatcher
        open_ones = {r for r in self.accepted if r not in self.ended and r not in self.rejected}
        assert set(dispatcher.tracked) == open_ones
        on = {}
        for instance in self.fleet.instances.by_id.values():
            for request_id in (*instance.interactive, *instance.batch):
                assert request_id not in on
                on[request_id] = instance.instance_id
        assert on == self.on
        queued = {r for r, t in dispatcher.tracked.items() if t.is_queued}
        held = set(dispatcher.held)
        assert not queued & held and not (queued | held) & set(on)
        assert queued | held | set(on) == open_ones
        assert dispatcher.queue.num_queued == len(queued)
        in_groups = sum(group.queued.count + group.running.count for group in dispatcher.queue.groups())
        assert in_groups == sum(self._is_batch(r) for r in open_ones)
        assert len(self.fleet.instances) <= self.config.max_gpus

    def _is_batch(self, request_id: int) -> bool:
        return self.accepted[request_id].slo.slo_class is SloClass.BATCH

    def _drop_requests(self, instance_id: int) -> None:
        self.on = {r: i for r, i in self.on.items() if i != instance_id}
        self.saved = {r: i for r, i in self.saved.items() if i != instance_id}

    def _obey(self, effect: FleetEffect) -> None:
        if isinstance(effect, Route):
            request_id, instance_id = effect.request_id, effect.instance_id
            assert request_id not in self.on, "it runs already"
            assert request_id not in self.ended and request_id not in self.rejected
            assert instance_id in self.ready, "only a ready instance takes requests"
            home = self.saved.pop(request_id, instance_id)
            assert home == instance_id, "KV saved elsewhere was not dropped"
            self.on[request_id] = instance_id
        elif isinstance(effect, Forget):
            assert self.saved.pop(effect.request_id) == effect.instance_id
        elif isinstance(effect, Reject):
            assert effect.request_id not in self.rejected
            self.rejected[effect.request_id] = effect.reason
        elif isinstance(effect, Launch):
            self.loading[effect.instance_id] = self.now
            self.launches.append((self.now, effect))
        elif isinstance(effect, SetRole):
            self.role_changes.append((self.now, effect))
            if effect.instance_id in self.ready:
                self.ready[effect.instance_id] = effect.role
        else:
            self.drains.append((self.now, effect))
            self.loading.pop(effect.instance_id, None)
            self.ready.pop(effect.instance_id, None)
            self.draining[effect.instance_id] = None

"""Where every accepted request is, and where it goes next.

Each is in exactly one place: held (interactive, waiting for room within its TTFT slack), queued
(batch), on one instance, or ended and forgotten. A held one is late once it has waited its share of the
slack: it then goes to the least loaded instance, or is refused (`FleetConfig.admission`). It is lost once
its first token comes too late whatever is done: those that are not go before it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from chiron_engine.policy.iteration.request import SloClass

from .batch_queue import BatchQueue
from .batch_throughput import BatchThroughput
from .capacity import CapacityModel
from .config import FleetConfig
from .instances import Instance, Instances, Tracked
from .messages import FleetEffect, FleetRequest, Forget, InstanceState, Reject, Role, Route, SetRole
from .output_estimate import OutputEstimate
from .router import Router

HELD_SHARE = 0.5
"""Of its TTFT slack, how long an interactive request waits for an instance with room."""
MOST_FAILURES = 16
"""Held requests that find no room before the others are not tried: they are much alike, and many may
be held."""
MOST_LATE_LOAD = 4.0
MOST_BACKLOG_TICKS = 2.0
"""An instance over this load, or with prompts for more ticks than that (or than the TTFT slack), is
given no interactive request beyond its room: it would wait there while others become ready."""
RAMP_S = 20.0
"""Seconds that an instance new to batch work spends on prompts before tokens come at their rate."""

Effects = list[FleetEffect]


@dataclass(slots=True)
class Arrived:
    """Of interactive requests that came in some time: their work in seconds of one full instance, the
    sum of its squares, and the u they take."""

    work_s: float = 0.0
    squares: float = 0.0
    load: float = 0.0


class Dispatcher:
    """Routes requests at their arrival and whenever room appears. Effects are appended to `out`.

    Interactive ones are never queued (section 3): the router finds an instance, or a batch one is
    turned mixed; where neither is, they are held for a share of their TTFT slack. Batch ones join
    the global queue, from which instances with room are filled.
    """

    def __init__(
        self, config: FleetConfig, model: CapacityModel, instances: Instances, router: Router, lead_s: float
    ) -> None:
        self._config = config
        self._model = model
        self._instances = instances
        self._router = router
        self._lead_s = lead_s
        self.queue = BatchQueue(lead_s)
        self.throughput = BatchThroughput(model, max(config.window_s, lead_s))
        self.outputs = {cls: OutputEstimate(config.prior_output_tokens) for cls in SloClass}
        self.tracked: dict[int, Tracked] = {}
        # Ordered, since the first of a plain dict is found past all those deleted before it.
        self.held: OrderedDict[int, Tracked] = OrderedDict()
        self._arrived = {target: Arrived() for target in config.itl_targets_s}
        self._with_room: dict[Role, dict[int, Instance]] = {Role.BATCH: {}, Role.MIXED: {}}

    # Requests.

    def arrive(self, request: FleetRequest, now: float, out: Effects) -> None:
        reason = self._refusal(request)
        if reason is not None:
            out.append(Reject(request.request_id, reason))
            return
        tracked = self.tracked[request.request_id] = Tracked(request)
        if request.slo.slo_class is SloClass.BATCH:
            self.queue.join(tracked, self._deadline(request), now)
            self._offer_batch(now, out)
            return
        self._count_arrival(request)
        # No more waiting than its prompt leaves room for.
        prefill_s = self._model.costs.prefill_s(request.prompt_tokens)
        tracked.force_at = request.arrival + HELD_SHARE * max(0.0, request.slo.ttft_s - prefill_s)
        self._serve_interactive(tracked, now, out)

    def finish(self, request_id: int, output_tokens: int, now: float, out: Effects) -> None:
        """Also of one that waits for a place again: its engine was lost before its end was told."""
        tracked = self.tracked.get(request_id)
        if tracked is None:
            return
        self._drop_saved(tracked, out)
        request = tracked.request
        self.outputs[request.slo.slo_class].observe(output_tokens)
        if request.slo.slo_class is SloClass.BATCH:
            self.throughput.request_finished(request.prompt_tokens, output_tokens)
        self._leave(tracked, now, out)

    def cancel(self, request_id: int, now: float, out: Effects) -> None:
        tracked = self.tracked.get(request_id)
        if tracked is None:
            return
        self._drop_saved(tracked, out)
        self._leave(tracked, now, out)

    def evicted(self, request_id: int, produced: int, saved: int, now: float, out: Effects) -> None:
        """An engine gave a request back; the instance is offered nothing more until it reports."""
        tracked = self.tracked.get(request_id)
        if tracked is None or tracked.instance is None:
            return
        instance = tracked.instance
        if instance.state is not InstanceState.DRAINING:
            tracked.request.evictions += 1
        keeps = saved > 0 and instance.is_open and tracked.group is not None
        if saved > 0 and not keeps:
            out.append(Forget(request_id, instance.instance_id))
        self._take_off(tracked)
        instance.batch_paused = True
        self._serve_again(tracked, produced, instance.instance_id if keeps else None, now, out)

    # Instances.

    def fill(self, instance: Instance, now: float, out: Effects) -> None:
        """Give the instance the batch requests it has room for."""
        if instance.role is Role.INTERACTIVE:
            return
        while True:
            tracked = self.queue.peek(instance.instance_id, now)
            if tracked is None:
                if self._router.has_batch_room(instance, added_s=0.0, kv_tokens=0.0):  # for any at all
                    self._with_room[instance.role][instance.instance_id] = instance
                return
            self._size(tracked, 0.5)
            if not self._router.has_batch_room(instance, tracked.added_s, tracked.kv_tokens):
                self._with_room[instance.role].pop(instance.instance_id, None)
                return
            self._run_batch(tracked, instance, now, out)

    def take_in_report(self, instance: Instance, batch_tokens_total: int, now: float) -> None:
        """Telemetry: what the instance did for batch requests since it last told. It counts while
        more is queued, and from when the first requests it was given could be done: before that
        it computes prompts, which yield no tokens yet."""
        tokens = batch_tokens_total - instance.batch_tokens_total
        seconds = now - instance.reported_at
        instance.batch_tokens_total = batch_tokens_total
        instance.reported_at = now
        if self.queue.num_queued and instance.batch and now - instance.batch_since > RAMP_S:
            self.throughput.delivered(instance, tokens, seconds)

    def serve_held(self, now: float, out: Effects) -> None:
        """Try held requests, the oldest first; those out of time go to the least loaded instance,
        unless that has work in hand for long: others may be ready before it gets to them."""
        failures = 0
        overloaded = False
        for tracked in sorted(self.held.values(), key=lambda tracked: _is_lost(tracked, now)):
            if failures < MOST_FAILURES and self._find_room(tracked, now, out):
                continue
            failures += 1
            if overloaded and failures > MOST_FAILURES:
                break
            if now >= tracked.force_at and self._may_refuse(tracked):
                self._refuse(tracked, now, out)
            elif not overloaded and now >= tracked.force_at:
                overloaded = not self._run_late(tracked, now, out)

    def withdraw(self, instance: Instance) -> None:
        """The instance is offered nothing more."""
        self._router.discard(instance)
        for instances in self._with_room.values():
            instances.pop(instance.instance_id, None)

    def set_role(self, instance: Instance, role: Role, target_s: float) -> None:
        """Its place in the index follows its role, target and load."""
        self.withdraw(instance)
        self._instances.set_role(instance, role, target_s)
        instance.room_s = self._model.room_s(target_s)
        instance.refresh_load()
        self._router.refresh(instance)

    def release_saved(self, instance: Instance, out: Effects) -> None:
        """KV kept by the instance for queued requests is to be dropped."""
        for tracked in self.queue.release_saved(instance.instance_id):
            out.append(Forget(tracked.request.request_id, instance.instance_id))

    def lose(self, instance: Instance, produced: dict[int, int], now: float, out: Effects) -> None:
        """The instance is gone with all it ran and kept: interactive requests run elsewhere at once,
        batch ones go back to the queue."""
        self.withdraw(instance)
        self.queue.release_saved(instance.instance_id)
        for tracked in [*instance.interactive.values(), *instance.batch.values()]:
            self._take_off(tracked)
            known = produced.get(tracked.request.request_id, tracked.request.produced)
            self._serve_again(tracked, known, None, now, out)

    def held_load(self, target_s: float) -> float:
        """Sum of du of the held requests that this ITL target serves."""
        return sum(
            self._model.share(tracked.added_s, tracked.kv_tokens, target_s)
            for tracked in self.held.values()
            if self._router.target_for(tracked.request.slo.itl_s) == target_s
        )

    def take_arrived(self, target_s: float) -> Arrived:
        """What came for this ITL target since the last call."""
        arrived = self._arrived[target_s]
        self._arrived[target_s] = Arrived()
        return arrived

    # Steps of the above.

    def _refusal(self, request: FleetRequest) -> str | None:
        spec = self._model.spec
        most = min(spec.max_model_len, spec.kv_capacity_tokens)
        if request.prompt_tokens + request.max_tokens > most:
            return (
                f"prompt of {request.prompt_tokens} and max_tokens of {request.max_tokens} exceed the "
                f"{most} tokens an instance holds for one request"
            )
        if request.slo.slo_class is SloClass.BATCH or self._router.target_for(request.slo.itl_s) is not None:
            return None
        return (
            f"no instance keeps an ITL of {1e3 * request.slo.itl_s:g} ms; the best on offer is "
            f"{1e3 * self._config.itl_targets_s[0]:g} ms"
        )

    def _deadline(self, request: FleetRequest) -> float:
        if request.slo.deadline is not None:
            return request.slo.deadline
        return request.arrival + request.slo.ttft_s + self.outputs[SloClass.BATCH].mean * request.slo.itl_s

    def _count_arrival(self, request: FleetRequest) -> None:
        target = self._router.target_for(request.slo.itl_s)
        assert target is not None, "a request without a target was refused"
        output = min(self.outputs[SloClass.INTERACTIVE].mean, request.max_tokens)
        work_s = self._model.work_s(request.prompt_tokens, output, target)
        added_s = self._model.added_s(request.prompt_tokens, output, target)
        arrived = self._arrived[target]
        arrived.work_s += work_s
        arrived.squares += work_s * work_s
        arrived.load += self._model.share(added_s, request.prompt_tokens + output, target)

    def _size(self, tracked: Tracked, output_share: float) -> None:
        """What the request adds to an instance, with `output_share` of its expected output in the KV:
        all of it where an instance must have room to the end, half for batch, which is held at its mean
        and gives way where that was too little."""
        request = tracked.request
        known = request.prompt_tokens + request.produced
        expected = self.outputs[request.slo.slo_class].remaining(request.produced)
        output = max(1.0, min(expected, request.max_tokens - request.produced))
        # Batch, too, by the steps it would share with interactive requests: among its own it is KV
        # that fills an instance.
        tracked.added_s = self._model.added_s(known, output, self._config.itl_targets_s[-1])
        tracked.kv_tokens = known + output_share * output

    def _serve_interactive(self, tracked: Tracked, now: float, out: Effects) -> None:
        self._size(tracked, 1.0)
        self.held[tracked.request.request_id] = tracked
        if self._find_room(tracked, now, out) or now < tracked.force_at:
            return
        if self._may_refuse(tracked):
            self._refuse(tracked, now, out)
        else:
            self._run_late(tracked, now, out)

    def _may_refuse(self, tracked: Tracked) -> bool:
        """What has tokens already was accepted."""
        return self._config.admission == "strict" and not tracked.request.produced

    def _refuse(self, tracked: Tracked, now: float, out: Effects) -> None:
        request = tracked.request
        reason = (
            f"no instance has room to keep a TTFT of {request.slo.ttft_s:g} s and an ITL of "
            f"{1e3 * request.slo.itl_s:g} ms at this load"
        )
        out.append(Reject(request.request_id, reason, self._lead_s))
        self._leave(tracked, now, out)

    def _find_room(self, tracked: Tracked, now: float, out: Effects) -> bool:
        """Route a held request to an instance with room, turning a batch one mixed if need be."""
        instance = self._router.pick_interactive(tracked, now)
        if instance is None:
            instance = self._turn_mixed(tracked.request.slo.itl_s, out)
        if instance is None:
            return False
        self._run_interactive(tracked, instance, now, out)
        return True

    def _run_late(self, tracked: Tracked, now: float, out: Effects) -> bool:
        """Route a held request that is out of time to an instance without room; False where each has
        too much to do already."""
        request = tracked.request
        instance = self._router.emptiest(request.slo.itl_s)
        if instance is None:
            return False
        patience_s = max(request.arrival + request.slo.ttft_s - now, MOST_BACKLOG_TICKS * self._config.tick_s)
        most_load = 1.0 if _is_lost(tracked, now) else MOST_LATE_LOAD
        if instance.load > most_load or instance.prefilled_at - now > patience_s:
            return False
        self._run_interactive(tracked, instance, now, out)
        return True

    def _turn_mixed(self, itl_s: float, out: Effects) -> Instance | None:
        target = self._router.target_for(itl_s)
        open_ones = (i for i in self._instances.ready[Role.BATCH].values() if i.is_open)
        instance = next(open_ones, None)
        if instance is None or target is None:
            return None
        self.set_role(instance, Role.MIXED, target)
        out.append(SetRole(instance.instance_id, Role.MIXED, target))
        return instance

    def _run_interactive(self, tracked: Tracked, instance: Instance, now: float, out: Effects) -> None:
        del self.held[tracked.request.request_id]
        self._router.sent(tracked, instance, now)
        instance.add_interactive(tracked)
        self._router.refresh(instance)
        out.append(Route(tracked.request.request_id, instance.instance_id))

    def _run_batch(self, tracked: Tracked, instance: Instance, now: float, out: Effects) -> None:
        home = tracked.request.home
        if home is not None and home != instance.instance_id:
            out.append(Forget(tracked.request.request_id, home))
        self.queue.take(tracked)
        if not instance.batch:
            instance.batch_since = now
        instance.add_batch(tracked)
        out.append(Route(tracked.request.request_id, instance.instance_id, tracked.request.evictions))

    def _offer_batch(self, now: float, out: Effects) -> None:
        """To instances known to have room: batch ones first, then mixed ones."""
        for role in (Role.BATCH, Role.MIXED):
            while self._with_room[role] and self.queue.num_queued:
                instance = next(iter(self._with_room[role].values()))
                before = self.queue.num_queued
                self.fill(instance, now, out)
                if self.queue.num_queued == before:
                    self._with_room[role].pop(instance.instance_id, None)

    def _serve_again(
        self, tracked: Tracked, produced: int, home: int | None, now: float, out: Effects
    ) -> None:
        if tracked.request.slo.slo_class is SloClass.BATCH:
            self.queue.come_back(tracked, produced, home, now)
            if home is None:
                self._offer_batch(now, out)
            return
        tracked.request.produced = produced
        self._serve_interactive(tracked, now, out)

    def _take_off(self, tracked: Tracked) -> None:
        instance = tracked.instance
        if instance is None:
            return
        if tracked.group is not None:
            instance.remove_batch(tracked)
            return
        instance.remove_interactive(tracked)
        self._router.refresh(instance)

    @staticmethod
    def _drop_saved(tracked: Tracked, out: Effects) -> None:
        """A queued request ends: whoever keeps KV of it may let go."""
        if tracked.is_queued and tracked.request.home is not None:
            out.append(Forget(tracked.request.request_id, tracked.request.home))

    def _leave(self, tracked: Tracked, now: float, out: Effects) -> None:
        """The request ended; what it leaves free is given to others."""
        del self.tracked[tracked.request.request_id]
        self.held.pop(tracked.request.request_id, None)
        instance = tracked.instance
        self._take_off(tracked)
        if tracked.group is not None:
            self.queue.leave(tracked)
        if instance is None:
            return
        if self.held and tracked.group is None:
            self._serve_first_held(now, out)
        self.fill(instance, now, out)

    def _serve_first_held(self, now: float, out: Effects) -> None:
        while self.held:
            tracked = next(iter(self.held.values()))
            if not self._find_room(tracked, now, out):
                return


def _is_lost(tracked: Tracked, now: float) -> bool:
    """Its first token comes too late whatever is done."""
    request = tracked.request
    return not request.produced and request.arrival + request.slo.ttft_s < now

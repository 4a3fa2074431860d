"""One simulated engine process: the real core in virtual time, and what is seen of it from outside."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.fleet.messages import (
    FleetEvent,
    InstanceReported,
    InstanceState,
    RequestEvicted,
    RequestFinished,
    Role,
)
from chiron_engine.policy.iteration.local_autoscaler import ItlTargets
from chiron_engine.policy.iteration.request import Request, SloClass
from chiron_engine.policy.iteration.sampling_params import GREEDY

from .engine_setup import EngineSetup
from .request_book import LiveRequest, RequestBook
from .run_result import InstanceLife, ItlHistogram
from .token_gaps import TokenGaps
from .token_streams import TokenStreams, live_of, note_first_token

LEAST_COASTING = 4
"""Steps that are worth to be left for later."""
ENVELOPE_MARGIN = 0.95
"""Coasting must end before anything can happen, so a step is taken to last this share of the lower
envelope of step times: it lies below those measured, and may lie above one between them."""
UNBOUNDED = 1 << 60
"""Queue bounds of a simulated engine: the fleet, not the engine, decides what it is sent."""


class EngineInstance:
    """From the launch decision to the exit. `send` carries an event to the fleet.

    Interactive requests run to their end here or are lost with it; batch requests that are evicted
    leave, and what they saved stays until they come back or are forgotten.

    due: when `complete_step` is to be called, None while nothing runs. awaited: the time for which an
    event was last put on the heap for that. is_coasting: no step is under way as the heap sees it; steps
    that change nothing are put off until `due` or until something comes in, then done at once, with
    the results that stepping would have had.
    """

    def __init__(
        self,
        instance_id: int,
        setup: EngineSetup,
        life: InstanceLife,
        book: RequestBook,
        histogram: ItlHistogram,
        send: Callable[[FleetEvent], None],
    ) -> None:
        self.instance_id = instance_id
        self.life = life
        self.state: InstanceState | None = InstanceState.LOADING
        self.role = Role.MIXED
        self.itl_target_s = setup.interactive_itl_slo_s
        self.core: EngineCore | None = None
        self._setup = setup
        self._book = book
        self._send = send
        self._streams = TokenStreams(TokenGaps(setup.interactive_itl_slo_s, histogram))
        self._held: dict[int, Request] = {}
        # Evicted, with how many output tokens they had then.
        self._saved: dict[int, tuple[Request, int]] = {}
        self.due: float | None = None
        self.awaited: float | None = None
        self.is_coasting = False
        self._stepping = False

    # Its life.

    def start(self, now: float) -> None:
        """The model is loaded."""
        setup = self._setup
        self._clock = VirtualClock(now)
        self._autoscaler = setup.autoscaler(self.itl_target_s)
        self._executor = setup.executor(self._clock, self.instance_id)
        self._executor.on_preempted = self._streams.on_preempted
        self.core = EngineCore(
            self._executor,
            clock=self._clock,
            swap_costs=setup.swap_costs,
            max_queued_requests=UNBOUNDED,
            max_queued_tokens=UNBOUNDED,
            local_autoscaler=self._autoscaler,
            hand_back_evicted=True,
        )
        self.core.add_step_hook(self._streams.on_step)
        self.state = InstanceState.READY
        self.life.ready_s = now

    def end(self, now: float) -> None:
        """Its process is gone, for whatever reason."""
        if self.core is not None:
            del self._executor  # events to come keep this object, but not what it ran
        self.core = None
        self.state = None
        self.life.exited_s = now
        self._held.clear()
        self._saved.clear()

    def lose(self, now: float) -> dict[int, int]:
        """It dies with what it runs (`end` follows); returns what is known outside of it: output
        tokens by request."""
        produced = {}
        for request in self._held.values():
            self._streams.break_off(request)
            live = live_of(request)
            live.produced = live.produced_before_stay + self._committed(request)
            produced[request.request_id] = live.produced
        return produced

    @property
    def is_spent(self) -> bool:
        """It drained: nothing is left to do before it exits."""
        return self.state is InstanceState.DRAINING and not self._held

    @property
    def is_busy(self) -> bool:
        return self._stepping or self.is_coasting or self.state is InstanceState.LOADING

    # What it is told.

    def add(self, live: LiveRequest, evictions: int, now: float) -> None:
        """`evictions`: how often engines gave it back before."""
        core = self._running_core(now)
        saved = self._saved.pop(live.request_id, None)
        if saved is not None and saved[1] == live.produced:
            request = saved[0]
        else:
            if saved is not None:
                core.forget(saved[0])
            request = _engine_request(live)
        request.num_preempted = evictions
        self._held[request.request_id] = request
        core.add(request)

    def forget(self, request_id: int, now: float) -> None:
        saved = self._saved.pop(request_id, None)
        if saved is not None:
            self._running_core(now).forget(saved[0])

    def set_role(self, role: Role, itl_target_s: float, now: float) -> None:
        if self.role is not role or not self.life.roles:
            self.life.roles.append((now, role))
        self.role = role
        if itl_target_s == self.itl_target_s:
            return
        self.itl_target_s = itl_target_s
        if self.core is None:
            return
        core = self._running_core(now)
        limits = self._autoscaler.set_targets(ItlTargets(itl_target_s, self._setup.batch_itl_s))
        if limits is not None:
            core.set_limits(limits.max_running, limits.token_budget, limits.shrink)

    def drain(self, now: float) -> None:
        """Give back batch work, with nothing saved for it here; the rest runs to its end."""
        core = self._running_core(now)
        self.state = InstanceState.DRAINING
        produced = {i: self._committed(r) for i, r in self._held.items() if _is_batch(r)}
        for request in core.give_back_batch():
            self._leave(request, produced[request.request_id], saved_tokens=0)

    # Its steps.

    def begin_step(self, until: float) -> None:
        """Start a step unless one is under way. `due` then says when `complete_step` is to come, None
        where there is nothing to do. Steps that change nothing are done at once where they are
        complete before `until`, or left for later where nobody can tell."""
        core = self.core
        if core is None or self._stepping:
            return
        self.due = None
        if until > self._clock.now():
            self.due = self._coasting_end()
            if self.due is not None:
                self.is_coasting = True
                return
            core.fast_forward(until)
        self._submit(core)

    def _submit(self, core: EngineCore) -> None:
        if core.submit():
            self._stepping = True
            self.due = core.completes_at
        elif core.has_work:
            self._hand_back(core.complete().handed_back)

    def _coasting_end(self) -> float | None:
        """A time before which nothing can happen here that anyone would notice, unless something
        comes in: interactive requests decode, nobody waits, nobody ends, no block runs short. None
        where there is no such time.

        Nobody looks at an engine until then, so its steps wait: they are done when something comes.
        """
        core = self.core
        assert core is not None
        scheduler = core.scheduler
        if self._setup.step_noise or scheduler.waiting or scheduler.num_requests[SloClass.BATCH]:
            return None
        quiet, stop = scheduler.num_quiet_steps(), self._executor.next_stop_step
        if stop is not None:
            quiet = min(quiet, stop - scheduler.step)
        if quiet < LEAST_COASTING:
            return None
        requests, kv_tokens = scheduler.decode_load
        growths = scheduler.tiers.device.num_free // requests - 1
        quiet = min(quiet, growths * self._setup.shape.block_size)
        if quiet < LEAST_COASTING:
            return None
        least_s = ENVELOPE_MARGIN * self._setup.profile.envelope.seconds(requests, kv_tokens)
        return self._clock.now() + quiet * least_s

    def catch_up(self, now: float) -> None:
        """Do the steps that are complete by now, and go on coasting."""
        if self.is_coasting and self.core is not None:
            self.core.fast_forward(now)

    def stop_coasting(self, now: float) -> None:
        """Be where an engine that never coasted would be: with a step under way, which `due` ends."""
        if not self.is_coasting or self.core is None:
            return
        self.catch_up(now)
        self.is_coasting = False
        self.due = None
        self._submit(self.core)
        if self.due is not None and self.due < now:
            self.due = now  # only where the envelope of the profile is above its step times

    def complete_step(self, now: float) -> None:
        """The time `due` has come."""
        if self.is_coasting:
            self.catch_up(now)
            self.is_coasting = False
            return
        self._stepping = False
        core = self._running_core(now)
        output = core.complete()
        self._streams.resume(core.scheduler.step, now)
        for request in output.finished:
            self._finish(request, now)
        self._hand_back(output.handed_back)

    def _hand_back(self, requests: list[Request]) -> None:
        """Evicted ones leave; what they saved is kept, but by an engine that will be gone soon."""
        assert self.core is not None
        for request in requests:
            saved_tokens = len(request.host_blocks) * self._setup.shape.block_size
            if self.state is InstanceState.DRAINING or not saved_tokens:
                self.core.forget(request)
                saved_tokens = 0
            self._leave(request, request.num_planned_outputs, saved_tokens)

    def _finish(self, request: Request, now: float) -> None:
        live = live_of(request)
        del self._held[request.request_id]
        if request.num_planned_outputs != live.left:
            raise RuntimeError(
                f"request {request.request_id} ended with {request.num_planned_outputs} output tokens on "
                f"instance {self.instance_id}; it has {live.left}"
            )
        self._streams.finish(request, now)
        first = live.first_token
        assert first is not None  # it has tokens
        self._book.finish(live, first, now, live.late)
        self._send(RequestFinished(request.request_id, live.output_tokens))

    def _leave(self, request: Request, produced: int, saved_tokens: int) -> None:
        """A batch request goes back to the fleet with `produced` output tokens from this stay."""
        live = live_of(request)
        del self._held[request.request_id]
        note_first_token(request)
        live.evictions += 1
        live.produced = live.produced_before_stay + produced
        if saved_tokens:
            self._saved[request.request_id] = (request, live.produced)
        self._send(RequestEvicted(request.request_id, live.produced, saved_tokens))

    def _committed(self, request: Request) -> int:
        """Output tokens that have left this engine since the request came: not the one under way."""
        assert self.core is not None
        live = live_of(request)
        planned = request.outputs_at(self.core.scheduler.step - self._stepping)
        return min(planned, live.left - 1)

    def _running_core(self, now: float) -> EngineCore:
        core = self.core
        if core is None:
            raise RuntimeError(f"instance {self.instance_id} is told something while it is not running")
        self._clock.advance_to(now)
        return core

    # What it tells.

    def report(self, now: float) -> InstanceReported:
        core = self._running_core(now)
        scheduler, limits, streams = core.scheduler, core.scheduler.limits, self._streams
        device = scheduler.tiers.device
        running_batch = scheduler.num_running_batch
        return InstanceReported(
            instance_id=self.instance_id,
            running_interactive=len(scheduler.running) - running_batch,
            running_batch=running_batch,
            waiting=len(scheduler.waiting),
            kv_tokens=(device.num_blocks - device.num_free) * self._setup.shape.block_size,
            max_running=limits.max_running,
            token_budget=limits.token_budget,
            itl_s=streams.itl_s,
            batch_tokens_total=streams.batch_tokens,
            output_tokens_total=streams.output_tokens,
            preemptions_total=scheduler.num_preemptions,
            last_step=streams.last_step,
            latency_backpressure=self._autoscaler.latency_backpressure,
            throughput_backpressure=self._autoscaler.throughput_backpressure,
        )

    @property
    def running(self) -> int:
        return len(self.core.scheduler.running) if self.core is not None else 0

    @property
    def limit(self) -> int:
        return self.core.scheduler.limits.max_running if self.core is not None else 0

    @property
    def latency_backpressure(self) -> float:
        return self._autoscaler.latency_backpressure if self.core is not None else 0.0


def _is_batch(request: Request) -> bool:
    return request.slo.slo_class is SloClass.BATCH


def _engine_request(live: LiveRequest) -> Request:
    """A request new to an engine: tokens it produced elsewhere are part of its prompt."""
    prompt = live.prompt_tokens + live.produced
    live.left = live.output_tokens - live.produced
    request = Request(
        live.request_id,
        range(prompt),
        GREEDY,
        live.max_tokens - live.produced,
        slo=live.slo,
        arrival=live.arrival,
        client=live,
        output_ids=_NO_TOKENS,
    )
    request.block_keys = list(live.keys)
    return request


_NO_TOKENS: array[int] = array("I")
"""Shared: with an executor that yields no token values nothing is ever appended."""

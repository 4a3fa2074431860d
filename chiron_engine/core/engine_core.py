"""The engine: policy, an executor and a clock, and nothing that knows where requests come from."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from chiron_engine.core.clocks import Clock, MonotonicClock
from chiron_engine.core.executor import Executor, StepHandle
from chiron_engine.core.latency_model import LatencyModelExecutor, TimedStep
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.core.step_stats import StepHook, StepStats
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.kv_tiers import KvTiers, SwapCosts
from chiron_engine.policy.iteration.limits import Limits, Shrink
from chiron_engine.policy.iteration.local_autoscaler import LocalAutoscaler
from chiron_engine.policy.iteration.plan import StepOutput, StepPlan, StepResult
from chiron_engine.policy.iteration.request import Request, RequestState, SloClass
from chiron_engine.policy.iteration.scheduler import Scheduler
from chiron_engine.policy.iteration.speculation import Speculation

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Counters of an engine at one moment."""

    step: int
    running: int
    running_batch: int
    waiting: int
    max_running: int
    free_blocks: int
    total_blocks: int
    free_host_blocks: int
    total_host_blocks: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(slots=True)
class InFlight:
    """A step handed to the executor, with what its statistics need."""

    handle: StepHandle
    plan: StepPlan
    plan_s: float
    submit_s: float
    handed_back: list[Request]


class EngineCore:
    """Runs requests to their end. Not thread-safe: one thread calls everything.

    Online and offline engines and the simulator differ only in the executor and the clock.

    local_autoscaler: sees every committed step, after the step hooks, and sets the limits, the
    first ones included (`limits` is then not to be given). What it raises fails the step.

    speculation: guesses tokens. Raises ValueError for one with an executor that keeps steps under way.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        clock: Clock | None = None,
        limits: Limits | None = None,
        enable_prefix_caching: bool = True,
        swap_costs: SwapCosts | None = None,
        max_queued_requests: int = 1024,
        max_queued_tokens: int = 1 << 20,
        local_autoscaler: LocalAutoscaler | None = None,
        hand_back_evicted: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        shape = executor.shape
        self.shape = shape
        self.clock = self._clock = clock if clock is not None else MonotonicClock()
        self._executor = executor
        self._max_queued_requests = max_queued_requests
        self._max_queued_tokens = max_queued_tokens
        tiers = KvTiers(
            shape.block_size,
            shape.num_device_blocks,
            shape.num_host_blocks,
            swap_costs if swap_costs is not None else SwapCosts(),
            enable_prefix_caching,
        )
        if local_autoscaler is not None:
            if limits is not None:
                raise ValueError("limits and a local autoscaler are both given; the autoscaler has its own")
            limits = local_autoscaler.limits
        limits = limits if limits is not None else Limits(shape.max_slots, shape.max_step_tokens)
        self._autoscaler = local_autoscaler
        if speculation is not None and shape.pipeline_depth > 1:
            raise ValueError(
                f"tokens cannot be guessed: this executor keeps {shape.pipeline_depth} steps under way, so "
                f"the last tokens are not known when a step is planned; num_speculative_tokens must be 0"
            )
        self._speculation = speculation
        self.scheduler = Scheduler(tiers, limits, shape.max_slots, speculation)
        self.scheduler.hand_back_evicted = hand_back_evicted
        self._set(limits)
        self._requests: dict[int, Request] = {}
        self._in_flight: deque[InFlight] = deque()
        self._aborted: list[Request] = []
        self._hooks: list[StepHook] = []
        self._last_commit = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        scheduler = self.scheduler
        return bool(self._in_flight or self._aborted or scheduler.handed_back) or scheduler.has_work

    @property
    def hand_back_evicted(self) -> bool:
        """Whether batch requests that lose their place leave the engine (`StepOutput.handed_back`)
        instead of waiting here for another. What was saved of them stays pinned on the host tier
        until `add` resumes them or `forget` drops it."""
        return self.scheduler.hand_back_evicted

    @hand_back_evicted.setter
    def hand_back_evicted(self, wanted: bool) -> None:
        self.scheduler.hand_back_evicted = wanted

    @property
    def local_autoscaler(self) -> LocalAutoscaler | None:
        return self._autoscaler

    @property
    def completes_at(self) -> float | None:
        """When the oldest step under way will be complete, where the executor knows; None without one."""
        if not self._in_flight:
            return None
        handle = self._in_flight[0].handle
        return handle.ready_at if isinstance(handle, TimedStep) else None

    def add(self, request: Request) -> None:
        """Queue a request. Raises QueueFull at the queue's bounds, InvalidRequest when it can never
        fit or its id is in use."""
        waiting = self.scheduler.waiting
        if len(waiting) >= self._max_queued_requests:
            raise QueueFull(f"{len(waiting)} requests are waiting, which is the limit", RETRY_AFTER_S)
        if waiting and waiting.num_tokens + len(request.prompt_ids) > self._max_queued_tokens:
            raise QueueFull(
                f"{waiting.num_tokens} prompt tokens are waiting and {len(request.prompt_ids)} more would "
                f"exceed the limit of {self._max_queued_tokens}",
                RETRY_AFTER_S,
            )
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id} is in use")
        try:
            self.scheduler.add(request)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        self._requests[request.request_id] = request
        if (
            self._autoscaler is not None
            and request.slo.slo_class is SloClass.INTERACTIVE
            and self.scheduler.num_requests[SloClass.INTERACTIVE] == 1
        ):
            self._set(self._autoscaler.on_interactive(self._clock.now()))

    def forget(self, request: Request) -> None:
        """Drop what is saved of a request that was handed back. Raises ValueError for any other."""
        self.scheduler.forget(request)

    def give_back_batch(self) -> list[Request]:
        """Take every batch request out, the first to be served first, with nothing kept of it here;
        to run one again, make a new request of its tokens. A token of a step under way is lost, and
        those evicted by that step are handed back when it completes."""
        leaving = self.scheduler.give_back(SloClass.BATCH)
        for request in leaving:
            del self._requests[request.request_id]
        return leaving

    def abort(self, request_id: int) -> bool:
        """End a request now; the next step's output names it. False if it is not here."""
        request = self._requests.pop(request_id, None)
        if request is None or not self.scheduler.abort(request):
            return False
        self._aborted.append(request)
        return True

    def set_limits(self, max_running: int, token_budget: int, shrink: Shrink = "drain") -> None:
        """Limits for the next step. Raises ValueError above the executor's fixed capacity."""
        if token_budget > self.shape.max_step_tokens:
            raise ValueError(
                f"token_budget is {token_budget}; a step of this executor takes at most "
                f"{self.shape.max_step_tokens} tokens"
            )
        self.scheduler.set_limits(Limits(max_running, token_budget, shrink))

    def set_targets(self, targets: ItlTargets) -> None:
        """Inter-token latencies for the local autoscaler to keep from now on; without one, nothing."""
        if self._autoscaler is not None:
            self._set(self._autoscaler.set_targets(targets))

    def _set(self, limits: Limits | None) -> None:
        if limits is not None:
            self.set_limits(limits.max_running, limits.token_budget, limits.shrink)

    def add_step_hook(self, hook: StepHook) -> Callable[[], None]:
        """Call `hook` with the statistics of every committed step; limits it returns hold from the
        next plan on. A hook that raises, or returns limits above the capacity, is logged and dropped.
        Returns a function that takes the hook off again."""
        self._hooks.append(hook)
        return lambda: self._remove_hook(hook)

    def step(self) -> StepOutput:
        """One iteration: start steps up to the pipeline depth, then commit the oldest.

        The output is empty where nothing could run. Blocks while the device computes.
        """
        while len(self._in_flight) < self.shape.pipeline_depth and self.submit():
            pass
        return self.complete()

    def submit(self) -> bool:
        """Plan a step and hand it to the executor; False when there is nothing to do."""
        started = self._clock.now()
        plan = self.scheduler.plan(started)
        if plan is None:
            return False
        planned = self._clock.now()
        handle = self._executor.submit(plan)
        submit_s = self._clock.now() - planned
        self._in_flight.append(InFlight(handle, plan, planned - started, submit_s, self._take_handed_back()))
        return True

    def complete(self) -> StepOutput:
        """Wait for the oldest step under way, commit it and run the hooks."""
        if not self._in_flight:
            output = StepOutput(self.scheduler.step, finished=self._take_aborted())
            output.handed_back = self._leave(self._take_handed_back())
            return output
        flight = self._in_flight.popleft()
        began_waiting = self._clock.now()
        result = self._executor.collect(flight.handle)
        arrived = self._clock.now()
        output = self.scheduler.commit(flight.plan, result, arrived)
        for request in output.finished:
            self._requests.pop(request.request_id, None)
        if flight.handed_back:
            output.handed_back = self._leave(flight.handed_back)
        committed = self._clock.now()
        if self._hooks or self._autoscaler is not None or self._speculation is not None:
            stats = self._stats_of(flight, result, output, arrived)
            stats.wait_s = arrived - began_waiting
            stats.commit_s = committed - arrived
            self._observe(stats)
        self._last_commit = arrived
        if self._aborted:
            output.finished += self._take_aborted()
        return output

    def fast_forward(self, until: float) -> int:
        """Run the steps that only decode, with nobody coming, leaving or ending in them, as far as
        they are complete before `until`; returns how many. The next one is left to `submit`.

        Everything is as if `submit` and `complete` had been called for each, but for their outputs,
        which say nothing. Only with an executor that models time and yields no tokens; 0 with others,
        and while a step is under way.
        """
        executor, scheduler = self._executor, self.scheduler
        if not isinstance(executor, LatencyModelExecutor) or executor.scripted_tokens:
            return 0
        first = scheduler.step
        while self._only_decodes(executor):
            requests, kv_tokens = scheduler.decode_load
            ready_at, seconds = executor.look_ahead(requests, kv_tokens)
            if ready_at >= until or not scheduler.pass_quiet_step():
                break
            executor.pass_step(ready_at)
            began = self._clock.now()
            self._clock.sleep_until(ready_at)
            if self._hooks or self._autoscaler is not None:
                stats = self._stats(scheduler.step - 1, requests, kv_tokens, seconds, ready_at)
                stats.itl_interactive = requests - scheduler.num_running_batch
                stats.itl_batch = scheduler.num_running_batch
                stats.wait_s = ready_at - began
                self._observe(stats)
            self._last_commit = ready_at
        return scheduler.step - first

    def _only_decodes(self, executor: LatencyModelExecutor) -> bool:
        """Whether the next step does nothing but decode, and ends nothing."""
        if self._in_flight or self._aborted or self.scheduler.num_quiet_steps() == 0:
            return False
        stop = executor.next_stop_step
        return stop is None or stop > self.scheduler.step

    def load(self) -> EngineLoad:
        scheduler = self.scheduler
        device, host = scheduler.tiers.device, scheduler.tiers.host
        speculation = self._speculation
        return EngineLoad(
            step=scheduler.step,
            running=len(scheduler.running),
            running_batch=scheduler.num_running_batch,
            waiting=len(scheduler.waiting),
            max_running=scheduler.limits.max_running,
            free_blocks=device.num_free,
            total_blocks=device.num_blocks,
            free_host_blocks=host.num_free,
            total_host_blocks=host.num_blocks,
            preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            drafted_tokens=speculation.num_drafted if speculation is not None else 0,
            accepted_tokens=speculation.num_accepted if speculation is not None else 0,
        )

    def close(self) -> None:
        """Release the executor; the core is of no use afterwards."""
        self._executor.close()

    def _take_aborted(self) -> list[Request]:
        aborted, self._aborted = self._aborted, []
        return aborted

    def _remove_hook(self, hook: StepHook) -> None:
        if hook in self._hooks:
            self._hooks.remove(hook)

    def _take_handed_back(self) -> list[Request]:
        handed_back, self.scheduler.handed_back = self.scheduler.handed_back, []
        return handed_back

    def _leave(self, handed_back: list[Request]) -> list[Request]:
        """Those handed back for whom no token under way turned out to be the last."""
        leaving = [request for request in handed_back if request.state is RequestState.EVICTED]
        for request in leaving:
            del self._requests[request.request_id]
        return leaving

    def _observe(self, stats: StepStats) -> None:
        """Show a step to the hooks, then to the local autoscaler; both may change the limits."""
        for hook in tuple(self._hooks):
            try:
                self._set(hook(stats))
            except Exception:
                log.exception("a step hook failed and is dropped; the limits stay as they are")
                self._remove_hook(hook)
        if self._autoscaler is not None:
            self._set(self._autoscaler.on_step(stats, stats.time))
        if self._speculation is not None:
            self._speculation.on_step(stats)

    def _stats_of(self, flight: InFlight, result: StepResult, output: StepOutput, now: float) -> StepStats:
        plan, decode = flight.plan, flight.plan.decode
        requests, kv_tokens = len(decode.slots), plan.decode_context
        if plan.drafts:
            requests, kv_tokens = requests + len(plan.drafts), kv_tokens + plan.draft_context
        stats = self._stats(plan.step, requests, kv_tokens, result.device_s, now)
        stats.prefill_tokens = plan.prefill_tokens
        stats.prefill_context = plan.prefill_context
        stats.swap_out_blocks = len(plan.copies_out)
        stats.swap_in_blocks = len(plan.copies_in)
        stats.plan_s = flight.plan_s
        stats.submit_s = flight.submit_s
        stats.graph = result.graph
        stats.finished = len(output.finished)
        stats.preempted = len(plan.preempted)
        stats.itl_interactive = decode.num_interactive
        if plan.drafts:
            _add_drafts(stats, plan, output)
        stats.itl_batch = requests - stats.itl_interactive
        return stats

    def _stats(self, step: int, requests: int, kv_tokens: int, device_s: float, now: float) -> StepStats:
        """Of a step that only decoded. All of its requests had a token in the step before, so the time
        since its commit is the gap they saw: they decoded in it, or their last chunk sampled in it."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        interactive, batch = scheduler.num_requests
        return StepStats(
            step=step,
            time=now,
            prefill_tokens=0,
            prefill_context=0,
            decode_requests=requests,
            kv_tokens=kv_tokens,
            swap_out_blocks=0,
            swap_in_blocks=0,
            plan_s=0.0,
            submit_s=0.0,
            wait_s=0.0,
            device_s=device_s,
            commit_s=0.0,
            graph=False,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_blocks=scheduler.tiers.device.num_free,
            finished=0,
            preempted=0,
            max_running=limits.max_running,
            token_budget=limits.token_budget,
            itl_s=now - self._last_commit if requests else 0.0,
            itl_interactive=0,
            itl_batch=0,
            queued_tokens=scheduler.queued_tokens,
            queued_interactive_tokens=scheduler.queued_interactive_tokens,
            first_token_due=scheduler.first_token_due(),
            interactive_requests=interactive,
            batch_requests=batch,
        )


def _add_drafts(stats: StepStats, plan: StepPlan, output: StepOutput) -> None:
    """What guesses add to the statistics of a step."""
    stats.itl_interactive += sum(r.slo.slo_class is SloClass.INTERACTIVE for r in plan.draft_requests)
    stats.draft_requests = len(plan.drafts)
    stats.drafted_tokens = plan.drafted_tokens
    stats.accepted_tokens = sum(output.accepted)
    stats.accepted_batch_tokens = output.accepted[SloClass.BATCH]

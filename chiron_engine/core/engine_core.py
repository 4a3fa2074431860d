"""The engine: policy, an executor and a clock, and nothing that knows where requests come from."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from chiron_engine.core.clocks import Clock, MonotonicClock
from chiron_engine.core.executor import Executor, StepHandle
from chiron_engine.core.requests import InvalidRequest, QueueFull
from chiron_engine.core.step_stats import StepHook, StepStats
from chiron_engine.policy.iteration.kv_tiers import KvTiers, SwapCosts
from chiron_engine.policy.iteration.limits import Limits, Shrink
from chiron_engine.policy.iteration.plan import DecodeBatch, StepOutput, StepPlan, StepResult
from chiron_engine.policy.iteration.request import Request, SloClass
from chiron_engine.policy.iteration.scheduler import Scheduler

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Counters of an engine at one moment."""

    step: int
    running: int
    waiting: int
    max_running: int
    free_blocks: int
    total_blocks: int
    free_host_blocks: int
    total_host_blocks: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int


@dataclass(slots=True)
class InFlight:
    """A step handed to the executor, with what its statistics need."""

    handle: StepHandle
    plan: StepPlan
    plan_s: float
    submit_s: float


class EngineCore:
    """Runs requests to their end. Not thread-safe: one thread calls everything.

    Online and offline engines and the simulator differ only in the executor and the clock.
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
    ) -> None:
        shape = executor.shape
        self.shape = shape
        self.clock = clock if clock is not None else MonotonicClock()
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
        limits = limits if limits is not None else Limits(shape.max_slots, shape.max_step_tokens)
        self.scheduler = Scheduler(tiers, limits, shape.max_slots)
        self.set_limits(limits.max_running, limits.token_budget, limits.shrink)
        self._requests: dict[int, Request] = {}
        self._in_flight: deque[InFlight] = deque()
        self._aborted: list[Request] = []
        self._hooks: list[StepHook] = []
        self._last_commit = 0.0
        self._class_counts: tuple[DecodeBatch, int] | None = None

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._in_flight or self._aborted) or self.scheduler.has_work

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
        started = self.clock.now()
        plan = self.scheduler.plan(started)
        if plan is None:
            return False
        planned = self.clock.now()
        handle = self._executor.submit(plan)
        self._in_flight.append(InFlight(handle, plan, planned - started, self.clock.now() - planned))
        return True

    def complete(self) -> StepOutput:
        """Wait for the oldest step under way, commit it and run the hooks."""
        if not self._in_flight:
            return StepOutput(self.scheduler.step, finished=self._take_aborted())
        flight = self._in_flight.popleft()
        began_waiting = self.clock.now()
        result = self._executor.collect(flight.handle)
        arrived = self.clock.now()
        output = self.scheduler.commit(flight.plan, result, arrived)
        for request in output.finished:
            self._requests.pop(request.request_id, None)
        committed = self.clock.now()
        if self._hooks:
            stats = self._stats(flight, result, output, arrived)
            stats.wait_s = arrived - began_waiting
            stats.commit_s = committed - arrived
            self._run_hooks(stats)
        self._last_commit = arrived
        output.finished += self._take_aborted()
        return output

    def load(self) -> EngineLoad:
        scheduler = self.scheduler
        device, host = scheduler.tiers.device, scheduler.tiers.host
        return EngineLoad(
            step=scheduler.step,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            max_running=scheduler.limits.max_running,
            free_blocks=device.num_free,
            total_blocks=device.num_blocks,
            free_host_blocks=host.num_free,
            total_host_blocks=host.num_blocks,
            preemptions=scheduler.num_preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
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

    def _run_hooks(self, stats: StepStats) -> None:
        for hook in tuple(self._hooks):
            try:
                limits = hook(stats)
                if limits is not None:
                    self.set_limits(limits.max_running, limits.token_budget, limits.shrink)
            except Exception:
                log.exception("a step hook failed and is dropped; the limits stay as they are")
                self._remove_hook(hook)

    def _stats(self, flight: InFlight, result: StepResult, output: StepOutput, now: float) -> StepStats:
        plan, scheduler = flight.plan, self.scheduler
        itl_s, interactive, batch = self._itl(plan.decode, now)
        return StepStats(
            step=plan.step,
            time=now,
            prefill_tokens=plan.prefill_tokens,
            prefill_context=plan.prefill_context,
            decode_requests=len(plan.decode.slots),
            kv_tokens=plan.decode_context,
            swap_out_blocks=len(plan.copies_out),
            swap_in_blocks=len(plan.copies_in),
            plan_s=flight.plan_s,
            submit_s=flight.submit_s,
            wait_s=0.0,
            device_s=result.device_s,
            commit_s=0.0,
            graph=result.graph,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_blocks=scheduler.tiers.device.num_free,
            finished=len(output.finished),
            preempted=len(plan.preempted),
            max_running=scheduler.limits.max_running,
            token_budget=scheduler.limits.token_budget,
            itl_s=itl_s,
            itl_interactive=interactive,
            itl_batch=batch,
        )

    def _itl(self, decode: DecodeBatch, now: float) -> tuple[float, int, int]:
        """The gap every decoding request just saw, and how many of each class saw it. All of them
        had a token in the step before: they decoded in it, or their last chunk sampled in it."""
        if not decode.requests:
            return 0.0, 0, 0
        if self._class_counts is None or self._class_counts[0] is not decode:
            interactive = sum(r.slo.slo_class is SloClass.INTERACTIVE for r in decode.requests)
            self._class_counts = (decode, interactive)
        interactive = self._class_counts[1]
        return now - self._last_commit, interactive, len(decode.requests) - interactive

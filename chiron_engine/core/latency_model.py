"""An executor that takes time and computes nothing: step times come from a model."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Protocol

from chiron_engine.core.clocks import Clock
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import scripted_drafts, scripted_token
from chiron_engine.policy.iteration.plan import StepPlan, StepResult
from chiron_engine.policy.iteration.request import Request


class StepTimes(Protocol):
    """Seconds of a step without its copies; `StepCosts` is one."""

    def seconds(self, requests: int, kv_tokens: int, prompt_tokens: int, prompt_context: int) -> float:
        """n decoding requests with K tokens of KV in all, P prompt tokens, and C, the sum over
        prompt chunks of count x KV length at the chunk's end."""
        ...


@dataclass(slots=True)
class TimedStep:
    """ready_at: when the step will be complete, on the executor's clock."""

    plan: StepPlan
    ready_at: float
    seconds: float
    stopped: Sequence[Request]


class LatencyModelExecutor:
    """Steps take the time the model says, on the given clock, one after another.

    output_tokens: how many tokens a request produces in all. It ends (STOP) with that one, or before
    it at its max_tokens; nobody else is told. Without it, every request runs to its max_tokens.
    copy_s_per_block: for each block saved or brought back, on top of the step.
    noise: sigma of a lognormal factor of mean 1 on every step, drawn by `seed`.
    scripted_tokens: yield token ids (an engine process needs some to send); without, a step costs
    nothing per request, which is what a simulation of millions wants.

    Raises ValueError for negative noise or copies, or output lengths together with token ids.
    """

    def __init__(
        self,
        shape: ExecutorShape,
        step_times: StepTimes,
        clock: Clock,
        *,
        output_tokens: Callable[[Request], int] | None = None,
        copy_s_per_block: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        scripted_tokens: bool = False,
    ) -> None:
        if noise < 0 or copy_s_per_block < 0:
            raise ValueError(f"noise {noise} and copy_s_per_block {copy_s_per_block} must not be negative")
        if output_tokens is not None and scripted_tokens:
            raise ValueError("scripted tokens end where their stop tokens say, not by output_tokens")
        self.shape = shape
        self.scripted_tokens = scripted_tokens
        self._step_times = step_times
        self._clock = clock
        self._output_tokens = output_tokens
        self._copy_s_per_block = copy_s_per_block
        self._noise = noise
        self._random = random.Random(seed) if noise else None
        self._busy_until = 0.0
        # The seconds of a step looked at ahead of its submission, and the load it was looked at for.
        self._ahead: tuple[int, int, float] | None = None
        self._factor: float | None = None
        self._stops: dict[int, list[tuple[Request, int]]] = {}
        self._stop_steps: list[int] = []

    def submit(self, plan: StepPlan) -> TimedStep:
        seconds = self._seconds(plan)
        self._busy_until = self._begin(plan) + seconds
        return TimedStep(plan, self._busy_until, seconds, self._stopped(plan))

    def _begin(self, plan: StepPlan) -> float:
        """When a plan submitted now starts to take time."""
        return max(self._busy_until, self._clock.now())

    def collect(self, handle: TimedStep) -> StepResult:
        self._clock.sleep_until(handle.ready_at)
        if self.scripted_tokens:
            return StepResult(self._tokens(handle.plan), handle.seconds)
        return StepResult(None, handle.seconds, stopped=handle.stopped)

    # Steps without plans: a simulation passes over those in which nobody comes or goes.

    @property
    def next_stop_step(self) -> int | None:
        """Nobody stops by itself before this step; None while nobody will."""
        return self._stop_steps[0] if self._stop_steps else None

    def look_ahead(self, requests: int, kv_tokens: int) -> tuple[float, float]:
        """(when it would be complete, seconds) of a step that only decodes, submitted now."""
        ahead = self._ahead
        if ahead is None or ahead[0] != requests or ahead[1] != kv_tokens:
            seconds = self._step_times.seconds(requests, kv_tokens, 0, 0) * self._next_factor()
            ahead = self._ahead = (requests, kv_tokens, seconds)
        return max(self._busy_until, self._clock.now()) + ahead[2], ahead[2]

    def pass_step(self, ready_at: float) -> None:
        """The step looked at last was run."""
        self._busy_until = ready_at
        self._ahead = self._factor = None

    def _seconds(self, plan: StepPlan) -> float:
        requests, ahead = len(plan.decode.slots), self._ahead
        if plan.drafts:
            seconds = self._next_factor() * self._drafted_seconds(plan)
        elif ahead and not plan.chunks and ahead[0] == requests and ahead[1] == plan.decode_context:
            seconds = ahead[2]
        else:
            seconds = self._next_factor() * self._step_times.seconds(
                requests, plan.decode_context, plan.prefill_tokens, plan.prefill_context
            )
        self._ahead = self._factor = None
        return seconds + (len(plan.copies_out) + len(plan.copies_in)) * self._copy_s_per_block

    def _drafted_seconds(self, plan: StepPlan) -> float:
        """A guess takes what a prompt token takes."""
        guesses = [(draft.count - 1, draft.start + draft.count) for draft in plan.drafts]
        return self._step_times.seconds(
            len(plan.decode.slots) + len(plan.drafts),
            plan.decode_context + plan.draft_context,
            plan.prefill_tokens + sum(count for count, _ in guesses),
            plan.prefill_context + sum(count * end for count, end in guesses),
        )

    def _next_factor(self) -> float:
        """Of the next step to run: one draw a step, however often it is looked at before."""
        if self._random is None:
            return 1.0
        if self._factor is None:
            self._factor = exp(self._random.gauss(0.0, self._noise) - self._noise**2 / 2)
        return self._factor

    def _stopped(self, plan: StepPlan) -> list[Request]:
        """Requests that end with this plan's token. Those that end later are noted by their step."""
        if self._output_tokens is None:
            return []
        stopped = self._due(plan.step)
        for chunk, request in zip(plan.chunks, plan.chunk_requests, strict=True):
            if not chunk.samples:
                continue
            total = self._output_tokens(request)
            if total >= request.max_tokens:
                continue
            left = total - request.num_planned_outputs
            if left <= 0:
                stopped.append(request)
            else:
                self._note_stop(plan.step + left, request)
        return stopped

    def _note_stop(self, step: int, request: Request) -> None:
        if step not in self._stops:
            self._stops[step] = []
            heapq.heappush(self._stop_steps, step)
        self._stops[step].append((request, request.decode_since))

    def _due(self, step: int) -> list[Request]:
        """Those noted for `step` that have decoded ever since: not those preempted meanwhile."""
        if not self._stop_steps or self._stop_steps[0] > step:
            return []
        heapq.heappop(self._stop_steps)
        return [request for request, since in self._stops.pop(step) if request.decode_since == since]

    def _tokens(self, plan: StepPlan) -> list[int]:
        vocab = self.shape.vocab_size
        requests = (*plan.decode.requests, *plan.sampled_requests)
        tokens = [scripted_token(r, len(r.output_ids), vocab) for r in requests]
        return tokens + scripted_drafts(plan, vocab)

    def close(self) -> None:
        """Nothing to release."""

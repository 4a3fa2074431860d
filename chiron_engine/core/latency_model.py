"""An executor that takes time and computes nothing: step times follow a linear model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chiron_engine.core.clocks import Clock
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.null_executor import scripted_token
from chiron_engine.policy.iteration.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Seconds of a step: base + per_request n + per_kv_token K + per_prompt_token P
    + per_prompt_context C + per_block_copied, with n decoding requests, K the sum of their KV
    lengths, P prompt tokens and C the sum over chunks of count x KV length."""

    base_s: float
    per_request_s: float = 0.0
    per_kv_token_s: float = 0.0
    per_prompt_token_s: float = 0.0
    per_prompt_context_s: float = 0.0
    per_copied_block_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")

    def seconds(self, plan: StepPlan) -> float:
        return (
            self.base_s
            + self.per_request_s * len(plan.decode.slots)
            + self.per_kv_token_s * plan.decode_context
            + self.per_prompt_token_s * plan.prefill_tokens
            + self.per_prompt_context_s * plan.prefill_context
            + self.per_copied_block_s * (len(plan.copies_out) + len(plan.copies_in))
        )


@dataclass(slots=True)
class TimedStep:
    plan: StepPlan
    ready_at: float
    seconds: float


class LatencyModelExecutor:
    """Steps take the time the model says, on the given clock, one after another.

    With `scripted_tokens` it yields token ids (an engine process needs some to send); without, a
    step costs nothing per request, which is what a simulation of millions wants.
    """

    def __init__(
        self, shape: ExecutorShape, model: StepTimeModel, clock: Clock, *, scripted_tokens: bool = False
    ) -> None:
        self.shape = shape
        self._model = model
        self._clock = clock
        self._scripted_tokens = scripted_tokens
        self._busy_until = 0.0

    def submit(self, plan: StepPlan) -> TimedStep:
        seconds = self._model.seconds(plan)
        self._busy_until = max(self._busy_until, self._clock.now()) + seconds
        return TimedStep(plan, self._busy_until, seconds)

    def collect(self, handle: TimedStep) -> StepResult:
        self._clock.sleep(handle.ready_at - self._clock.now())
        return StepResult(self._tokens(handle.plan) if self._scripted_tokens else None, handle.seconds)

    def _tokens(self, plan: StepPlan) -> list[int]:
        sampled = [r for c, r in zip(plan.chunks, plan.chunk_requests, strict=True) if c.samples]
        vocab = self.shape.vocab_size
        return [scripted_token(r, len(r.output_ids), vocab) for r in (*plan.decode.requests, *sampled)]

    def close(self) -> None:
        """Nothing to release."""

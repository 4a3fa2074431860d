"""A latency model in real time: an engine process that computes nothing and takes as long."""

from __future__ import annotations

from dataclasses import dataclass

from chiron_engine.core.clocks import Clock
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor, StepTimes
from chiron_engine.core.simulated_tokens import SimulatedTokens
from chiron_engine.policy.iteration.plan import StepPlan

LONGEST_CATCH_UP_S = 0.05


@dataclass(frozen=True, slots=True)
class ScaledStepTimes:
    """Steps that take `scale` times as long as `times` says. Raises ValueError unless scale > 0."""

    times: StepTimes
    scale: float

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"the time scale is {self.scale}; it must be a positive finite number")

    def seconds(self, requests: int, kv_tokens: int, prompt_tokens: int, prompt_context: int) -> float:
        return self.scale * self.times.seconds(requests, kv_tokens, prompt_tokens, prompt_context)


class RealTimeExecutor(LatencyModelExecutor):
    """Sleeps each step's modelled time, and yields `SimulatedTokens`.

    Without an idle moment between them, a step begins when the one before it was to end, so that waking
    late and the engine's own work add up to no drift. What is later than LONGEST_CATCH_UP_S, as on a
    machine too busy for the model's pace, stays lost: steps are not rushed for longer than that.
    """

    def __init__(
        self,
        shape: ExecutorShape,
        step_times: StepTimes,
        clock: Clock,
        tokens: SimulatedTokens,
        copy_s_per_block: float = 0.0,
    ) -> None:
        super().__init__(shape, step_times, clock, copy_s_per_block=copy_s_per_block, scripted_tokens=True)
        self._simulated = tokens

    def _begin(self, plan: StepPlan) -> float:
        now = self._clock.now()
        goes_on = bool(plan.decode.slots or plan.drafts or (plan.chunks and not plan.joined))
        return max(now - LONGEST_CATCH_UP_S if goes_on else now, self._busy_until)

    def _tokens(self, plan: StepPlan) -> list[int]:
        return self._simulated.of_step(plan)

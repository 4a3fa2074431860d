"""The seam between the engine's decisions and whatever carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from chiron_engine.policy.iteration.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ExecutorShape:
    """The fixed capacity of an executor; limits move below it.

    max_slots: requests that can run at once. max_step_tokens: tokens in one step.
    max_model_len: tokens (prompt and output) one request may hold. has_logits: it computes a model.
    """

    block_size: int
    num_device_blocks: int
    num_host_blocks: int
    max_slots: int
    max_step_tokens: int
    max_model_len: int
    vocab_size: int
    pipeline_depth: int = 1
    has_logits: bool = False


class StepHandle(Protocol):
    """A step under way."""

    @property
    def plan(self) -> StepPlan: ...


class Executor(Protocol):
    """Carries out step plans in order. At most `shape.pipeline_depth` are under way at once."""

    @property
    def shape(self) -> ExecutorShape: ...

    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Returns at once where the device is asynchronous."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a step, the oldest one first, and return its tokens. Takes this executor's own
        kind of StepHandle."""
        ...

    def close(self) -> None:
        """Release device memory and threads. May be called more than once."""
        ...

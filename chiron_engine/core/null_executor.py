"""An executor that computes nothing: tokens are a function of the request alone, time stands still."""

from __future__ import annotations

from dataclasses import dataclass

from chiron_engine.core.executor import ExecutorShape
from chiron_engine.policy.iteration.plan import StepPlan, StepResult
from chiron_engine.policy.iteration.request import Request


@dataclass(slots=True)
class PlannedStep:
    """The handle of an executor whose steps need no device."""

    plan: StepPlan


def scripted_token(request: Request, index: int, vocab_size: int) -> int:
    """Output token `index` of a request: depends on its seed and prompt, on nothing else."""
    return (request.seed * 31 + request.prompt_ids[0] * 7 + index * 13 + 1) % vocab_size


def scripted_drafts(plan: StepPlan, vocab_size: int) -> list[int]:
    """After every row of the drafts."""
    return [
        scripted_token(request, len(request.output_ids) + row, vocab_size)
        for draft, request in zip(plan.drafts, plan.draft_requests, strict=True)
        for row in range(draft.count)
    ]


class NullExecutor:
    """Yields `scripted_token`s at once. For tests and for timing everything but the model."""

    def __init__(self, shape: ExecutorShape) -> None:
        self.shape = shape

    def submit(self, plan: StepPlan) -> PlannedStep:
        return PlannedStep(plan)

    def collect(self, handle: PlannedStep) -> StepResult:
        plan = handle.plan
        vocab = self.shape.vocab_size
        tokens = [scripted_token(r, len(r.output_ids), vocab) for r in plan.decode.requests]
        if plan.chunks:
            tokens += [scripted_token(r, len(r.output_ids), vocab) for r in plan.sampled_requests]
        if plan.drafts:
            tokens += scripted_drafts(plan, vocab)
        return StepResult(tokens)

    def close(self) -> None:
        """Nothing to release."""

"""Step times by a linear model, within the region it was fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from chiron_engine.policy.iteration.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class StepRegion:
    """The largest step: decoding requests, their KV tokens, prompt tokens, prompt context."""

    requests: int
    kv_tokens: int
    prompt_tokens: int
    prompt_context: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


class LinearStepTimes:
    """`costs` as a plant. Steps beyond `measured` count as extrapolated; steps beyond `capacity`
    raise ValueError. Either may be left out."""

    __slots__ = ("capacity", "costs", "extrapolated", "measured")

    def __init__(
        self, costs: StepCosts, measured: StepRegion | None = None, capacity: StepRegion | None = None
    ) -> None:
        self.costs = costs
        self.measured = measured
        self.capacity = capacity
        self.extrapolated = 0

    def seconds(self, requests: int, kv_tokens: int, prompt_tokens: int, prompt_context: int) -> float:
        if not (requests or prompt_tokens):
            return 0.0
        most, seen = self.capacity, self.measured
        if most is not None and _exceeds(most, requests, kv_tokens, prompt_tokens, prompt_context):
            raise ValueError(
                f"a step of {requests} requests with {kv_tokens} KV tokens and {prompt_tokens} prompt "
                f"tokens of context {prompt_context}; the profile goes to {most}"
            )
        if seen is not None and _exceeds(seen, requests, kv_tokens, prompt_tokens, prompt_context):
            self.extrapolated += 1
        return self.costs.seconds(requests, kv_tokens, prompt_tokens, prompt_context)


def _exceeds(region: StepRegion, requests: int, kv_tokens: int, tokens: int, context: int) -> bool:
    return (
        requests > region.requests
        or kv_tokens > region.kv_tokens
        or tokens > region.prompt_tokens
        or context > region.prompt_context
    )

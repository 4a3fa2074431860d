"""What a request asks of an instance, as a share of it (u, du) and as work.

Symbols are those of the step model t = c + a n + b K + p P (`StepCosts`): n requests decode, K is
the sum of their KV lengths, P the prompt tokens of the step; S is an ITL target.
"""

from __future__ import annotations

from chiron_engine.policy.iteration.step_costs import StepCosts

from .config import FleetConfig
from .messages import InstanceSpec, MeasuredStep

LEARNING_RATE = 0.05
"""Weight of one report, so that no single instance moves the fleet."""
MOST_DRIFT = 2.0
"""Factor by which steps may be slower or faster than the spec says, in the model's eyes."""
LEAST_ROOM = 0.02
"""Share of S that a step has for requests at least, where the base learned leaves none: loads stay
finite."""


def target_out_of_reach(spec: InstanceSpec, config: FleetConfig) -> str | None:
    """Why no instance of this spec can keep one of the configured ITL targets; None where they can."""
    for target in config.itl_targets_s:
        if target * config.itl_margin <= spec.costs.base_s:
            return (
                f"no instance can meet an ITL target of {1e3 * target:g} ms: an empty step takes "
                f"{1e3 * spec.costs.base_s:.3g} ms; the best on offer is "
                f"{1e3 * spec.costs.base_s / config.itl_margin:.3g} ms"
            )
    return None


class CapacityModel:
    """An instance is full when its steps reach the ITL target, its KV or its slots, whichever
    comes first; a step takes base + the sum of what each request adds to it.

    Step costs are the spec's, times how much slower the steps of instances are than it says. Only
    that factor is learned: steps at one operating point tell the time there and near it, but not
    which coefficient it comes from, and u hangs on S - c. `costs` are for steps that keep an
    interactive ITL target, `batch_costs` for the long steps of batch work: true step times are no
    straight line, so each regime has its own factor.
    """

    def __init__(self, spec: InstanceSpec, config: FleetConfig) -> None:
        self.spec = spec
        self.costs = spec.costs
        self.batch_costs = spec.costs
        self._slowness = 1.0
        self._batch_slowness = 1.0
        self.kv_capacity = float(spec.kv_capacity_tokens)
        self.max_slots = spec.max_slots
        self.batch_itl_s = config.batch_itl_s
        self._margin = config.itl_margin

    def learn(self, step: MeasuredStep, interactive_load: float) -> None:
        """Take in a step of an instance with this u of interactive work: the fuller it is, the nearer
        to the steps that matter."""
        expected = self.spec.costs.seconds(
            step.requests, step.kv_tokens, step.prompt_tokens, step.prompt_context
        )
        slowness = min(max(step.seconds / expected, 1.0 / MOST_DRIFT), MOST_DRIFT)
        if interactive_load > 0:
            weight = LEARNING_RATE * min(1.0, interactive_load)
            self._slowness += weight * (slowness - self._slowness)
            self.costs = self.spec.costs.scaled(self._slowness)
        else:
            self._batch_slowness += LEARNING_RATE * (slowness - self._batch_slowness)
            self.batch_costs = self.spec.costs.scaled(self._batch_slowness)

    def costs_at(self, target_s: float) -> StepCosts:
        """Those of the regime that steps at this ITL target are in."""
        return self.batch_costs if target_s >= self.batch_itl_s else self.costs

    def room_s(self, target_s: float) -> float:
        """S - c: seconds of a step at this ITL target beyond those of an empty one, S less its
        margin. Where an empty step misses S, engines make steps of twice its length."""
        base_s = self.costs_at(target_s).base_s
        if base_s >= target_s:
            return base_s
        return max(self._margin * target_s - base_s, LEAST_ROOM * target_s)

    def added_s(self, prompt_tokens: float, output_tokens: float, target_s: float) -> float:
        """Seconds a request adds to each step it decodes in, its prompt spread over them:
        a + b ctx + p prompt / output, at its mean context."""
        costs = self.costs_at(target_s)
        return (
            costs.per_request_s
            + costs.per_kv_token_s * (prompt_tokens + 0.5 * output_tokens)
            + costs.prefill_s(prompt_tokens) / output_tokens
        )

    def share(self, added_s: float, kv_tokens: float, target_s: float) -> float:
        """du = max(added / (S - c), KV / KV capacity, 1 / slots), the part of one instance that a
        request takes while it runs."""
        share = max(added_s / self.room_s(target_s), kv_tokens / self.kv_capacity, 1.0 / self.max_slots)
        return min(1.0, share)

    def work_s(self, prompt_tokens: float, output_tokens: float, target_s: float) -> float:
        """Seconds of one full instance for a request: prefill + sum over output tokens of
        a + b ctx + c du, its part of the empty step. With du the share of KV this is the
        c ctx / capacity of the lower bound, with the share of time its c / n_max(S)."""
        added = self.added_s(prompt_tokens, output_tokens, target_s)
        share = self.share(added, prompt_tokens + 0.5 * output_tokens, target_s)
        return output_tokens * (added + self.costs_at(target_s).base_s * share)

    def service_s(self, prompt_tokens: float, output_tokens: float, target_s: float) -> float:
        """Seconds from routing to the last token on a full instance."""
        added = self.added_s(prompt_tokens, output_tokens, target_s)
        share = self.share(added, prompt_tokens + 0.5 * output_tokens, target_s)
        return output_tokens * (added / share + self.costs_at(target_s).base_s)

"""All that makes one engine core decide as it does, but for what comes to it while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chiron_engine.core.clocks import Clock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import Executor, ExecutorShape
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity, ItlTargets
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.limits import Limits
from chiron_engine.policy.iteration.local_autoscaler import make_local_autoscaler
from chiron_engine.policy.iteration.speculation import Speculation
from chiron_engine.policy.iteration.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """Plain data, so that a recording can hold it. shape: of the executor. local_autoscaler: its name,
    with the targets it keeps; None leaves the limits at the capacity. costs: of steps, where they are
    known beforehand. num_speculative_tokens: guesses for one request in a step, at most; 0 makes none."""

    shape: ExecutorShape
    local_autoscaler: str | None = None
    targets: ItlTargets | None = None
    costs: StepCosts | None = None
    swap_costs: SwapCosts = field(default_factory=SwapCosts)
    enable_prefix_caching: bool = True
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    num_speculative_tokens: int = 0

    @classmethod
    def from_plain(cls, fields: Mapping[str, Any]) -> CoreSettings:
        """From what `dataclasses.asdict` makes of one. Raises KeyError or TypeError for anything else."""
        targets, costs = fields["targets"], fields["costs"]
        return cls(
            **{
                **fields,
                "shape": ExecutorShape(**fields["shape"]),
                "targets": None if targets is None else ItlTargets(**targets),
                "costs": None if costs is None else StepCosts(**costs),
                "swap_costs": SwapCosts(**fields["swap_costs"]),
            }
        )

    def build(self, executor: Executor, clock: Clock | None = None) -> EngineCore:
        """Raises ValueError for an unknown local autoscaler, or what EngineCore refuses."""
        return EngineCore(executor, clock=clock, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Those of EngineCore, but for its executor and clock. Raises what `build` raises."""
        shape, autoscaler, limits = self.shape, None, None
        tokens = shape.num_device_blocks * shape.block_size
        capacity = EngineCapacity(shape.max_slots, shape.max_step_tokens, shape.block_size, tokens)
        if self.local_autoscaler is None:
            limits = Limits(shape.max_slots, shape.max_step_tokens)
        else:
            targets = self.targets
            if targets is None:
                raise ValueError(f"the local autoscaler {self.local_autoscaler} has no targets to keep")
            autoscaler = make_local_autoscaler(self.local_autoscaler, capacity, targets, self.costs)
        most = self.num_speculative_tokens
        return {
            "limits": limits,
            "local_autoscaler": autoscaler,
            "swap_costs": self.swap_costs,
            "enable_prefix_caching": self.enable_prefix_caching,
            "max_queued_requests": self.max_queued_requests,
            "max_queued_tokens": self.max_queued_tokens,
            "speculation": Speculation(most, capacity, self.costs) if most else None,
        }

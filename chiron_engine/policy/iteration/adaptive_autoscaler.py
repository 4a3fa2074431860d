"""Our local autoscaler: one controller of limits for each regime of the engine.

While interactive requests are in the engine its steps keep the interactive ITL target; with batch
work alone they may be many times as long. The two run at different places of a curve that is no
straight line, and change over within a step: so each regime has a controller of its own, which goes
on from where it stood.
"""

from __future__ import annotations

from .autoscaler_inputs import EngineCapacity, ItlTargets
from .limit_controller import LimitController
from .limits import Limits
from .step_costs import StepCosts
from .step_stats import StepStats


class AdaptiveAutoscaler:
    """Starts with the interactive target, the tighter one."""

    def __init__(self, capacity: EngineCapacity, targets: ItlTargets, prior: StepCosts | None = None) -> None:
        self._interactive = LimitController(capacity, targets.interactive_s, "preempt", prior)
        self._batch = LimitController(capacity, targets.batch_s, "drain", prior)
        self._active = self._interactive
        self._last_decodes = 0
        self._last_kv_tokens = 0

    @property
    def limits(self) -> Limits:
        return self._active.limits

    @property
    def latency_backpressure(self) -> float:
        return self._active.latency_backpressure

    @property
    def throughput_backpressure(self) -> float:
        return self._active.throughput_backpressure

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        self._last_decodes, self._last_kv_tokens = stats.decode_requests, stats.kv_tokens
        interactive_requests = max(stats.interactive_requests, stats.itl_interactive)
        regime = self._interactive if interactive_requests else self._batch
        if regime is not self._active:
            return self._change_to(regime, interactive_requests)
        return regime.on_step(stats, now)

    def on_interactive(self, now: float) -> Limits | None:
        return None if self._active is self._interactive else self._change_to(self._interactive, 1)

    def set_targets(self, targets: ItlTargets) -> Limits | None:
        changed = {
            self._interactive: self._interactive.set_target(targets.interactive_s),
            self._batch: self._batch.set_target(targets.batch_s),
        }
        return changed[self._active]

    def _change_to(self, regime: LimitController, interactive_requests: int) -> Limits:
        self._active = regime
        regime.resume(self._last_decodes, self._last_kv_tokens, interactive_requests)
        return regime.limits

"""What moves the limits of one engine while it runs, chosen by name.

`paper` and `paper-literal` are Algorithm 1 of the paper (section 4), `adaptive` is ours, `fixed` moves
nothing.
"""

from __future__ import annotations

from typing import Protocol

from .adaptive_autoscaler import AdaptiveAutoscaler
from .autoscaler_inputs import EngineCapacity, ItlTargets
from .limits import Limits
from .paper_autoscaler import PaperAutoscaler, PaperLiteralAutoscaler
from .step_costs import StepCosts
from .step_stats import StepStats

__all__ = [
    "LOCAL_AUTOSCALERS",
    "EngineCapacity",
    "FixedAutoscaler",
    "ItlTargets",
    "LocalAutoscaler",
    "make_local_autoscaler",
]


class LocalAutoscaler(Protocol):
    """Sees every committed step of one engine and says when its limits are to change."""

    @property
    def limits(self) -> Limits:
        """In force now; at first the ones to start with."""
        ...

    @property
    def latency_backpressure(self) -> float:
        """LBP: observed ITL over the target (paper, section 4); 0 before anything ran."""
        ...

    @property
    def throughput_backpressure(self) -> float:
        """TBP: throughput of the interval before over that of the last (paper, section 4)."""
        ...

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        """Called for every committed step; new limits, or None to leave them."""
        ...

    def on_interactive(self, now: float) -> Limits | None:
        """Called when an interactive request enters an engine that held none: the answer binds before
        the next plan."""
        ...

    def set_targets(self, targets: ItlTargets) -> Limits | None:
        """Keep other targets from now on."""
        ...


class FixedAutoscaler:
    """Keeps the limits it is given; by default the capacity."""

    def __init__(self, capacity: EngineCapacity, fixed: Limits | None = None) -> None:
        self.limits = fixed or Limits(capacity.max_slots, capacity.max_step_tokens)
        self.latency_backpressure = 0.0
        self.throughput_backpressure = 0.0

    def on_step(self, stats: StepStats, now: float) -> Limits | None:
        return None

    def on_interactive(self, now: float) -> Limits | None:
        return None

    def set_targets(self, targets: ItlTargets) -> Limits | None:
        return None


LOCAL_AUTOSCALERS = ("adaptive", "paper", "paper-literal", "fixed")


def make_local_autoscaler(
    name: str,
    capacity: EngineCapacity,
    targets: ItlTargets,
    prior: StepCosts | None = None,
    fixed: Limits | None = None,
) -> LocalAutoscaler:
    """prior: step costs to start from (`adaptive`). fixed: limits that `fixed` keeps, and whose token
    budget the paper's autoscalers keep (they have none of their own). Raises ValueError for an unknown
    name, or limits above the capacity."""
    if fixed is not None:
        _check_fits(fixed, capacity)
    if name == "adaptive":
        return AdaptiveAutoscaler(capacity, targets, prior)
    if name == "paper":
        return PaperAutoscaler(capacity, targets, fixed.token_budget if fixed else None)
    if name == "paper-literal":
        return PaperLiteralAutoscaler(capacity, targets, fixed.token_budget if fixed else None)
    if name == "fixed":
        return FixedAutoscaler(capacity, fixed)
    raise ValueError(f"unknown local autoscaler {name!r}; there are {', '.join(LOCAL_AUTOSCALERS)}")


def _check_fits(limits: Limits, capacity: EngineCapacity) -> None:
    if limits.max_running > capacity.max_slots or limits.token_budget > capacity.max_step_tokens:
        raise ValueError(
            f"limits of {limits.max_running} requests and {limits.token_budget} tokens a step exceed the "
            f"capacity of {capacity.max_slots} and {capacity.max_step_tokens}"
        )

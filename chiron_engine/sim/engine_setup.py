"""What the instances of one simulation have in common, and the executor each of them runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chiron_engine.core.clocks import VirtualClock
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.latency_model import LatencyModelExecutor, TimedStep
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.local_autoscaler import (
    EngineCapacity,
    ItlTargets,
    LocalAutoscaler,
    make_local_autoscaler,
)
from chiron_engine.policy.iteration.plan import StepPlan
from chiron_engine.policy.iteration.request import Request

from .profile import Profile
from .request_book import LiveRequest


def engine_shape(profile: Profile, block_size: int, host_kv_share: float) -> ExecutorShape:
    """host_kv_share: host memory for saved KV, as a multiple of the device's."""
    blocks = profile.kv_capacity_tokens // block_size
    return ExecutorShape(
        block_size=block_size,
        num_device_blocks=blocks,
        num_host_blocks=int(blocks * host_kv_share),
        max_slots=profile.max_slots,
        max_step_tokens=profile.max_step_tokens,
        max_model_len=min(profile.max_model_len, blocks * block_size),
        vocab_size=1,
    )


class ObservedExecutor(LatencyModelExecutor):
    """Tells who is preempted, which the output of a step does not say of those who stay."""

    on_preempted: Callable[[list[Request]], None]

    def submit(self, plan: StepPlan) -> TimedStep:
        if plan.preempted:
            self.on_preempted(plan.preempted)
        return super().submit(plan)


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """local_autoscaler: by name. interactive_itl_slo_s: gaps over it are late. batch_itl_s: ITL target
    of batch work."""

    profile: Profile
    shape: ExecutorShape
    local_autoscaler: str
    interactive_itl_slo_s: float
    batch_itl_s: float
    step_noise: float
    seed: int

    @property
    def swap_costs(self) -> SwapCosts:
        copy_s = self._block_copy_s
        return SwapCosts(copy_s, copy_s, self.profile.fit.per_prompt_token_s)

    @property
    def _block_copy_s(self) -> float:
        return self.profile.copy_s_per_kv_token * self.shape.block_size

    def autoscaler(self, itl_target_s: float) -> LocalAutoscaler:
        shape = self.shape
        tokens = shape.num_device_blocks * shape.block_size
        capacity = EngineCapacity(shape.max_slots, shape.max_step_tokens, shape.block_size, tokens)
        targets = ItlTargets(itl_target_s, self.batch_itl_s)
        return make_local_autoscaler(self.local_autoscaler, capacity, targets, self.profile.fit)

    def executor(self, clock: VirtualClock, instance_id: int) -> ObservedExecutor:
        return ObservedExecutor(
            self.shape,
            self.profile.step_times,
            clock,
            output_tokens=_true_length,
            copy_s_per_block=self._block_copy_s,
            noise=self.step_noise,
            seed=self.seed * 1_000_003 + instance_id,
        )


def _true_length(request: Request) -> int:
    live: LiveRequest = request.client  # type: ignore[assignment]
    return live.left

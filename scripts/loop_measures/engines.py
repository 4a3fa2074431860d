"""An executor to put engine cores over, in this process: a real model on the CPU, or a latency profile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from chiron_engine.commands.simulated_engine import fill_from_profile, simulated_shape
from chiron_engine.config import EngineConfig
from chiron_engine.core.clocks import MonotonicClock
from chiron_engine.core.executor import Executor, ExecutorShape, StepHandle
from chiron_engine.core.real_time_executor import RealTimeExecutor
from chiron_engine.core.simulated_tokens import SimulatedTokens
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.plan import StepPlan, StepResult
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.runtime.torch_environment import prepare_environment
from chiron_engine.sim.profiles import load_profile

VOCABULARY = 1000


@dataclass(frozen=True, slots=True)
class Plant:
    """What an engine core is made of, besides its settings. costs: of steps, as timed or modelled."""

    name: str
    config: EngineConfig
    executor: Executor
    swap_costs: SwapCosts
    costs: StepCosts


def real_plant(config: EngineConfig, resources: ExitStack) -> Plant:
    """Loads the model and times steps; takes seconds. `resources` closes it. Raises what
    `build_executor` raises."""
    prepare_environment()  # before torch is loaded by what follows
    from chiron_engine.runtime.build import build_executor
    from chiron_engine.runtime.trial_steps import measure_step_costs, measure_swap_costs

    executor, spec = build_executor(config)
    resources.callback(executor.close)
    swap_costs, costs = measure_swap_costs(executor), measure_step_costs(executor)
    return Plant(f"{spec.name}, {config.dtype}", config, executor, swap_costs, costs)


def simulated_plant(config: EngineConfig) -> Plant:
    """Raises ValueError for more than the profile has."""
    profile = load_profile(config.profile or "")
    config = fill_from_profile(config, {"max_num_seqs": config.max_num_seqs})
    shape = simulated_shape(config, profile, VOCABULARY)
    copy_s = profile.copy_s_per_kv_token * shape.block_size
    tokens = SimulatedTokens(VOCABULARY, VOCABULARY - 1, shape.max_slots)
    executor = RealTimeExecutor(shape, profile.step_times, MonotonicClock(), tokens, copy_s)
    swap_costs = SwapCosts(copy_s, copy_s, profile.fit.per_prompt_token_s)
    return Plant(profile.name, config, executor, swap_costs, profile.fit)


class WatchedExecutor:
    """Another executor, whose plans are shown before they run."""

    def __init__(self, executor: Executor, watch: Callable[[StepPlan], None]) -> None:
        self._executor = executor
        self._watch = watch

    @property
    def shape(self) -> ExecutorShape:
        return self._executor.shape

    def submit(self, plan: StepPlan) -> StepHandle:
        self._watch(plan)
        return self._executor.submit(plan)

    def collect(self, handle: StepHandle) -> StepResult:
        return self._executor.collect(handle)

    def close(self) -> None:
        """The executor is its owner's to close."""

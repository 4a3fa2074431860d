"""An EngineCore as a configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiron_engine.config import EngineConfig
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import Executor
from chiron_engine.core.step_stats import StepLog
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity, ItlTargets
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.local_autoscaler import make_local_autoscaler
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.runtime.torch_environment import prepare_environment

if TYPE_CHECKING:
    from pathlib import Path

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A core over a loaded model, and what the rest of a process needs to know of the model.

    dtype: the one in use, as `bfloat16`. path: the directory of its tokenizer; None without one. costs: of
    steps, as far as they were timed.
    """

    core: EngineCore
    name: str
    architecture: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    path: Path | None
    costs: StepCosts | None = None


def load_core(
    config: EngineConfig,
    resources: ExitStack,
    progress: Progress | None = None,
    *,
    time_steps: bool = False,
) -> LoadedModel:
    """Load a model and put a core over it. `resources` closes both, and the step log.

    Takes seconds, imports torch. Raises what `build_executor` raises, and ValueError where the step
    log cannot be written, or where the executor is not torch.
    """
    if config.executor != "torch":
        raise ValueError(f"a model needs the executor torch, not {config.executor}")
    prepare_environment()  # before torch is loaded by what follows
    from chiron_engine.runtime.build import build_executor
    from chiron_engine.runtime.trial_steps import measure_step_costs, measure_swap_costs

    log = open_log(config.step_log, resources)
    executor, spec = build_executor(config, progress)
    resources.callback(executor.close)
    core = build_core(config, executor, log, measure_swap_costs(executor))
    return LoadedModel(
        core=core,
        name=config.served_model_name or spec.name,
        architecture=spec.architecture,
        dtype=str(executor.model.dtype).removeprefix("torch."),
        eos_token_ids=spec.eos_token_ids,
        path=spec.path,
        costs=measure_step_costs(executor) if time_steps else None,
    )


def build_core(
    config: EngineConfig,
    executor: Executor,
    log: StepLog | None = None,
    swap_costs: SwapCosts | None = None,
    costs: StepCosts | None = None,
) -> EngineCore:
    """costs: of steps, where they are known beforehand. Raises ValueError for an unknown local
    autoscaler."""
    shape = executor.shape
    capacity = EngineCapacity(
        shape.max_slots, shape.max_step_tokens, shape.block_size, shape.num_device_blocks * shape.block_size
    )
    targets = ItlTargets(config.itl_slo_s, config.batch_itl_slo_s)
    core = EngineCore(
        executor,
        local_autoscaler=make_local_autoscaler(config.local_autoscaler, capacity, targets, costs),
        enable_prefix_caching=config.enable_prefix_caching,
        swap_costs=swap_costs,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
    )
    if log is not None:
        core.add_step_hook(log)
    return core


def open_log(path: str | None, resources: ExitStack) -> StepLog | None:
    if path is None:
        return None
    try:
        return resources.enter_context(StepLog(path))
    except OSError as error:
        raise ValueError(f"cannot write the step log {path}: {error.strerror}") from error

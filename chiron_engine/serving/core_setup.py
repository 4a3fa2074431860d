"""An EngineCore as a configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from chiron_engine.config import EngineConfig
from chiron_engine.core.core_settings import CoreSettings
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import Executor
from chiron_engine.core.step_record import RecordedCore, StepRecord
from chiron_engine.core.step_stats import StepLog
from chiron_engine.policy.iteration.autoscaler_inputs import ItlTargets
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.policy.iteration.sampling_params import Guide
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.runtime.torch_environment import prepare_environment

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A core over a loaded model, and what the rest of a process needs to know of the model.

    dtype: the one in use, as `bfloat16`. path: the directory of its tokenizer; None without one. costs: of
    steps, as far as they were timed. compile_guide: makes what `Request.guide` holds, and raises ValueError;
    None where no output can follow one.
    """

    core: EngineCore
    name: str
    architecture: str
    dtype: str
    eos_token_ids: tuple[int, ...]
    path: Path | None
    costs: StepCosts | None = None
    compile_guide: Callable[[Guide], object] | None = None


def load_core(
    config: EngineConfig,
    resources: ExitStack,
    progress: Progress | None = None,
    *,
    time_steps: bool = False,
) -> LoadedModel:
    """Load a model and put a core over it. `resources` closes both, and what is logged. time_steps:
    tell step costs, also where the local autoscaler starts from none.

    Takes seconds, imports torch. Raises what `build_executor` raises, and ValueError where a log
    cannot be written, or where the executor is not torch.
    """
    if config.executor != "torch":
        raise ValueError(f"a model needs the executor torch, not {config.executor}")
    prepare_environment()  # before torch is loaded by what follows
    from chiron_engine.runtime.build import build_executor
    from chiron_engine.runtime.guides import GuideCompiler
    from chiron_engine.runtime.trial_steps import measure_step_costs, measure_swap_costs

    log, record = open_log(config.step_log, resources), open_record(config.record_steps, resources)
    executor, spec = build_executor(config, progress)
    resources.callback(executor.close)
    learns = config.local_autoscaler == "adaptive" or config.num_speculative_tokens > 0
    costs = measure_step_costs(executor) if time_steps or learns else None
    swap_costs = measure_swap_costs(executor, costs)
    core = build_core(config, executor, log, swap_costs, costs, record=record)
    return LoadedModel(
        core=core,
        name=config.served_model_name or spec.name,
        architecture=spec.architecture,
        dtype=executor.model.precision.name,
        eos_token_ids=spec.eos_token_ids,
        path=spec.path,
        costs=costs,
        compile_guide=GuideCompiler(spec.path, spec.vocab_size, spec.eos_token_ids).compile,
    )


def build_core(
    config: EngineConfig,
    executor: Executor,
    log: StepLog | None = None,
    swap_costs: SwapCosts | None = None,
    costs: StepCosts | None = None,
    record: StepRecord | None = None,
) -> EngineCore:
    """costs: of steps, where they are known beforehand. record: where to record its run. Raises
    ValueError for an unknown local autoscaler, and for guesses where the executor keeps steps under way."""
    settings = CoreSettings(
        executor.shape,
        config.local_autoscaler,
        ItlTargets(config.itl_slo_s, config.batch_itl_slo_s),
        costs,
        swap_costs if swap_costs is not None else SwapCosts(),
        config.enable_prefix_caching,
        config.max_queued_requests,
        config.max_queued_tokens,
        config.num_speculative_tokens,
    )
    core = settings.build(executor) if record is None else RecordedCore(settings, executor, record)
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


def open_record(folder: str | None, resources: ExitStack) -> StepRecord | None:
    if folder is None:
        return None
    try:
        record = StepRecord(Path(folder))
    except OSError as error:
        raise ValueError(f"cannot record steps in {folder}: {error.strerror}") from error
    resources.callback(record.close)
    return record

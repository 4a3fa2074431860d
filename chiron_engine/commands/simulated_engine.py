"""An engine without a model, in real time: the latency profile, the executor and the core, tied together.

Loads neither torch nor transformers, so that one machine runs a fleet of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from chiron_engine.config import BLOCK_SIZE, EngineConfig
from chiron_engine.core.clocks import MonotonicClock
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.real_time_executor import RealTimeExecutor, ScaledStepTimes
from chiron_engine.core.simulated_tokens import SimulatedTokens
from chiron_engine.policy.iteration.kv_tiers import SwapCosts
from chiron_engine.serving.core_setup import LoadedModel, build_core, open_log, open_record
from chiron_engine.sim.profile import Profile
from chiron_engine.sim.profiles import load_profile

from .model_text import text_directory

# Of a model of which nothing is known: any id of today's models is inside.
VOCABULARY_WITHOUT_TOKENIZER = 1 << 18
TORCH_ONLY = (
    "dtype",
    "device",
    "gpu_memory_utilization",
    "threads",
    "kernels",
    "kv_cache_dtype",
    "enforce_eager",
    "disable_cascade_attn",
    "cascade_min_tokens",
)


def fill_from_profile(config: EngineConfig, given: Mapping[str, Any]) -> EngineConfig:
    """The configuration with the profile's capacities where none are `given`; the host tier then holds
    as much KV as the device. Raises ValueError for an unknown profile, listing those there are, for
    more than the profile has, and for options that only a real model has."""
    for name in TORCH_ONLY:
        if getattr(config, name) != EngineConfig.__dataclass_fields__[name].default:
            raise ValueError(f"{name} does not apply to a simulated engine")
    profile = load_profile(config.profile or "")
    config = replace(
        config,
        max_num_seqs=given.get("max_num_seqs", profile.max_slots),
        max_num_batched_tokens=given.get("max_num_batched_tokens", profile.max_step_tokens),
        swap_space=given.get("swap_space", profile.kv_capacity_tokens * profile.kv_bytes_per_token),
    )
    simulated_shape(config, profile, 2)
    return config


def simulated_shape(config: EngineConfig, profile: Profile, vocab_size: int) -> ExecutorShape:
    """Raises ValueError for more than the profile has: its step times end there."""
    block_size = config.block_size or BLOCK_SIZE
    block_bytes = profile.kv_bytes_per_token * block_size
    most = profile.kv_capacity_tokens // block_size
    blocks = most if config.kv_cache_memory is None else config.kv_cache_memory // block_bytes
    if not 0 < blocks <= most:
        raise ValueError(
            f"kv_cache_memory is {config.kv_cache_memory} bytes; {profile.name} has room for one block of "
            f"{block_bytes} to {most}, {most * block_bytes} bytes"
        )
    for name, limit in (
        ("max_num_seqs", profile.max_slots),
        ("max_num_batched_tokens", profile.max_step_tokens),
        ("max_model_len", profile.max_model_len),
    ):
        value = getattr(config, name)
        if value is not None and value > limit:
            raise ValueError(f"{name} is {value}; {profile.name} goes to {limit}")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens} and max_num_seqs "
            f"{config.max_num_seqs}; a step must have room for a token of every request"
        )
    return ExecutorShape(
        block_size=block_size,
        num_device_blocks=blocks,
        num_host_blocks=config.swap_space // block_bytes,
        max_slots=config.max_num_seqs,
        max_step_tokens=config.max_num_batched_tokens,
        max_model_len=min(config.max_model_len or profile.max_model_len, blocks * block_size),
        vocab_size=vocab_size,
    )


def load_simulated(config: EngineConfig, resources: ExitStack) -> LoadedModel:
    """A core over a latency profile. `resources` closes what is logged.

    Raises what `fill_from_profile` raises, ModelError for a broken model directory, and ValueError where
    a log cannot be written.
    """
    profile = load_profile(config.profile or "")
    directory = text_directory(config)
    vocab_size, eos_token_ids = _vocabulary(directory)
    shape = simulated_shape(config, profile, vocab_size)
    copy_s = profile.copy_s_per_kv_token * shape.block_size * config.time_scale
    executor = RealTimeExecutor(
        shape,
        ScaledStepTimes(profile.step_times, config.time_scale),
        MonotonicClock(),
        SimulatedTokens(vocab_size, eos_token_ids[0], shape.max_slots),
        copy_s,
    )
    swap_costs = SwapCosts(copy_s, copy_s, profile.fit.per_prompt_token_s * config.time_scale)
    costs = profile.fit.scaled(config.time_scale)
    log, record = open_log(config.step_log, resources), open_record(config.record_steps, resources)
    return LoadedModel(
        core=build_core(config, executor, log, swap_costs, costs, record),
        name=config.served_model_name or Path(config.model).name,
        architecture=f"simulated {profile.name}",
        dtype=profile.name.rpartition("/")[2],
        eos_token_ids=eos_token_ids,
        path=directory,
        costs=costs,
    )


def _vocabulary(directory: Path | None) -> tuple[int, tuple[int, ...]]:
    """Its size and the ids that end an output: of a model directory, else the last id of a large one."""
    from chiron_engine.model.directory import CONFIG, eos_token_ids, read_json
    from chiron_engine.model.errors import ModelError

    if directory is None:
        return VOCABULARY_WITHOUT_TOKENIZER, (VOCABULARY_WITHOUT_TOKENIZER - 1,)
    fields = read_json(directory / CONFIG)
    size = fields.get("vocab_size")
    if not isinstance(size, int) or size < 2:
        raise ModelError(f"{directory / CONFIG} has vocab_size {size!r}; it must be a whole number over 1")
    return size, eos_token_ids(directory, fields) or (size - 1,)

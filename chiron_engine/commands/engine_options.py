"""The options that describe one engine, for every command that runs or starts engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import typer

from chiron_engine.config import (
    DEVICES,
    DTYPES,
    EXECUTORS,
    KERNELS,
    KV_CACHE_DTYPES,
    MOST_GUESSES,
    EngineConfig,
)
from chiron_engine.policy.iteration.local_autoscaler import LOCAL_AUTOSCALERS

from .exits import usage_errors
from .option_tables import TableOption, choice, with_options
from .sizes import parse_size

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(EngineConfig)}
SIZES = ("kv_cache_memory", "swap_space")
# Their defaults are the profile's where the executor is simulated.
BY_EXECUTOR = ("max_num_seqs", "max_num_batched_tokens", "swap_space")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


SIZE = {"parser": _size, "metavar": "SIZE"}


def _entry(name: str, flag: str, kind: Any, help_text: str, **details: Any) -> tuple[str, TableOption]:
    default = None if name in BY_EXECUTOR else DEFAULTS[name]
    return name, TableOption(flag, kind, default, {"help": help_text, **details})


# Keyed by the field of EngineConfig that the option sets.
ENGINE_OPTIONS = dict(
    (
        _entry("served_model_name", "--served-model-name", str | None, "Name clients see for the model."),
        _entry("dtype", "--dtype", str, "Type of weights and KV.", **choice(DTYPES)),
        _entry(
            "kv_cache_dtype",
            "--kv-cache-dtype",
            str,
            "Type of KV: 8 bits need a GPU from 8.9 on.",
            **choice(KV_CACHE_DTYPES),
        ),
        _entry("device", "--device", str, "Where the model runs.", metavar="|".join(DEVICES)),
        _entry("kernels", "--kernels", str, "What computes between the matrix products.", **choice(KERNELS)),
        _entry("max_num_seqs", "--max-num-seqs", int | None, "Requests that run at once (64).", min=1),
        _entry(
            "max_num_batched_tokens",
            "--max-num-batched-tokens",
            int | None,
            "Tokens in one step (512).",
            min=1,
        ),
        _entry(
            "max_model_len",
            "--max-model-len",
            int | None,
            "Tokens of prompt and output (the model's).",
            min=1,
        ),
        _entry(
            "block_size",
            "--block-size",
            int | None,
            "Tokens in one KV block (16; 64 on a GPU).",
            min=1,
            max=4096,
        ),
        _entry("kv_cache_memory", "--kv-cache-memory", int | None, "For KV blocks (a share).", **SIZE),
        _entry("swap_space", "--swap-space", int | None, "Host memory for saved KV (512MiB).", **SIZE),
        _entry(
            "gpu_memory_utilization",
            "--gpu-memory-utilization",
            float,
            "Share of GPU memory.",
            min=0.01,
            max=1,
        ),
        _entry(
            "enable_prefix_caching",
            "--enable-prefix-caching/--no-enable-prefix-caching",
            bool,
            "Reuse the KV of equal prompt starts.",
        ),
        _entry(
            "disable_cascade_attn",
            "--disable-cascade-attn",
            bool,
            "Read shared prompt starts for each request (GPU).",
        ),
        _entry(
            "cascade_min_tokens",
            "--cascade-min-tokens",
            int | None,
            "Shortest prompt start to read once for all (by what it saves).",
            min=1,
        ),
        _entry(
            "num_speculative_tokens",
            "--num-speculative-tokens",
            int,
            "Guess so many tokens from the text where it pays (CPU).",
            min=0,
            max=MOST_GUESSES,
        ),
        _entry("enforce_eager", "--enforce-eager", bool, "Use no CUDA graphs for decode steps."),
        _entry("seed", "--seed", int, "Where the seeds of unseeded requests start.", min=0),
        _entry("threads", "--threads", int | None, "CPU compute threads (all cores).", min=1),
        _entry("max_queued_requests", "--max-num-queued-reqs", int, "Requests that may wait.", min=1),
        _entry("max_queued_tokens", "--max-num-queued-tokens", int, "Prompt tokens that may wait.", min=1),
        _entry("step_log", "--step-log", str | None, "Write one JSON line per step.", metavar="FILE"),
    )
)

with_engine_options = with_options("engine", ENGINE_OPTIONS, "Engine")

# For engine processes; offline there is nothing to time.
EXECUTOR_OPTIONS = dict(
    (
        _entry(
            "local_autoscaler",
            "--local-autoscaler",
            str,
            "What resizes the running batch.",
            **choice(LOCAL_AUTOSCALERS),
        ),
        _entry("executor", "--executor", str, "What runs the steps.", **choice(EXECUTORS)),
        _entry(
            "profile", "--profile", str | None, "Step times of a simulated executor.", metavar="NAME|FILE"
        ),
        _entry(
            "record_steps",
            "--record-steps",
            str | None,
            "Record each engine's run here, for `chiron replay`; holds prompts.",
            metavar="DIR",
        ),
        _entry("time_scale", "--time-scale", float, "Simulated steps take so many times as long."),
    )
)

with_executor_options = with_options("executor_options", EXECUTOR_OPTIONS, "Engine")


def engine_config(model: str, engine: Mapping[str, Any]) -> EngineConfig:
    """Raises CommandError (usage) for a value outside its range."""
    given = {name: value for name, value in engine.items() if value is not None or name not in BY_EXECUTOR}
    with usage_errors():
        config = EngineConfig(model=model, **given)
        if config.executor == "torch":
            return config
        from .simulated_engine import fill_from_profile

        return fill_from_profile(config, given)


def to_arguments(config: EngineConfig) -> list[str]:
    """The model and the options that make the same configuration in another process."""
    arguments = [config.model]
    simulated = config.executor == "simulated"
    for name, option in {**ENGINE_OPTIONS, **EXECUTOR_OPTIONS}.items():
        value = getattr(config, name)
        if value == DEFAULTS[name] and not (simulated and name in BY_EXECUTOR):
            continue
        if isinstance(value, bool):
            arguments.append(option.flag.split("/")[0 if value else 1])
        else:
            arguments += [option.flag, f"{value}B" if name in SIZES else str(value)]
    return arguments

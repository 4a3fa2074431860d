"""The options of `chiron simulate`, and what they say as objectives and as settings of a world."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from chiron_engine.sim.faults import FaultSettings
from chiron_engine.sim.workload import BATCH_SLO, INTERACTIVE_SLO, ClassSlo
from chiron_engine.sim.world_settings import WorldSettings

from .durations import parse_duration, parse_positive
from .exits import usage_error
from .option_tables import TableOption

DEFAULT_PROFILE = "h100/llama-3.1-8b/tp1/bf16"
WORLD, FAULTS = WorldSettings(), FaultSettings()
Entry = tuple[str, TableOption]


def entry(flag: str, kind: Any, default: Any, help_text: str, **details: Any) -> Entry:
    return flag[2:].replace("-", "_"), TableOption(flag, kind, default, {"help": help_text, **details})


def parsed(flag: str, default: Any, help_text: str, parse: Callable[[str], Any], metavar: str) -> Entry:
    """An option whose text `parse` reads. A value it refuses is told on one line, as every mistake
    in the input of a simulation is."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):  # the default
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise usage_error(f"{flag}: {error}") from error

    kind = float | None if default is None else type(default)
    return entry(flag, kind, default, help_text, parser=read, metavar=metavar)


def positive_duration(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a duration over 0")
    return seconds


def _itl_slo(text: str) -> str:
    """Checked now; it means seconds only when the profile is known."""
    if itl_seconds(text, batch_1_step_s=1.0) <= 0:
        raise ValueError(f"{text!r} is no time over 0")
    return text


def itl_seconds(text: str, batch_1_step_s: float) -> float:
    """An ITL SLO: milliseconds, a duration with a unit, or as `1.5x` the step of a request alone.

    Raises ValueError for other text.
    """
    if text.endswith("x"):
        return parse_positive(text[:-1]) * batch_1_step_s
    return parse_duration(text, bare_unit="ms")


WORKLOAD_OPTIONS = dict(
    (
        entry("--interactive", str | None, None, "Trace: a packaged name or a file.", metavar="TRACE"),
        entry("--batch", str | None, None, "Trace: a packaged name or a file.", metavar="TRACE"),
        parsed(
            "--load",
            None,
            "Scale interactive arrivals to a mean demand of N instances.",
            parse_positive,
            "N",
        ),
        parsed("--batch-load", None, "The same of batch arrivals (as --load).", parse_positive, "N"),
        parsed(
            "--duration",
            None,
            "Take what arrives in the first seconds of each trace only.",
            positive_duration,
            "SECONDS",
        ),
        entry("--seed", int, 0, "Of all that is drawn.", min=0),
    )
)

SLO_OPTIONS = dict(
    (
        parsed(
            "--ttft-slo",
            INTERACTIVE_SLO.ttft_s,
            "Interactive: time to the first token.",
            positive_duration,
            "SECONDS",
        ),
        parsed(
            "--itl-slo",
            f"{INTERACTIVE_SLO.itl_s * 1e3:g}",
            "Interactive: time between tokens; 1.5x is so many steps of a request alone.",
            _itl_slo,
            "MS|Nx",
        ),
        parsed(
            "--batch-ttft-slo",
            BATCH_SLO.ttft_s,
            "Batch: part of the default deadline.",
            positive_duration,
            "SECONDS",
        ),
        parsed(
            "--batch-itl-slo",
            f"{BATCH_SLO.itl_s * 1e3:g}",
            "Batch: sizes running batches; part of the default deadline.",
            _itl_slo,
            "MS|Nx",
        ),
        parsed(
            "--batch-deadline",
            None,
            "Batch: arrival to last token (its TTFT SLO + mean output x its ITL SLO).",
            positive_duration,
            "SECONDS",
        ),
    )
)

FLEET_OPTIONS = dict(
    (
        entry("--max-gpus", int, WORLD.max_gpus, "GPUs there are."),
        parsed("--load-time", WORLD.load_time_s, "From launch decision to ready.", parse_duration, "SECONDS"),
        entry("--load-jitter", float, WORLD.load_jitter, "Half width of its spread, as a share."),
        entry(
            "--initial-instances",
            int | None,
            None,
            "Ready at the start (what the first load time's demand needs).",
        ),
        entry(
            "--local-autoscaler",
            str | None,
            None,
            "On each instance, in place of the policy's own.",
            metavar="NAME",
        ),
        parsed("--tick", WORLD.tick_s, "Between two looks at the whole fleet.", positive_duration, "SECONDS"),
    )
)

WORLD_OPTIONS = dict(
    (
        entry("--noise", float, WORLD.step_noise, "Deviation of the logarithm of step times."),
        parsed("--rpc-delay", WORLD.rpc_delay_s, "One way, to or from an engine.", parse_duration, "SECONDS"),
        entry(
            "--host-kv-share",
            float,
            WORLD.host_kv_share,
            "Host memory for saved KV, as a multiple of the device's.",
        ),
        entry("--max-tokens", int | None, None, "Output cap, which policies know (what the context leaves)."),
        entry(
            "--losses-per-hour", float, FAULTS.losses_per_hour, "How often an instance dies in an hour of it."
        ),
        entry("--slow-launches", float, FAULTS.slow_launches, "Share of launches that are slow."),
        entry("--slow-factor", float, FAULTS.slow_factor, "Load times a slow launch takes."),
        entry("--failed-launches", float, FAULTS.failed_launches, "Share of launches that fail."),
    )
)


def check_traces_given(workload: Mapping[str, Any], slo: Mapping[str, Any]) -> None:
    """Raises ValueError without a trace, or for options of a class that has none."""
    if not (workload["interactive"] or workload["batch"]):
        raise ValueError(
            "give a trace: --interactive TRACE, --batch TRACE or both (`chiron simulate --list` names some)"
        )
    of_batch = {"--batch-load": workload["batch_load"], "--batch-deadline": slo["batch_deadline"]}
    for flag, value in of_batch.items():
        if value is not None and not workload["batch"]:
            raise ValueError(
                f"{flag} says something of batch requests, and there are none; give --batch TRACE"
            )


def class_slos(slo: Mapping[str, Any], batch_1_step_s: float) -> tuple[ClassSlo, ClassSlo]:
    """Objectives of the interactive and of the batch class."""
    interactive = ClassSlo(slo["ttft_slo"], itl_seconds(slo["itl_slo"], batch_1_step_s))
    batch_itl_s = itl_seconds(slo["batch_itl_slo"], batch_1_step_s)
    return interactive, ClassSlo(slo["batch_ttft_slo"], batch_itl_s, slo["batch_deadline"])


def world_settings(fleet: Mapping[str, Any], world: Mapping[str, Any]) -> WorldSettings:
    """Raises ValueError for a value outside its range."""
    for name, value in (*fleet.items(), *world.items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be a finite number")
    faults = FaultSettings(
        losses_per_hour=world["losses_per_hour"],
        slow_launches=world["slow_launches"],
        slow_factor=world["slow_factor"],
        failed_launches=world["failed_launches"],
    )
    return WorldSettings(
        max_gpus=fleet["max_gpus"],
        load_time_s=fleet["load_time"],
        load_jitter=fleet["load_jitter"],
        rpc_delay_s=world["rpc_delay"],
        tick_s=fleet["tick"],
        initial_instances=fleet["initial_instances"],
        host_kv_share=world["host_kv_share"],
        max_output_tokens=world["max_tokens"],
        step_noise=world["noise"],
        faults=faults,
    )

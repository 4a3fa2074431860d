"""Profiles as JSON: tables of measured kernels, or a linear model fitted to an engine's steps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chiron_engine.policy.iteration.step_costs import StepCosts

from .linear_step_times import LinearStepTimes, StepRegion
from .profile import Profile, StepTimes
from .table_step_times import SHORTEST_CONTEXT, SHORTEST_STEP_MS, StepTables, TableStepTimes

NAME_PATTERN = re.compile(r"[^/\s]+/[^/\s]+/tp[1-9][0-9]*/[^/\s]+")


class InvalidProfile(ValueError):
    """A file that holds no usable profile."""


def read_profile(text: str, where: str) -> Profile:
    """The profile a file's text holds. Raises InvalidProfile, which names `where` and what is wrong."""
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("it must hold one JSON object")
        return _profile(fields)
    except KeyError as error:
        raise InvalidProfile(f"{where}: the profile lacks {error.args[0]!r}") from error
    except (ValueError, TypeError) as error:
        raise InvalidProfile(f"{where}: no usable profile: {error}") from error


def write_linear_profile(path: Path, profile: Profile, measured: StepRegion) -> None:
    """Write a profile whose plant is `profile.fit`, seen within `measured`. Raises InvalidProfile for
    one that could not be read again, and writes nothing then."""
    fields = {
        "name": profile.name,
        "kind": "linear",
        "source": profile.source,
        **{name: getattr(profile, name) for name in _NUMBERS},
        "copy_s_per_kv_token": profile.copy_s_per_kv_token,
        "costs": asdict(profile.fit),
        "measured": asdict(measured),
    }
    text = json.dumps(fields, indent=1) + "\n"
    read_profile(text, profile.name)
    path.write_text(text, encoding="utf-8")


_NUMBERS = (
    "gpus",
    "kv_capacity_tokens",
    "kv_bytes_per_token",
    "max_slots",
    "max_step_tokens",
    "max_model_len",
)


def check_name(name: str) -> str:
    """Raises ValueError for a name that is not GPU/MODEL/tpN/precision."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"name is {name!r}; it must read GPU/MODEL/tpN/precision")
    return name


def _profile(fields: Mapping[str, Any]) -> Profile:
    numbers = {name: _count(name, fields[name]) for name in _NUMBERS}
    kinds = {"tables": _from_tables, "linear": _from_costs}
    if fields["kind"] not in kinds:
        raise ValueError(f"kind is {fields['kind']!r}; it must be one of {', '.join(kinds)}")
    step_times, fit, envelope = kinds[fields["kind"]](fields, numbers)
    copy_s = float(fields["copy_s_per_kv_token"])
    if not 0 <= copy_s < 1:
        raise ValueError(f"copy_s_per_kv_token is {copy_s}; it must be at least 0 and below 1")
    return Profile(
        name=check_name(fields["name"]),
        **numbers,
        step_times=step_times,
        fit=fit,
        envelope=envelope,
        copy_s_per_kv_token=copy_s,
        source=str(fields["source"]),
    )


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive whole number")
    return value


def _from_tables(
    fields: Mapping[str, Any], numbers: Mapping[str, int]
) -> tuple[StepTimes, StepCosts, StepCosts]:
    times = TableStepTimes(
        read_tables(fields), numbers["kv_capacity_tokens"], numbers["max_slots"], numbers["max_model_len"]
    )
    if times.max_step_tokens != numbers["max_step_tokens"]:
        raise ValueError(f"max_step_tokens must be the last of base_ms, {times.max_step_tokens}")
    return times, StepCosts(**fields["fit"]), StepCosts(**fields["envelope"])


def read_tables(fields: Mapping[str, Any]) -> StepTables:
    """The tables of a profile of kind "tables"."""
    attention = fields["decode_attention_ms"]
    first = attention["first_context"]
    if first != SHORTEST_CONTEXT:
        raise ValueError(f"first_context is {first}; it must be {SHORTEST_CONTEXT}, doubling from there")
    return StepTables(
        base=_curve(fields["base_ms"]),
        lm_head=_curve(fields["lm_head_ms"]),
        decode_attention=[(row["requests"], row["ms"]) for row in attention["rows"]],
        prefill_attention=_curve(fields["prefill_attention_ms"]),
    )


def _curve(points: list[list[float]]) -> list[tuple[int, float]]:
    return [(int(x), float(y)) for x, y in points]


def _from_costs(
    fields: Mapping[str, Any], numbers: Mapping[str, int]
) -> tuple[StepTimes, StepCosts, StepCosts]:
    costs = StepCosts(**fields["costs"])
    if costs.base_s < SHORTEST_STEP_MS * 1e-3:
        raise ValueError(
            f"base_s of costs is {costs.base_s}; it must be at least {SHORTEST_STEP_MS * 1e-3:g}"
        )
    capacity = StepRegion(
        numbers["max_slots"],
        numbers["kv_capacity_tokens"],
        numbers["max_step_tokens"],
        numbers["max_step_tokens"] * numbers["max_model_len"],
    )
    return LinearStepTimes(costs, StepRegion(**fields["measured"]), capacity), costs, costs

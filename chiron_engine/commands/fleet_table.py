"""A fleet as lines of text: one for each engine, and the quantities that scale it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .durations import format_duration

if TYPE_CHECKING:
    from chiron_engine.rpc.v1.coordinator_pb2 import Fleet, Instance

BATCH = "batch"
UNKNOWN = "-"


def target_s(fleet: Fleet, instance: Instance) -> float:
    """The ITL that the engine's batch is sized by."""
    return fleet.batch_itl_s if instance.role == BATCH else instance.itl_target_s


def kv_share(instance: Instance) -> float | None:
    """Of the blocks of its device, how many are in use; None before its first report."""
    telemetry = instance.telemetry
    if not telemetry.total_blocks:
        return None
    return 1.0 - telemetry.free_blocks / telemetry.total_blocks


def _reported(show: Callable[[Fleet, Instance], str]) -> Callable[[Fleet, Instance], str]:
    """Nothing is known before the first report."""
    return lambda fleet, instance: show(fleet, instance) if instance.HasField("telemetry") else UNKNOWN


def _kv(fleet: Fleet, instance: Instance) -> str:
    share = kv_share(instance)
    return UNKNOWN if share is None else f"{100 * share:.0f}%"


COLUMNS: tuple[tuple[str, Callable[[Fleet, Instance], str]], ...] = (
    ("ID", lambda fleet, one: str(one.instance_id)),
    ("ROLE", lambda fleet, one: one.role or UNKNOWN),
    ("STATE", lambda fleet, one: one.state),
    ("ADDRESS", lambda fleet, one: one.address or UNKNOWN),
    ("PID", lambda fleet, one: str(one.pid) if one.pid else UNKNOWN),
    ("DEVICES", lambda fleet, one: one.devices or "cpu" if one.address else UNKNOWN),
    ("LIMIT", _reported(lambda fleet, one: str(one.telemetry.max_running))),
    (
        "RUNNING",
        _reported(lambda fleet, one: f"{one.telemetry.running_interactive}+{one.telemetry.running_batch}"),
    ),
    ("WAITING", _reported(lambda fleet, one: str(one.telemetry.waiting))),
    ("KV", _kv),
    (
        "ITL/TARGET",
        _reported(lambda fleet, one: f"{_ms(one.telemetry.itl_s)}/{_ms(target_s(fleet, one))} ms"),
    ),
    ("LBP", _reported(lambda fleet, one: f"{one.telemetry.latency_backpressure:.2f}")),
    ("TBP", _reported(lambda fleet, one: f"{one.telemetry.throughput_backpressure:.2f}")),
    ("LOAD", lambda fleet, one: f"{one.load:.2f}"),
    ("AGE", lambda fleet, one: format_duration(round(one.age_s))),
    ("SILENT", lambda fleet, one: f"{one.silent_s:.1f} s" if one.address else UNKNOWN),
)
"""RUNNING: interactive + batch."""


def table(fleet: Fleet) -> list[str]:
    """Aligned columns, a header first."""
    rows = [[name for name, _ in COLUMNS]]
    rows += [[show(fleet, instance) for _, show in COLUMNS] for instance in fleet.instances]
    return _aligned(rows)


def summary(fleet: Fleet) -> list[str]:
    """The fleet as a whole: section 5 of the paper by its names."""
    ready = sum(instance.state == "ready" for instance in fleet.instances)
    lines = [
        f"{fleet.model or 'no model yet'}: {len(fleet.instances)} engines, {ready} ready, "
        f"min {fleet.min_instances}, max {fleet.max_devices}, up {format_duration(round(fleet.uptime_s))}",
        f"D {fleet.busy:.2f}  Theta {fleet.theta:.2f}  IBP {fleet.interactive_backpressure:.2f}  "
        f"BBP {fleet.batch_backpressure}  target {fleet.target}+{fleet.batch_target}  "
        f"held {fleet.held_interactive}  queued batch {fleet.queued_batch}",
    ]
    if fleet.trouble:
        lines.append(f"trouble: {fleet.trouble}")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]

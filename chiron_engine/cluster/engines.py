"""What the coordinator knows of each engine process, besides what the fleet policy keeps of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from chiron_engine.policy.fleet.messages import InstanceReported, MeasuredStep, SetRole
from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import coordinator_pb2

from .engine_report import EngineReady


class LaunchError(RuntimeError):
    """An engine ended before it was ready. `code` is its exit code, 1 where a signal ended it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A ready engine. `exited` ends with the exit code (negative: the signal that ended it)."""

    instance_id: int
    ready: EngineReady
    exited: asyncio.Future[int]


class Launcher(Protocol):
    """Starts engine processes, which then join their coordinator."""

    async def launch(self, instance_id: int) -> RunningEngine:
        """Start an engine and wait until it is ready. Raises LaunchError."""
        ...

    async def stop(self, instance_id: int, grace_s: float) -> None:
        """End it: SIGTERM, and SIGKILL after `grace_s` seconds. Returns once it is gone."""
        ...

    async def stop_all(self, grace_s: float) -> None: ...


@dataclass(slots=True, eq=False)
class Engine:
    """One engine process, from its launch or its joining to its end.

    role: as last ordered. is_launched: by our launcher, which can stop it. orders: to be sent down its
    line. streams: requests that run there, by key; `adrift` are those that wait for its link to
    come back. is_draining: it was told to end.
    """

    instance_id: int
    launched_at: float
    role: SetRole | None = None
    is_launched: bool = False
    register: coordinator_pb2.Register | None = None
    link: EngineLink | None = None
    telemetry: coordinator_pb2.Telemetry | None = None
    heard_at: float = 0.0
    progressed_at: float = 0.0
    is_ready: bool = False
    is_draining: bool = False
    orders: asyncio.Queue[coordinator_pb2.EngineOrder | None] = field(default_factory=asyncio.Queue)
    streams: dict[int, TokenStream] = field(default_factory=dict)
    adrift: dict[int, TokenStream] = field(default_factory=dict)

    def note(self, telemetry: coordinator_pb2.Telemetry, now: float) -> None:
        """Take in a report."""
        before = self.telemetry
        idle = not (telemetry.running_interactive or telemetry.running_batch)
        if before is None or idle or telemetry.step != before.step:
            self.progressed_at = now
        self.telemetry = telemetry
        self.heard_at = now


def reported(instance_id: int, telemetry: coordinator_pb2.Telemetry) -> InstanceReported:
    """A report as the fleet policy takes it."""
    step = telemetry.last_step
    return InstanceReported(
        instance_id=instance_id,
        running_interactive=telemetry.running_interactive,
        running_batch=telemetry.running_batch,
        waiting=telemetry.waiting,
        kv_tokens=telemetry.kv_tokens,
        max_running=telemetry.max_running,
        token_budget=telemetry.token_budget,
        itl_s=telemetry.itl_s,
        batch_tokens_total=telemetry.batch_tokens_total,
        output_tokens_total=telemetry.output_tokens_total,
        preemptions_total=telemetry.preemptions_total,
        last_step=MeasuredStep(
            step.seconds, step.requests, step.kv_tokens, step.prompt_tokens, step.prompt_context
        )
        if telemetry.HasField("last_step")
        else None,
        latency_backpressure=telemetry.latency_backpressure,
        throughput_backpressure=telemetry.throughput_backpressure,
    )

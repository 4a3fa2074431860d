"""What the coordinator knows of each engine process, besides what the fleet policy keeps of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chiron_engine.policy.fleet.messages import InstanceReported, MeasuredStep, SetRole
from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import coordinator_pb2

from .engine_records import EngineRecord
from .engine_report import EngineReady
from .remote_stream import RoutedStream


class LaunchError(RuntimeError):
    """An engine ended before it was ready. `code` is its exit code, 1 where a signal ended it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A ready engine. `exited` ends with the exit code (negative: the signal that ended it; None: it
    is nobody's to know)."""

    instance_id: int
    ready: EngineReady
    exited: asyncio.Future[int | None]


class Launcher(Protocol):
    """Starts engine processes, which then join their coordinator."""

    @property
    def survivors(self) -> Sequence[EngineRecord]:
        """Engines that a coordinator before this one launched, not taken over yet."""
        ...

    def adopt(self, instance_id: int, survivor: EngineRecord) -> asyncio.Future[int | None]:
        """Take it over under this id, as if launched here. What is returned ends as
        `RunningEngine.exited` does. Raises LaunchError where it has ended."""
        ...

    def joined(self, instance_id: int, boot_id: str, load_s: float) -> None:
        """From now on the engine may go on without this process, and another may take it over."""
        ...

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

    role: as last ordered. is_launched: by our launcher, which can stop it. survivor: what is known of
    one that another coordinator launched. joined: set when it has come. orders: to be sent down its
    line. streams: requests that run there, by key; `adrift` are those that wait for its link to come
    back. is_draining: it was told to end, or is about to by itself. is_dead: taken for dead, and being
    ended. was_killed: it ended by a SIGKILL that was not ours, as seen by the process that launched it.
    """

    instance_id: int
    launched_at: float
    role: SetRole | None = None
    is_launched: bool = False
    survivor: EngineRecord | None = None
    joined: asyncio.Event = field(default_factory=asyncio.Event)
    register: coordinator_pb2.Register | None = None
    link: EngineLink | None = None
    telemetry: coordinator_pb2.Telemetry | None = None
    heard_at: float = 0.0
    progressed_at: float = 0.0
    is_ready: bool = False
    is_draining: bool = False
    is_dead: bool = False
    was_killed: bool = False
    orders: asyncio.Queue[coordinator_pb2.EngineOrder | None] = field(default_factory=asyncio.Queue)
    streams: dict[int, RoutedStream] = field(default_factory=dict)
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
    """A report as the fleet policy takes it: without a step whose time is none, and with 0 for what is
    no number."""
    step = telemetry.last_step
    is_timed = telemetry.HasField("last_step") and math.isfinite(step.seconds) and step.seconds > 0.0
    return InstanceReported(
        instance_id=instance_id,
        running_interactive=telemetry.running_interactive,
        running_batch=telemetry.running_batch,
        waiting=telemetry.waiting,
        kv_tokens=telemetry.kv_tokens,
        max_running=telemetry.max_running,
        token_budget=telemetry.token_budget,
        itl_s=_number(telemetry.itl_s),
        batch_tokens_total=telemetry.batch_tokens_total,
        output_tokens_total=telemetry.output_tokens_total,
        preemptions_total=telemetry.preemptions_total,
        last_step=MeasuredStep(
            step.seconds, step.requests, step.kv_tokens, step.prompt_tokens, step.prompt_context
        )
        if is_timed
        else None,
        latency_backpressure=_number(telemetry.latency_backpressure),
        throughput_backpressure=_number(telemetry.throughput_backpressure),
    )


def _number(value: float) -> float:
    return value if math.isfinite(value) and value > 0.0 else 0.0

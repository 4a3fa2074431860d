"""What the fleet policy is told and what it orders. The coordinator and the simulator are two
interpreters of the same effects and two sources of the same events."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from chiron_engine.policy.iteration.request import Slo
from chiron_engine.policy.iteration.step_costs import StepCosts


class Role(Enum):
    """What an instance may run. INTERACTIVE: interactive requests only. MIXED: interactive ones, and
    batch in the room they leave, evicted when they need it. BATCH: batch only."""

    INTERACTIVE = "interactive"
    MIXED = "mixed"
    BATCH = "batch"


class InstanceState(Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """What one instance can do, before anything was measured on it.

    costs: prior of its step model. kv_capacity_tokens: KV it holds. max_slots: requests that can
    run at once. max_model_len: tokens one request may hold. gpus: devices it takes.
    load_s: expected seconds from launch decision to ready.
    """

    costs: StepCosts
    kv_capacity_tokens: int
    max_slots: int
    max_model_len: int
    gpus: int = 1
    load_s: float = 45.0


@dataclass(slots=True, eq=False)
class FleetRequest:
    """One request as the fleet sees it: lengths, not tokens.

    produced: output tokens it had when it last came back from an engine. evictions: how often one gave
    it back to make room. home: the instance that keeps its saved KV, None if none does. prefix: names
    its longest shareable prefix; requests with the same one gain from the same instance.
    """

    request_id: int
    slo: Slo
    arrival: float
    prompt_tokens: int
    max_tokens: int
    prefix: object = None
    produced: int = 0
    evictions: int = 0
    home: int | None = None


# Events.


@dataclass(frozen=True, slots=True)
class RequestArrived:
    request: FleetRequest


@dataclass(frozen=True, slots=True)
class RequestFinished:
    request_id: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RequestEvicted:
    """An engine gave the request back. With `saved_tokens` the instance it ran on keeps that much
    of its KV on the host until the request is routed there again or `Forget` comes."""

    request_id: int
    produced: int
    saved_tokens: int


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    request_id: int


@dataclass(frozen=True, slots=True)
class InstanceReady:
    instance_id: int


@dataclass(frozen=True, slots=True)
class InstanceJoined:
    """An instance that nobody here launched has come, under a new id (`Instances.next_id`): started by
    hand, or by a coordinator before this one. InstanceReady follows."""

    instance_id: int
    role: Role
    itl_target_s: float


@dataclass(frozen=True, slots=True)
class RetireAsked:
    """The operator wants this instance gone: it is drained, however much the fleet needs it."""

    instance_id: int


@dataclass(frozen=True, slots=True)
class FleetResized:
    """The operator changed these two of `FleetConfig` (`resize.resized` says what may be asked).
    Launches are tried again where failures had stopped them."""

    min_instances: int
    max_gpus: int


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    instance_id: int
    cause: str


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """It died with what it ran. `produced` holds the output tokens known outside of it, by request."""

    instance_id: int
    produced: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InstanceExited:
    """It drained and ended as ordered; its devices are free."""

    instance_id: int


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What was in a step, as `StepCosts` counts it, and how long it took."""

    seconds: float
    requests: int
    kv_tokens: int
    prompt_tokens: int
    prompt_context: int


@dataclass(frozen=True, slots=True)
class InstanceReported:
    """Telemetry. Counts are of now, totals are since the instance started.

    kv_tokens: KV held by running requests. batch_tokens_total: work delivered to batch requests,
    output tokens. last_step: the last one that decoded and copied no KV. max_running: the local
    autoscaler's present limit. itl_s: gap of the last step; backpressures as the local autoscaler
    sees them (0 where it has none).
    """

    instance_id: int
    running_interactive: int
    running_batch: int
    waiting: int
    kv_tokens: int
    max_running: int
    token_budget: int
    itl_s: float
    batch_tokens_total: int
    output_tokens_total: int
    preemptions_total: int
    last_step: MeasuredStep | None = None
    latency_backpressure: float = 0.0
    throughput_backpressure: float = 0.0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time to look at the fleet as a whole; comes every `FleetConfig.tick_s`."""


FleetEvent = (
    RequestArrived
    | RequestFinished
    | RequestEvicted
    | RequestCancelled
    | InstanceReady
    | InstanceJoined
    | RetireAsked
    | FleetResized
    | LaunchFailed
    | InstanceLost
    | InstanceExited
    | InstanceReported
    | Tick
)


# Effects.


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an instance under this new id. Answered by InstanceReady or LaunchFailed."""

    instance_id: int
    role: Role
    itl_target_s: float


@dataclass(frozen=True, slots=True)
class SetRole:
    """Role and interactive ITL target of an instance, from its next step on."""

    instance_id: int
    role: Role
    itl_target_s: float


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no more requests, give batch ones back (RequestEvicted each), finish interactive ones,
    exit. Answered by InstanceExited. On a loading instance: cancel the launch."""

    instance_id: int


@dataclass(frozen=True, slots=True)
class Route:
    """Run the request on this instance; where it is its home, saved KV comes back. `evictions` is what
    the engine counts on from: a request gives way only so many times, wherever it runs."""

    request_id: int
    instance_id: int
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the KV the instance saved for a request that runs elsewhere or no more."""

    request_id: int
    instance_id: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The request is not served; `reason` says what is on offer. retry_after_s: when there may be room for
    it, 0 where it can never be served as asked."""

    request_id: int
    reason: str
    retry_after_s: float = 0.0


FleetEffect = Launch | SetRole | Drain | Route | Forget | Reject


@dataclass(frozen=True, slots=True)
class FleetGauges:
    """The control quantities of one moment, for metrics, logs and plots. Counts by role include
    only ready instances; `loading` and `draining` come on top.

    busy, theta, interactive_backpressure (IBP), batch_backpressure (BBP): as in the last decision
    (`fleet_view.Decision`). target, batch_target: instances it asks for, interactive and mixed ones,
    and batch ones. held_interactive: requests that wait for room within their TTFT slack.
    """

    interactive: int
    mixed: int
    batch: int
    loading: int
    draining: int
    busy: float
    theta: float
    interactive_backpressure: float
    batch_backpressure: int
    target: int
    batch_target: int
    held_interactive: int
    queued_batch: int

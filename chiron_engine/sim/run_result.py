"""What a simulation saw: outcomes by request, lives of instances, control quantities over time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import IntEnum

from chiron_engine.policy.fleet.messages import FleetGauges, Role

from .workload import Workload


class Outcome(IntEnum):
    UNFINISHED = 0
    FINISHED = 1
    REJECTED = 2


@dataclass(slots=True)
class RequestColumns:
    """One entry a request id. Times in seconds, NaN where it never happened. late_gaps: gaps
    between tokens over the request's ITL SLO. served: how often its last token was delivered,
    which must be once. output_tokens: how many it got."""

    outcome: array[int]
    first_token_s: array[float]
    last_token_s: array[float]
    late_gaps: array[int]
    evictions: array[int]
    served: array[int]
    output_tokens: array[int]


@dataclass(slots=True)
class InstanceLife:
    """From the launch decision to the exit of its process, seconds; NaN where it did not happen."""

    instance_id: int
    gpus: int
    launched_s: float
    ready_s: float
    exited_s: float
    roles: list[tuple[float, Role]] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True, slots=True)
class FleetSample:
    """The fleet at one tick. mean_limit, mean_running and latency_backpressure are means over ready
    instances. attained and ended count interactive requests since the last sample."""

    time_s: float
    gauges: FleetGauges
    mean_running: float
    mean_limit: float
    latency_backpressure: float
    attained: int
    ended: int


ITL_BINS = 700
ITL_FIRST_S = 1e-4
ITL_RATIO = 1.02


@dataclass(slots=True)
class ItlHistogram:
    """Inter-token latencies of interactive requests in logarithmic bins: bin i counts gaps in
    [1e-4 x 1.02^i, 1e-4 x 1.02^(i+1)) seconds, the first and last bin everything beyond."""

    counts: list[int] = field(default_factory=lambda: [0] * ITL_BINS)


@dataclass(slots=True)
class RunResult:
    """end_s: when the last request was served. scaling_actions: launches and drains ordered after
    the start; role changes and launches are counted apart."""

    workload: Workload
    requests: RequestColumns
    instances: list[InstanceLife]
    samples: list[FleetSample]
    itl: ItlHistogram
    end_s: float
    scaling_actions: int = 0
    launches: int = 0
    role_changes: int = 0
    preemptions: int = 0
    failed_launches: int = 0
    lost_instances: int = 0
    steps: int = 0
    extrapolated_steps: int = 0

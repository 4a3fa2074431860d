"""What has happened in a fleet since its start, counted: for metrics.

Fed by fleet events and by requests that end; nothing here is called for a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from chiron_engine.policy.fleet.messages import (
    FleetEffect,
    FleetEvent,
    FleetRequest,
    InstanceJoined,
    InstanceLost,
    Launch,
    LaunchFailed,
    Reject,
    RequestArrived,
    RequestEvicted,
    Role,
    SetRole,
)
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.rpc.v1 import coordinator_pb2, types_pb2

from .remote_stream import RoutedStream

LATENCY_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0,
    100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100000.0,
)  # fmt: skip
GAP_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
    0.75, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
LATE_SHARE = 100
"""One gap in so many, rounded up, may be over the ITL SLO."""
FAILED, REJECTED = "error", "rejected"


class Histogram:
    """counts: of values up to each bound, and one more for what is over the last; not cumulated."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: Iterable[float]) -> None:
        for value in values:
            self.observe(value)


def _latencies() -> Histogram:
    return Histogram(LATENCY_BOUNDS_S)


def _gaps() -> Histogram:
    return Histogram(GAP_BOUNDS_S)


@dataclass(slots=True)
class RequestCounters:
    """Of one SLO class. ended: by how, as on the wire, or "error" or "rejected". attained: of those, how
    many met their SLO; cancelled ones count as no miss and as no success. tpot_s: mean gap of a
    request; itl_s: every gap."""

    ended: Counter[str] = field(default_factory=Counter)
    attained: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: Histogram = field(default_factory=_latencies)
    itl_s: Histogram = field(default_factory=_gaps)
    tpot_s: Histogram = field(default_factory=_gaps)
    e2e_s: Histogram = field(default_factory=_latencies)


@dataclass(slots=True)
class EngineTotals:
    """What engines count themselves, tokens and preemptions, summed."""

    output_tokens: int = 0
    batch_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, telemetry: coordinator_pb2.Telemetry) -> None:
        self.output_tokens += telemetry.output_tokens_total
        self.batch_tokens += telemetry.batch_tokens_total
        self.preemptions += telemetry.preemptions_total
        self.prefix_hit_tokens += telemetry.prefix_hit_tokens
        self.prefix_query_tokens += telemetry.prefix_query_tokens
        self.drafted_tokens += telemetry.drafted_tokens
        self.accepted_tokens += telemetry.accepted_tokens


class FleetCounters:
    """launches: by role. role_changes: by (from, to). evictions: by whether the KV was kept. gone: what
    engines that have ended had counted. Used from one event loop."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.failed_launches = 0
        self.losses = 0
        self.evictions: Counter[bool] = Counter()
        self.role_changes: Counter[tuple[str, str]] = Counter()
        self.requests = {slo_class: RequestCounters() for slo_class in SloClass}
        self.gone = EngineTotals()
        self._roles: dict[int, Role] = {}

    def happened(self, event: FleetEvent, effects: Iterable[FleetEffect]) -> None:
        """The policy handled this event, and answered with these effects."""
        if isinstance(event, RequestEvicted):
            self.evictions[event.saved_tokens > 0] += 1
        elif isinstance(event, LaunchFailed):
            self.failed_launches += 1
        elif isinstance(event, InstanceLost):
            self.losses += 1
        elif isinstance(event, InstanceJoined):
            self._roles[event.instance_id] = event.role
        for effect in effects:
            self._ordered(event, effect)

    def launched(self, launch: Launch) -> None:
        self.launches[launch.role.value] += 1
        self._roles[launch.instance_id] = launch.role

    def engine_ended(self, instance_id: int, telemetry: coordinator_pb2.Telemetry | None) -> None:
        """telemetry: its last report."""
        self._roles.pop(instance_id, None)
        if telemetry is not None:
            self.gone.add(telemetry)

    def request_ended(self, stream: RoutedStream, request: FleetRequest, now: float) -> None:
        counters, times = self.requests[request.slo.slo_class], stream.times
        how = FAILED
        if stream.finished is not None:
            how = types_pb2.FinishReason.Name(stream.finished.reason).removeprefix("FINISH_REASON_").lower()
        counters.ended[how] += 1
        counters.prompt_tokens += stream.prompt_tokens
        counters.output_tokens += stream.output_tokens
        if times.count:
            counters.ttft_s.observe(times.first - request.arrival)
            counters.itl_s.observe_all(times.gaps)
        if times.count > 1:
            counters.tpot_s.observe((times.last - times.first) / (times.count - 1))
        if how in ("stop", "length"):
            counters.e2e_s.observe(now - request.arrival)
            counters.attained += attained(stream, request.slo, request.arrival, now)

    def _ordered(self, event: FleetEvent, effect: FleetEffect) -> None:
        if isinstance(effect, Launch):
            self.launched(effect)
        elif isinstance(effect, SetRole):
            before = self._roles.get(effect.instance_id, effect.role)
            self._roles[effect.instance_id] = effect.role
            if before is not effect.role:
                self.role_changes[before.value, effect.role.value] += 1
        elif isinstance(effect, Reject) and isinstance(event, RequestArrived):
            self.requests[event.request.slo.slo_class].ended[REJECTED] += 1


def attained(stream: RoutedStream, slo: Slo, arrival: float, now: float) -> bool:
    """Interactive: the first token within the TTFT SLO, at most 1 % of the gaps late, rounded up, and
    the last token by arrival + TTFT SLO + (n - 1) x ITL SLO. Batch: complete by the deadline, or
    where it has none by the same sum."""
    times = stream.times
    gaps = max(0, stream.output_tokens - 1)
    end = arrival + slo.ttft_s + gaps * slo.itl_s
    if slo.slo_class is SloClass.BATCH:
        return now <= (end if slo.deadline is None else slo.deadline)
    late = sum(gap > slo.itl_s for gap in times.gaps)
    return (
        times.first - arrival <= slo.ttft_s
        and late <= (gaps + LATE_SHARE - 1) // LATE_SHARE
        and times.last <= end
    )

"""Metrics of a fleet in Prometheus' format, read from the coordinator's state when they are asked for.

`chiron_` names are ours. `vllm:` names are those that load generators and routers read of a vLLM
server; here they speak of the whole fleet, as of one server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.rpc.v1.coordinator_pb2 import Fleet, Instance

from .coordinator import Coordinator
from .fleet_counters import EngineTotals, FleetCounters, Histogram
from .fleet_message import fleet_message

SNAPSHOT_TIMEOUT_S = 5.0
BATCH = "batch"
CLASSES = {SloClass.INTERACTIVE: "interactive", SloClass.BATCH: BATCH}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at one moment, safe to read in another thread."""

    model: str
    fleet: Fleet
    counters: FleetCounters
    engines: EngineTotals
    """Of engines that run and of those that have ended."""


def snapshot(coordinator: Coordinator, model: str) -> Snapshot:
    """Called on the coordinator's event loop. model: the name that clients see."""
    counters = deepcopy(coordinator.counters)
    totals = deepcopy(counters.gone)
    fleet = fleet_message(coordinator)
    for instance in fleet.instances:
        if instance.HasField("telemetry"):
            totals.add(instance.telemetry)
    return Snapshot(model, fleet, counters, totals)


class FleetCollector(Collector):
    """Collects in the thread that asks; the event loop is held for a snapshot only."""

    def __init__(self, coordinator: Coordinator, model: str) -> None:
        """To be made on the coordinator's event loop."""
        self._loop = asyncio.get_running_loop()
        self._coordinator = coordinator
        self._model = model

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """Raises TimeoutError where the event loop does not answer."""
        taking = asyncio.run_coroutine_threadsafe(self._take(), self._loop)
        return metrics_of(taking.result(SNAPSHOT_TIMEOUT_S))

    async def _take(self) -> Snapshot:
        return snapshot(self._coordinator, self._model)


class MetricsServer:
    """Answers GET /metrics, and any other path, with the metrics. Raises OSError where it cannot listen."""

    def __init__(self, coordinator: Coordinator, model: str, host: str, port: int) -> None:
        """port 0: any free one, then in `port`."""
        registry = CollectorRegistry()
        registry.register(FleetCollector(coordinator, model))
        ProcessCollector(registry=registry)
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def metrics_of(taken: Snapshot) -> Iterator[Metric]:
    yield from _fleet_gauges(taken.fleet)
    yield from _fleet_counters(taken.counters)
    yield from _instances(taken.fleet)
    yield from _engine_totals(taken.engines)
    yield from _requests(taken.counters)
    yield from _as_vllm(taken)


def _fleet_gauges(fleet: Fleet) -> Iterator[Metric]:
    gauges = {
        "busy_instances": ("D: demand, in instances.", fleet.busy),
        "theta": ("Theta: the IBP to keep.", fleet.theta),
        "interactive_backpressure": ("IBP: D over instances.", fleet.interactive_backpressure),
        "batch_backpressure": ("BBP: late request groups.", fleet.batch_backpressure),
        "target_instances": ("Interactive and mixed instances asked for.", fleet.target),
        "batch_target_instances": ("Batch instances asked for.", fleet.batch_target),
        "held_interactive_requests": ("Interactive requests that wait for room.", fleet.held_interactive),
        "queued_batch_requests": ("Batch requests without an instance.", fleet.queued_batch),
        "min_instances": ("Instances kept at any load.", fleet.min_instances),
        "max_devices": ("Devices that may be taken.", fleet.max_devices),
        "failed_launches_in_a_row": ("After five, launching stops.", fleet.failed_launches),
        "uptime_seconds": ("Since the coordinator started.", fleet.uptime_s),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"chiron_fleet_{name}", text, value=value)
    count = GaugeMetricFamily("chiron_fleet_instances", "By role and state.", labels=("role", "state"))
    kinds = [(one.role, one.state) for one in fleet.instances]
    for kind in sorted(set(kinds)):
        count.add_metric(kind, kinds.count(kind))
    yield count


def _fleet_counters(counters: FleetCounters) -> Iterator[Metric]:
    launches = CounterMetricFamily("chiron_fleet_launches", "Instances launched.", labels=("role",))
    for role, number in sorted(counters.launches.items()):
        launches.add_metric((role,), number)
    yield launches
    yield CounterMetricFamily(
        "chiron_fleet_failed_launches", "Launches that failed.", value=counters.failed_launches
    )
    yield CounterMetricFamily("chiron_fleet_losses", "Instances that died.", value=counters.losses)
    evictions = CounterMetricFamily(
        "chiron_fleet_evictions", "Requests that engines gave back.", labels=("kv",)
    )
    for kept in (False, True):
        evictions.add_metric(("kept" if kept else "dropped",), counters.evictions[kept])
    yield evictions
    changes = CounterMetricFamily("chiron_fleet_role_changes", "Of running instances.", labels=("from", "to"))
    for kind, number in sorted(counters.role_changes.items()):
        changes.add_metric(kind, number)
    yield changes


INSTANCE_GAUGES: dict[str, tuple[str, Callable[[Instance], float]]] = {
    "max_running": ("Limit of the running batch.", lambda one: one.telemetry.max_running),
    "token_budget": ("Prompt tokens a step may take.", lambda one: one.telemetry.token_budget),
    "waiting_requests": ("Inside the engine.", lambda one: one.telemetry.waiting),
    "kv_usage_ratio": (
        "Of device blocks.",
        lambda one: _used(one.telemetry.free_blocks, one.telemetry.total_blocks),
    ),
    "host_kv_usage_ratio": (
        "Of host blocks.",
        lambda one: _used(one.telemetry.free_host_blocks, one.telemetry.total_host_blocks),
    ),
    "kv_tokens": ("KV of running requests.", lambda one: one.telemetry.kv_tokens),
    "itl_seconds": ("Gap of the last step.", lambda one: one.telemetry.itl_s),
    "latency_backpressure": ("LBP.", lambda one: one.telemetry.latency_backpressure),
    "throughput_backpressure": ("TBP.", lambda one: one.telemetry.throughput_backpressure),
    "load": ("u: share of it that interactive requests take.", lambda one: one.load),
    "silent_seconds": ("Since its last report.", lambda one: one.silent_s),
}  # fmt: skip


def _instances(fleet: Fleet) -> Iterator[Metric]:
    """Of those that have reported."""
    instances = [(str(one.instance_id), one) for one in fleet.instances if one.HasField("telemetry")]
    info = GaugeMetricFamily(
        "chiron_instance_info", "Always 1.", labels=("instance", "role", "state", "address", "devices")
    )
    for one in fleet.instances:
        info.add_metric((str(one.instance_id), one.role, one.state, one.address, one.devices), 1)
    yield info
    for name, (text, read) in INSTANCE_GAUGES.items():
        gauge = GaugeMetricFamily(f"chiron_instance_{name}", text, labels=("instance",))
        for label, one in instances:
            gauge.add_metric((label,), read(one))
        yield gauge
    target = GaugeMetricFamily(
        "chiron_instance_itl_target_seconds", "What its limit is sized by.", labels=("instance",)
    )
    running = GaugeMetricFamily(
        "chiron_instance_running_requests", "In its batch.", labels=("instance", "slo_class")
    )
    for label, one in instances:
        target.add_metric((label,), fleet.batch_itl_s if one.role == BATCH else one.itl_target_s)
        running.add_metric((label, "interactive"), one.telemetry.running_interactive)
        running.add_metric((label, BATCH), one.telemetry.running_batch)
    yield target
    yield running


def _engine_totals(totals: EngineTotals) -> Iterator[Metric]:
    for field in fields(totals):
        name, text = f"chiron_engines_{field.name}", "Counted by engines, ended ones included."
        yield CounterMetricFamily(name, text, value=getattr(totals, field.name))


def _requests(counters: FleetCounters) -> Iterator[Metric]:
    """By SLO class; a request counts when it ends."""
    label = ("slo_class",)
    ended = CounterMetricFamily("chiron_requests", "Ended, by how.", labels=("slo_class", "outcome"))
    attained = CounterMetricFamily("chiron_requests_slo_attained", "Within their SLO.", labels=label)
    prompt = CounterMetricFamily("chiron_prompt_tokens", "Of requests that ended.", labels=label)
    output = CounterMetricFamily("chiron_output_tokens", "Of requests that ended.", labels=label)
    for slo_class, name in CLASSES.items():
        counted = counters.requests[slo_class]
        for outcome, number in sorted(counted.ended.items()):
            ended.add_metric((name, outcome), number)
        attained.add_metric((name,), counted.attained)
        prompt.add_metric((name,), counted.prompt_tokens)
        output.add_metric((name,), counted.output_tokens)
    yield from (ended, attained, prompt, output)
    yield from _latencies(
        counters,
        "slo_class",
        (
            ("ttft_s", "chiron_request_ttft_seconds", "Arrival to first token."),
            ("itl_s", "chiron_request_itl_seconds", "Gaps between tokens."),
            ("tpot_s", "chiron_request_mean_itl_seconds", "Mean gap of a request."),
            ("e2e_s", "chiron_request_e2e_seconds", "Arrival to end."),
        ),
    )


def _as_vllm(taken: Snapshot) -> Iterator[Metric]:
    fleet, counters, totals = taken.fleet, taken.counters, taken.engines
    reports = [one.telemetry for one in fleet.instances if one.HasField("telemetry")]
    free, blocks = sum(one.free_blocks for one in reports), sum(one.total_blocks for one in reports)
    gauges = {
        "num_requests_running": sum(one.running_interactive + one.running_batch for one in reports),
        "num_requests_waiting": sum(one.waiting for one in reports) + fleet.held_interactive,
        "kv_cache_usage_perc": _used(free, blocks),
        "gpu_cache_usage_perc": _used(free, blocks),
    }
    for name, value in gauges.items():
        gauge = GaugeMetricFamily(f"vllm:{name}", "Over all engines.", labels=("model_name",))
        gauge.add_metric((taken.model,), value)
        yield gauge
    requests = counters.requests.values()
    sums = {
        "prompt_tokens": sum(one.prompt_tokens for one in requests),
        "generation_tokens": sum(one.output_tokens for one in requests),
        "prefix_cache_queries": totals.prefix_query_tokens,
        "prefix_cache_hits": totals.prefix_hit_tokens,
        "num_preemptions": totals.preemptions,
        "spec_decode_num_draft_tokens": totals.drafted_tokens,
        "spec_decode_num_accepted_tokens": totals.accepted_tokens,
    }
    for name, value in sums.items():
        counter = CounterMetricFamily(f"vllm:{name}", "Over all engines.", labels=("model_name",))
        counter.add_metric((taken.model,), value)
        yield counter
    success = CounterMetricFamily(
        "vllm:request_success", "Ended requests.", labels=("model_name", "finished_reason")
    )
    for reason in ("stop", "length", "abort"):
        success.add_metric((taken.model, reason), sum(one.ended[reason] for one in requests))
    yield success
    yield from _latencies(
        counters,
        "model_name",
        (
            ("ttft_s", "vllm:time_to_first_token_seconds", "Arrival to first token."),
            ("itl_s", "vllm:inter_token_latency_seconds", "Gaps between tokens."),
            ("itl_s", "vllm:time_per_output_token_seconds", "Its name before."),
            ("tpot_s", "vllm:request_time_per_output_token_seconds", "Mean gap of a request."),
            ("e2e_s", "vllm:e2e_request_latency_seconds", "Arrival to end."),
        ),
        taken.model,
    )


def _latencies(
    counters: FleetCounters, label: str, names: Iterable[tuple[str, str, str]], model: str | None = None
) -> Iterator[Metric]:
    """Histograms by SLO class; with a model, of all classes together."""
    for attribute, name, text in names:
        family = HistogramMetricFamily(name, text, labels=(label,))
        of = {CLASSES[key]: getattr(one, attribute) for key, one in counters.requests.items()}
        if model is None:
            for slo_class, histogram in of.items():
                _add(family, slo_class, [histogram])
        else:
            _add(family, model, list(of.values()))
        yield family


def _add(family: HistogramMetricFamily, label: str, histograms: Sequence[Histogram]) -> None:
    counts = accumulate(map(sum, zip(*(one.counts for one in histograms), strict=True)))
    bounds = [*map(str, histograms[0].bounds), "+Inf"]
    family.add_metric((label,), list(zip(bounds, counts, strict=True)), sum(one.sum for one in histograms))


def _used(free: int, total: int) -> float:
    return 1.0 - free / total if total else 0.0

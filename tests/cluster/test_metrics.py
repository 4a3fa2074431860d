"""What a fleet's metrics say, over real sockets, against what was done."""

from __future__ import annotations

import asyncio
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chiron_engine.cluster.fleet_counters import FleetCounters, Histogram
from chiron_engine.cluster.metrics import MetricsServer
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.fleet.messages import (
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
    Tick,
)
from chiron_engine.policy.iteration.request import Slo, SloClass
from chiron_engine.rpc.client import sampling
from chiron_engine.rpc.errors import unavailable
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import engine_pb2, types_pb2
from tests.cluster.fleet_stack import running_fleet

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(server: MetricsServer) -> Samples:
    def read() -> str:
        return urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10).read().decode()

    families = text_string_to_metric_families(await asyncio.to_thread(read))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_counts_agree_with_what_was_asked_also_after_engines_have_gone() -> None:
    config = FleetConfig(max_gpus=3, tick_s=0.1, prior_output_tokens=32.0)

    async def check() -> None:
        async with running_fleet(config, policy="static:2", initial=2) as fleet:
            server = MetricsServer(fleet.coordinator, "tiny", "127.0.0.1", 0)
            await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
            await asyncio.gather(*(fleet.generate([3, i], 20, seed=i) for i in range(10)))
            await fleet.generate([4], 30, batch=True)
            await asyncio.sleep(0.6)
            before = await scrape(server)
            fleet.coordinator.retire(0)
            await fleet.wait_for(lambda: set(fleet.coordinator.roster.engines) == {1, 2})
            after = await scrape(server)
            server.close()
        interactive, batch = {"slo_class": "interactive"}, {"slo_class": "batch"}
        for samples in (before, after):
            assert value(samples, "chiron_requests_total", **interactive, outcome="length") == 10
            assert value(samples, "chiron_requests_slo_attained_total", **interactive) == 10
            assert value(samples, "chiron_output_tokens_total", **interactive) == 200
            assert value(samples, "chiron_prompt_tokens_total", **interactive) == 20
            assert value(samples, "chiron_output_tokens_total", **batch) == 30
            assert value(samples, "chiron_request_itl_seconds_count", **interactive) == 190
            assert value(samples, "chiron_request_itl_seconds_bucket", **interactive, le="+Inf") == 190
            assert value(samples, "chiron_request_ttft_seconds_count", **interactive) == 10
            assert 0.0 < value(samples, "chiron_request_ttft_seconds_sum", **interactive) < 50.0
            assert value(samples, "vllm:generation_tokens_total", model_name="tiny") == 230
            assert value(samples, "vllm:time_to_first_token_seconds_count", model_name="tiny") == 11
            assert value(samples, "vllm:num_requests_running", model_name="tiny") == 0
            # Engines count what decode steps yield, which is all but each request's first token.
            assert value(samples, "chiron_engines_output_tokens_total") == 230 - 11
            assert value(samples, "chiron_fleet_max_devices") == 3
        assert value(before, "chiron_fleet_launches_total", role="mixed") == 2
        assert value(after, "chiron_fleet_launches_total", role="mixed") == 3
        assert value(before, "chiron_instance_itl_target_seconds", instance="0") == 0.2
        assert ("chiron_instance_itl_target_seconds", (("instance", "0"),)) not in after

    asyncio.run(check())


def test_fleet_events_are_counted_by_kind() -> None:
    counters = FleetCounters()
    request = FleetRequest(1, Slo(SloClass.BATCH), 0.0, 10, 10)
    counters.happened(Tick(), [Launch(0, Role.MIXED, 0.2), Launch(1, Role.BATCH, 0.2)])
    counters.happened(InstanceJoined(2, Role.MIXED, 0.2), [])
    counters.happened(Tick(), [SetRole(0, Role.BATCH, 0.2), SetRole(2, Role.BATCH, 0.2)])
    counters.happened(Tick(), [SetRole(0, Role.BATCH, 0.5), SetRole(1, Role.MIXED, 0.2)])
    counters.happened(RequestEvicted(1, 3, 16), [])
    counters.happened(RequestEvicted(1, 3, 0), [])
    counters.happened(LaunchFailed(3, "no"), [])
    counters.happened(InstanceLost(0), [])
    counters.happened(RequestArrived(request), [Reject(1, "no")])
    assert counters.launches == {"mixed": 1, "batch": 1}
    assert counters.role_changes == {("mixed", "batch"): 2, ("batch", "mixed"): 1}
    assert counters.evictions == {True: 1, False: 1}
    assert (counters.failed_launches, counters.losses) == (1, 1)
    assert counters.requests[SloClass.BATCH].ended == {"rejected": 1}


class Owner:
    def paused(self, stream: TokenStream) -> None: ...
    def ended(self, stream: TokenStream) -> None: ...


def stream_with(times: list[float]) -> TokenStream:
    stream = TokenStream([1, 2], sampling(), types_pb2.Slo(), "a", Owner())
    for time in times:
        stream.push(5, time)
    return stream


@pytest.mark.parametrize(
    ("times", "slo", "attained"),
    [
        ([11.0, 11.1, 11.2], Slo(ttft_s=1.5, itl_s=0.2), 1),
        ([12.0, 12.1, 12.2], Slo(ttft_s=1.5, itl_s=0.2), 0),
        (
            [11.0, 11.3, 11.4],
            Slo(ttft_s=1.5, itl_s=0.2),
            1,
        ),  # one late gap of two is one per cent, rounded up
        ([11.0, 11.3, 11.6], Slo(ttft_s=1.5, itl_s=0.2), 0),
        ([11.0, 19.0, 21.0], Slo(SloClass.BATCH, deadline=30.0), 1),
        ([11.0, 19.0, 31.0], Slo(SloClass.BATCH, deadline=30.0), 0),
        ([11.0, 19.0, 31.0], Slo(SloClass.BATCH, 20.0, 2.0), 1),
    ],
)
def test_attained(times: list[float], slo: Slo, attained: int) -> None:
    counters, stream = FleetCounters(), stream_with(times)
    stream.finish(engine_pb2.Finished(reason=types_pb2.FINISH_REASON_STOP))
    counters.request_ended(stream, FleetRequest(1, slo, 10.0, 2, 10), times[-1])
    of_class = counters.requests[slo.slo_class]
    assert (of_class.attained, of_class.ended) == (attained, {"stop": 1})


def test_a_failed_request_is_a_miss() -> None:
    counters, stream = FleetCounters(), stream_with([])
    stream.fail(unavailable("gone", "engine_lost"))
    counters.request_ended(stream, FleetRequest(1, Slo(), 10.0, 2, 10), 11.0)
    of_class = counters.requests[SloClass.INTERACTIVE]
    assert (of_class.attained, of_class.ended) == (0, {"error": 1})
    assert sum(of_class.ttft_s.counts) == 0


def test_a_value_on_a_bound_is_within_it() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe_all([1.0, 1.5, 2.0, 9.0])
    assert histogram.counts == [1, 2, 1] and histogram.sum == 13.5

"""A gateway apart from its coordinator: routed there, with tokens straight from the engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from chiron_engine.config import GatewayConfig
from chiron_engine.gateway import fleet_router
from chiron_engine.gateway.fleet_router import FleetRouter
from chiron_engine.gateway.no_tokenizer import NoTokenizer
from chiron_engine.gateway.server import Gateway, open_server, serve_gateway
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.rpc.client import InferenceClient
from chiron_engine.rpc.engine_link import EngineLink
from chiron_engine.rpc.errors import error_code
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.token_stream import TokenStream
from chiron_engine.rpc.v1 import inference_pb2, routing_pb2, routing_pb2_grpc, types_pb2
from tests.cluster.fleet_stack import LONG_S, NAME, Fleet, InProcessLauncher, expected, running_fleet


@asynccontextmanager
async def apart_gateway(coordinator: str) -> AsyncIterator[tuple[InferenceClient, FleetRouter]]:
    """A client of a gateway that is ready, and what routes there."""
    listen = GatewayConfig(grpc_port=0)
    server, port = open_server(listen)
    router = FleetRouter(coordinator, NAME)
    gateway = Gateway(NoTokenizer(), NAME, router, 1024)
    shutdown = Shutdown(1.0)
    task = asyncio.create_task(serve_gateway(listen, gateway, server, shutdown=shutdown))
    async with InferenceClient(f"127.0.0.1:{port}") as client:
        try:
            await client.wait_serving(LONG_S)
            yield client, router
        finally:
            shutdown.request()
            shutdown.request()
            await task


def config(**changes: object) -> FleetConfig:
    return FleetConfig(max_gpus=4, **changes)  # type: ignore[arg-type]


async def generate(client: InferenceClient, prompt: list[int], count: int, **slo: float) -> list[int]:
    fleet = Fleet(None, None, client, None)  # type: ignore[arg-type]
    return await fleet.generate(prompt, count, **slo)


def busiest(fleet: Fleet) -> int:
    """The engine with the most requests, which has some."""
    engine = max(fleet.coordinator.roster.engines.values(), key=lambda engine: len(engine.streams))
    assert engine.streams
    return engine.instance_id


def test_requests_of_two_gateways_share_the_fleet_and_count_once() -> None:
    async def check() -> None:
        async with running_fleet(config(min_instances=2), initial=2) as fleet:
            address = fleet.launcher.address
            async with apart_gateway(address) as (one, _), apart_gateway(address) as (other, _):
                clients = [one, other, fleet.client]
                prompts = [[index + 1] * (index % 40 + 1) for index in range(60)]
                answers = await asyncio.gather(
                    *(generate(clients[i % 3], prompt, 8) for i, prompt in enumerate(prompts))
                )
                assert answers == [expected(prompt, 8) for prompt in prompts]
                await fleet.wait_for(lambda: not fleet.coordinator.fleet.has_work)  # type: ignore[union-attr]
                counters = fleet.coordinator.counters.requests
                ended = sum(sum(each.ended.values()) for each in counters.values())
                tokens = sum(each.output_tokens for each in counters.values())
                assert (ended, tokens) == (60, 480)
                times = next(each for each in counters.values() if each.ended)
                assert sum(times.ttft_s.counts) == 60
                assert sum(times.itl_s.counts) == 60 * 7
                assert times.attained == 60

    asyncio.run(check())


@pytest.mark.parametrize("how", ["lost", "retired"])
def test_streams_go_on_elsewhere_when_their_engine_ends(how: str) -> None:
    async def check() -> None:
        async with (
            running_fleet(config(min_instances=2), initial=2) as fleet,
            apart_gateway(fleet.launcher.address) as (client, _),
        ):
            await fleet.wait_for(lambda: fleet.coordinator.num_ready == 2)
            prompts = [[index + 1] * 20 for index in range(16)]
            tasks = [asyncio.create_task(generate(client, prompt, 150)) for prompt in prompts]
            await asyncio.sleep(0.3)
            if how == "lost":
                fleet.launcher.tasks[busiest(fleet)].cancel()
            else:
                fleet.coordinator.retire(busiest(fleet))
            assert await asyncio.gather(*tasks) == [expected(prompt, 150) for prompt in prompts]
            counters = fleet.coordinator.counters
            assert counters.losses == (how == "lost")
            assert (sum(counters.evictions.values()) > 0) == (how == "retired")

    asyncio.run(check())


def test_aborted_requests_leave_the_policy_and_the_engine() -> None:
    async def check() -> None:
        async with (
            running_fleet(config()) as fleet,
            apart_gateway(fleet.launcher.address) as (client, _),
        ):
            task = asyncio.create_task(generate(client, [1, 2, 3], 2000))
            await asyncio.sleep(0.3)
            assert fleet.coordinator.fleet is not None
            assert fleet.coordinator.fleet.has_work
            task.cancel()
            await fleet.wait_for(lambda: not fleet.coordinator.fleet.has_work)  # type: ignore[union-attr]
            engine = fleet.coordinator.roster.engines[0]
            await fleet.wait_for(lambda: engine.telemetry.running_interactive == 0)  # type: ignore[union-attr]
            assert not engine.streams

    asyncio.run(check())


def test_a_refusal_reaches_the_client_as_from_a_gateway_inside() -> None:
    async def check() -> None:
        async with (
            running_fleet(config()) as fleet,
            apart_gateway(fleet.launcher.address) as (client, _),
        ):
            errors = []
            for each in (client, fleet.client):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(each, [1, 2], 4, itl_slo_ms=0.001)
                errors.append((caught.value.code(), caught.value.details(), error_code(caught.value)))
            assert errors[0] == errors[1]
            assert errors[0][2] == "slo_not_offered"

    asyncio.run(check())


def test_a_gateway_of_another_version_or_model_is_refused() -> None:
    async def check() -> None:
        async with running_fleet(config()) as fleet:
            async with grpc.aio.insecure_channel(fleet.launcher.address) as channel:
                stub = routing_pb2_grpc.RoutingStub(channel)
                for attach, word in (
                    (routing_pb2.AttachGateway(version="0.0.1"), "version is 0.0.1"),
                    (routing_pb2.AttachGateway(version="", model="x"), "version is "),
                ):
                    report = routing_pb2.GatewayReport(attach=attach)
                    call = stub.Attach(iter([routing_pb2.GatewayReports(reports=[report])]))
                    with pytest.raises(grpc.aio.AioRpcError, match=word) as caught:
                        await call.read()
                    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            router = FleetRouter(fleet.launcher.address, "another")
            router.start()
            assert "model is another; this coordinator serves tiny" in await router.line.refused
            await router.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    "report",
    [
        routing_pb2.GatewayReport(),
        routing_pb2.GatewayReport(attach=routing_pb2.AttachGateway()),
        routing_pb2.GatewayReport(arrival=routing_pb2.Arrival(id=1, waited_s=float("nan"))),
        routing_pb2.GatewayReport(arrival=routing_pb2.Arrival(id=1, waited_s=-1.0)),
    ],
)
def test_nonsense_of_a_gateway_ends_its_line_and_nothing_else(report: routing_pb2.GatewayReport) -> None:
    async def check() -> None:
        from chiron_engine import __version__

        async with running_fleet(config()) as fleet:
            async with grpc.aio.insecure_channel(fleet.launcher.address) as channel:
                attach = routing_pb2.AttachGateway(version=__version__)
                first = routing_pb2.GatewayReports(reports=[routing_pb2.GatewayReport(attach=attach)])
                call = routing_pb2_grpc.RoutingStub(channel).Attach()
                await call.write(first)
                orders = await call.read()
                assert orders.orders[0].HasField("welcome")
                await call.write(routing_pb2.GatewayReports(reports=[report]))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while await call.read() is not grpc.aio.EOF:
                        pass
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert await fleet.generate([1, 2], 3) == expected([1, 2], 3)

    asyncio.run(check())


def test_while_the_coordinator_is_away_streams_go_on_and_new_ones_are_refused() -> None:
    """The line breaks: the coordinator drops its requests, and takes them anew with their tokens."""

    async def check() -> None:
        async with (
            running_fleet(config()) as fleet,
            apart_gateway(fleet.launcher.address) as (client, router),
        ):
            prompts = [[index + 1] * 20 for index in range(8)]
            tasks = [asyncio.create_task(generate(client, prompt, 200)) for prompt in prompts]
            await asyncio.sleep(0.3)
            await router.line.close()
            assert fleet.coordinator.fleet is not None
            await fleet.wait_for(lambda: not fleet.coordinator.fleet.has_work)  # type: ignore[union-attr]
            assert not any(task.done() for task in tasks)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(client, [5], 2)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert error_code(caught.value) == "coordinator_away"
            router.line.start()
            assert await asyncio.gather(*tasks) == [expected(prompt, 200) for prompt in prompts]
            assert await generate(client, [5], 2) == expected([5], 2)

    asyncio.run(check())


def test_what_comes_while_the_line_is_taken_up_again_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told of twice it would run twice, and yield each token twice."""
    close, during = EngineLink.close, []

    async def check() -> None:
        async with (
            running_fleet(config()) as fleet,
            apart_gateway(fleet.launcher.address) as (client, router),
        ):

            async def close_slowly(link: EngineLink) -> None:
                during.append(asyncio.create_task(generate(client, [5, 6], 40)))
                await asyncio.sleep(0.3)
                await close(link)

            await router.line.close()
            monkeypatch.setattr(EngineLink, "close", close_slowly)
            router.line.start()
            await fleet.wait_for(lambda: during)
            monkeypatch.setattr(EngineLink, "close", close)
            assert await during[0] == expected([5, 6], 40)
            await fleet.wait_for(lambda: not fleet.coordinator.fleet.has_work)  # type: ignore[union-attr]

    asyncio.run(check())


def test_strict_admission_does_not_cut_what_runs_when_its_engine_is_lost() -> None:
    async def check() -> None:
        async with (
            running_fleet(config(admission="strict")) as fleet,
            apart_gateway(fleet.launcher.address) as (client, _),
        ):
            prompts = [[index + 1] * 20 for index in range(4)]
            tasks = [
                asyncio.create_task(generate(client, prompt, 200, ttft_slo_ms=500.0)) for prompt in prompts
            ]
            await asyncio.sleep(0.5)
            fleet.launcher.delay_s = 1.5  # longer than anyone new would be let wait
            fleet.launcher.tasks[0].cancel()
            assert await asyncio.gather(*tasks) == [expected(prompt, 200) for prompt in prompts]

    asyncio.run(check())


def test_a_request_placed_where_this_gateway_cannot_reach_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet_router, "UNREACHABLE_S", 0.3)

    async def check() -> None:
        async with running_fleet(config()) as fleet:
            listed = fleet.coordinator.roster.engines[0].register
            assert listed is not None
            listed.address = "127.0.0.1:9"  # as where another network hides it
            router = FleetRouter(fleet.launcher.address, NAME)
            router.start()
            await fleet.wait_for(lambda: router.line.is_up)
            stream = TokenStream([1, 2], types_pb2.SamplingParams(), types_pb2.Slo(), "r", router)
            router.submit(stream, time.monotonic())
            await fleet.wait_for(lambda: stream.has_ended, 5.0)
            assert stream.failure is not None
            assert (stream.failure.code, stream.failure.error_code) == (
                grpc.StatusCode.UNAVAILABLE,
                "engine_unreachable",
            )
            assert "engine 0 at 127.0.0.1:9, which the coordinator reaches, cannot be" in caplog.text
            await fleet.wait_for(lambda: not fleet.coordinator.fleet.has_work)  # type: ignore[union-attr]
            await router.close()

    asyncio.run(check())


@pytest.mark.parametrize("lost_after_s", [0.0, 1.0])
def test_without_a_coordinator_for_long_what_does_not_run_fails(
    lost_after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is lost only then; what runs goes on until it is."""
    monkeypatch.setattr(fleet_router, "AWAY_S", 0.5)

    async def check() -> None:
        async with (
            running_fleet(config()) as fleet,
            apart_gateway(fleet.launcher.address) as (client, router),
        ):
            tasks = [asyncio.create_task(generate(client, [index + 1], 1000)) for index in range(4)]
            await asyncio.sleep(0.3)
            await router.line.close()
            await asyncio.sleep(lost_after_s)
            assert not any(task.done() for task in tasks)
            fleet.launcher.tasks[0].cancel()
            async with asyncio.timeout(5.0):
                results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {error_code(result) for result in results} == {"coordinator_away"}  # type: ignore[arg-type]
            router.line.start()
            await fleet.wait_for(lambda: router.num_ready)
            assert await generate(client, [5], 2) == expected([5], 2)

    asyncio.run(check())


def test_a_gateway_that_is_not_drained_in_time_tells_its_clients() -> None:
    async def check() -> None:
        async with running_fleet(config()) as fleet:
            async with apart_gateway(fleet.launcher.address) as (client, _):
                task = asyncio.create_task(generate(client, [1, 2, 3], 2000))
                await asyncio.sleep(0.3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await task
            assert error_code(caught.value) == "draining"

    asyncio.run(check())


def test_a_coordinator_that_drains_waits_for_other_gateways_and_takes_nothing_new() -> None:
    """Its engines end with it."""

    async def check() -> None:
        async with (
            running_fleet(config()) as fleet,
            apart_gateway(fleet.launcher.address) as (client, _),
        ):
            task = asyncio.create_task(generate(client, [1, 2, 3], 150))
            await fleet.wait_for(lambda: fleet.coordinator.fleet.has_work)  # type: ignore[union-attr]
            draining = asyncio.create_task(fleet.coordinator.drain_gateways())
            await asyncio.sleep(0.2)
            assert not draining.done()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(client, [5], 2)
            assert error_code(caught.value) == "draining"
            assert await task == expected([1, 2, 3], 150)
            async with asyncio.timeout(2.0):
                await draining

    asyncio.run(check())


def test_a_gateway_may_come_before_the_first_engine() -> None:
    async def check() -> None:
        async with running_fleet(config(), launcher=InProcessLauncher(delay_s=1.0), wait=False) as fleet:
            listen = GatewayConfig(grpc_port=0)
            server, port = open_server(listen)
            router = FleetRouter(fleet.launcher.address, NAME)
            gateway = Gateway(NoTokenizer(), NAME, router, 1024)
            shutdown = Shutdown(1.0)
            task = asyncio.create_task(serve_gateway(listen, gateway, server, shutdown=shutdown))
            async with InferenceClient(f"127.0.0.1:{port}") as client:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await client.generate_all(
                        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1]))
                    )
                assert error_code(caught.value) == "model_loading"
                await client.wait_serving(LONG_S)
                assert await generate(client, [1, 2], 3) == expected([1, 2], 3)
            shutdown.request()
            shutdown.request()
            await task

    asyncio.run(check())

"""A coordinator, a gateway and engines without a model in this process, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chiron_engine.cluster.coordinator import Coordinator
from chiron_engine.cluster.coordinator_service import CoordinatorService
from chiron_engine.cluster.engine_records import EngineRecord
from chiron_engine.cluster.engine_report import EngineReady
from chiron_engine.cluster.engines import LaunchError, RunningEngine
from chiron_engine.cluster.event_log import EventLog
from chiron_engine.cluster.routing_service import RoutingService
from chiron_engine.commands.fleet_batch import batch_service
from chiron_engine.config import GatewayConfig
from chiron_engine.core.clocks import MonotonicClock
from chiron_engine.core.engine_core import EngineCore
from chiron_engine.core.executor import ExecutorShape
from chiron_engine.core.real_time_executor import RealTimeExecutor
from chiron_engine.core.simulated_tokens import SimulatedTokens
from chiron_engine.gateway.no_tokenizer import NoTokenizer
from chiron_engine.gateway.server import Gateway, open_server, serve_gateway
from chiron_engine.policy.fleet.config import FleetConfig
from chiron_engine.policy.iteration.autoscaler_inputs import EngineCapacity, ItlTargets
from chiron_engine.policy.iteration.local_autoscaler import make_local_autoscaler
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.client import BatchClient, InferenceClient, sampling
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import coordinator_pb2_grpc, inference_pb2, routing_pb2_grpc, types_pb2
from chiron_engine.serving.engine_process import LoadedEngine, run_engine
from chiron_engine.serving.engine_service import EngineDescription
from chiron_engine.serving.fleet_member import Join

NAME = "tiny"
VOCABULARY, END = 1000, 999
LONG_S = 20.0
COSTS = StepCosts(5e-3, 1e-5, 1e-8, 2e-6)
SHAPE = ExecutorShape(
    block_size=16,
    num_device_blocks=256,
    num_host_blocks=256,
    max_slots=16,
    max_step_tokens=256,
    max_model_len=2048,
    vocab_size=VOCABULARY,
)


def simulated_core(shape: ExecutorShape = SHAPE, costs: StepCosts = COSTS) -> EngineCore:
    tokens = SimulatedTokens(VOCABULARY, END, shape.max_slots)
    capacity = EngineCapacity(
        shape.max_slots, shape.max_step_tokens, shape.block_size, shape.num_device_blocks * shape.block_size
    )
    autoscaler = make_local_autoscaler("adaptive", capacity, ItlTargets(0.2, 2.0), costs)
    executor = RealTimeExecutor(shape, costs, MonotonicClock(), tokens)
    return EngineCore(executor, local_autoscaler=autoscaler)


@dataclass(slots=True)
class InProcessLauncher:
    """Engines as tasks. `fail`: causes of the next launches' failures. `kill` ends one as SIGKILL does:
    without a word. exit_code: of all."""

    address: str = ""
    shape: ExecutorShape = SHAPE
    delay_s: float = 0.0
    exit_code: int = 0
    fail: list[str] = field(default_factory=list)
    launched: list[int] = field(default_factory=list)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    shutdowns: dict[int, Shutdown] = field(default_factory=dict)

    @property
    def survivors(self) -> Sequence[EngineRecord]:
        return ()

    def adopt(self, instance_id: int, survivor: EngineRecord) -> asyncio.Future[int | None]:
        raise LaunchError(f"there is no engine {survivor.name}", 1)

    def joined(self, instance_id: int, boot_id: str, load_s: float) -> None:
        """Tasks end with their process."""

    async def launch(self, instance_id: int) -> RunningEngine:
        self.launched.append(instance_id)
        await asyncio.sleep(self.delay_s)
        if self.fail:
            raise LaunchError(self.fail.pop(0), 3)
        shutdown = self.shutdowns[instance_id] = Shutdown(5.0)
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            run_engine(
                lambda report: LoadedEngine(
                    simulated_core(self.shape), EngineDescription(NAME, "NoModel", "float32", (END,)), COSTS
                ),
                shutdown=shutdown,
                join=Join(self.address, instance_id),
                on_ready=ready.set_result,
            )
        )
        self.tasks[instance_id] = task
        task.add_done_callback(lambda task: exited.done() or exited.set_result(self.exit_code))
        port = await ready
        return RunningEngine(instance_id, EngineReady(f"127.0.0.1:{port}", 0, ""), exited)

    async def stop(self, instance_id: int, grace_s: float) -> None:
        shutdown = self.shutdowns.get(instance_id)
        if shutdown is None:
            return
        shutdown.request()
        with contextlib.suppress(asyncio.CancelledError):
            await self.tasks[instance_id]

    async def stop_all(self, grace_s: float) -> None:
        for shutdown in self.shutdowns.values():
            shutdown.request()
            shutdown.request()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@dataclass(slots=True)
class Fleet:
    coordinator: Coordinator
    launcher: InProcessLauncher
    client: InferenceClient
    batches: BatchClient

    async def generate(
        self, prompt: Sequence[int], max_tokens: int, *, batch: bool = False, seed: int = 1, **slo: float
    ) -> list[int]:
        slo_class = types_pb2.SLO_CLASS_BATCH if batch else types_pb2.SLO_CLASS_INTERACTIVE
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=sampling(temperature=0.0, max_tokens=max_tokens, seed=seed, ignore_eos=True),
            slo=types_pb2.Slo(slo_class=slo_class, **slo),
        )
        return [token async for chunk in self.client.generate(request) for token in chunk.token_ids]

    async def wait_for(self, condition: object, timeout_s: float = LONG_S) -> None:
        assert callable(condition)
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)


def expected(prompt: Sequence[int], count: int, seed: int = 1) -> list[int]:
    """The tokens that an undisturbed run yields."""
    return SimulatedTokens(VOCABULARY, END, 1).output(prompt, seed, count)


@asynccontextmanager
async def running_fleet(
    config: FleetConfig,
    *,
    policy: str = "chiron",
    initial: int = 1,
    launcher: InProcessLauncher | None = None,
    event_log: EventLog | None = None,
    wait: bool = True,
    state_dir: Path | None = None,
) -> AsyncIterator[Fleet]:
    """state_dir: where batches are kept; without one there is no Batch service."""
    listen = GatewayConfig(grpc_port=0)
    server, port = open_server(listen)
    launcher = launcher or InProcessLauncher()
    launcher.address = f"127.0.0.1:{port}"
    coordinator = Coordinator(policy, config, launcher, initial_engines=initial, event_log=event_log)
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(CoordinatorService(coordinator), server)
    routing_pb2_grpc.add_RoutingServicer_to_server(RoutingService(coordinator), server)
    gateway = Gateway(NoTokenizer(), NAME, coordinator, 1024)
    shutdown = Shutdown(1.0)
    async with AsyncExitStack() as resources:
        if state_dir is not None:
            batch = batch_service(state_dir, server, coordinator, gateway, NoTokenizer(), shutdown)
            await resources.enter_async_context(batch)
        task = asyncio.create_task(serve_gateway(listen, gateway, server, shutdown=shutdown))
        client = await resources.enter_async_context(InferenceClient(launcher.address))
        batches = await resources.enter_async_context(BatchClient(launcher.address))
        try:
            if wait:
                await client.wait_serving(LONG_S)
            yield Fleet(coordinator, launcher, client, batches)
        finally:
            shutdown.request()
            shutdown.request()
            async with asyncio.timeout(LONG_S):
                await task

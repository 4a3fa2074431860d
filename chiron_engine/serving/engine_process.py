"""The engine process: loads in a thread while the server answers, serves, drains, exits."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from chiron_engine.core.engine_core import EngineCore
from chiron_engine.policy.iteration.step_costs import StepCosts
from chiron_engine.rpc.client import ENGINE_SERVICE
from chiron_engine.rpc.options import MAX_MESSAGE_BYTES
from chiron_engine.rpc.port import bind
from chiron_engine.rpc.server import Health, create_server, enable_reflection
from chiron_engine.rpc.shutdown import Shutdown
from chiron_engine.rpc.v1 import engine_pb2_grpc

from .engine_loop import EngineLoop, LoopState
from .engine_service import CompileGuide, EngineDescription, EngineService
from .fleet_member import FleetMember, Join

log = logging.getLogger(__name__)

FLUSH_S = 1.0
STOP_GRACE_S = 2.0
LOOP_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """costs: what steps cost as far as is known, for a coordinator; needed only in a fleet.
    compile_guide: as in LoadedModel."""

    core: EngineCore
    description: EngineDescription
    costs: StepCosts | None = None
    compile_guide: CompileGuide | None = None


class EngineFailed(RuntimeError):
    """The engine loop ended by itself: a step raised. The log has the cause."""


class Companion(Protocol):
    """Another face on the engine's own server, reached by loopback: in practice a gateway."""

    @property
    def services(self) -> Sequence[str]: ...
    def add_to(self, server: grpc.aio.Server) -> None: ...
    def start(self, health: Health, services: Sequence[str]) -> None: ...
    async def wait_ready(self) -> None: ...
    async def drain(self) -> None: ...
    async def close(self) -> None: ...


ReportPhase = Callable[[str], None]
Load = Callable[[ReportPhase], LoadedEngine]


async def run_engine(
    load: Load,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    seed: int = 0,
    reflection: bool = False,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    drain_timeout_s: float = 30.0,
    shutdown: Shutdown | None = None,
    companion: Callable[[str], Companion] | None = None,
    join: Join | None = None,
    on_listening: Callable[[int], None] = lambda port: None,
    on_ready: Callable[[int], None] = lambda port: None,
    on_joined: Callable[[], None] = lambda: None,
) -> None:
    """Run one engine until it is asked to stop; returns when it is drained and closed.

    load: builds the engine, in a thread of its own; calls its argument with a short text as each
        phase begins ("weights", "warm-up"), which health, status and callers to Connect then show.
    port: 0 lets the system choose. seed: where the seeds of requests without one start.
    shutdown: without one, SIGTERM and SIGINT are handled here. `drain_timeout_s` applies to it only.
    companion: given the engine's address (`host:port`), makes a gateway for the same server, as
        `lambda address: Gateway(text, name, EnginePool([address]))`.
    join: the coordinator to join once loaded, which may then end this engine; batch requests are given
        back to it. `load` must tell step costs then.
    on_listening, on_ready: called once each, with the port; ready is when a request would be served.
    on_joined: called whenever a coordinator has taken the engine in.

    Raises PortInUse or BindError at once, whatever `load` raises, EngineRefused where the coordinator
    does not take this engine, and EngineFailed when a step raised (live requests end with an error,
    health says NOT_SERVING, nothing is retried).
    """
    if shutdown is None:
        shutdown = Shutdown(drain_timeout_s)
        shutdown.install()
    server = create_server(max_message_bytes)
    process = _EngineProcess(server, shutdown, seed, join, on_joined)
    bound = bind(server, host, port)
    try:
        await process.listen(_loopback(host, bound), companion, reflection)
        on_listening(bound)
        if await process.load(load, bound):
            on_ready(bound)
            await process.serve_and_drain()
    finally:
        await process.close()
        shutdown.finished()


class _EngineProcess:
    """The stages of `run_engine`, in the order they are called."""

    def __init__(
        self,
        server: grpc.aio.Server,
        shutdown: Shutdown,
        seed: int,
        join: Join | None,
        on_joined: Callable[[], None],
    ) -> None:
        self._server = server
        self._shutdown = shutdown
        self._seed = seed
        self._service = EngineService()
        self._health = Health(server)
        self._companion: Companion | None = None
        self._loop: EngineLoop | None = None
        self._join = join
        self._on_joined = on_joined
        self._member: FleetMember | None = None
        self._is_ending = False
        self._fleet_error: Exception | None = None

    async def listen(
        self, address: str, companion: Callable[[str], Companion] | None, reflection: bool
    ) -> None:
        """Answer calls: NOT_SERVING, and UNAVAILABLE with the load phase."""
        engine_pb2_grpc.add_EngineServicer_to_server(self._service, self._server)
        if companion is not None:
            self._companion = companion(address)
            self._companion.add_to(self._server)
        services = [ENGINE_SERVICE, *(self._companion.services if self._companion else ())]
        await self._health.set_serving(False, ("", *services))
        if reflection:
            enable_reflection(self._server, services)
        await self._server.start()

    async def load(self, load: Load, port: int) -> bool:
        """Run `load` in a thread. False if asked to stop meanwhile; the thread dies with the process."""
        loading: asyncio.Future[Any] = _in_daemon_thread(lambda: load(self._report_phase))
        stopping: asyncio.Future[Any] = asyncio.create_task(self._shutdown.drain.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            log.info("asked to stop while loading")
            return False
        loaded = loading.result()
        self._loop = EngineLoop(loaded.core)
        self._service.attach(self._loop, loaded.description, self._seed, loaded.compile_guide)
        if self._join is not None:
            self._member = self._make_member(self._join, loaded, port)
        self._loop.start()
        await self._health.set_serving(True, [ENGINE_SERVICE])
        if self._member is not None:
            self._member.start()
        if self._companion is None:
            await self._health.set_serving(True, [""])
            return True
        self._companion.start(self._health, ("", *self._companion.services))
        await self._companion.wait_ready()
        return True

    async def serve_and_drain(self) -> None:
        assert self._loop is not None
        ended: asyncio.Future[Any] = asyncio.wrap_future(self._loop.ended)
        stopping: asyncio.Future[Any] = asyncio.create_task(self._shutdown.drain.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await self._health.set_serving(False, [ENGINE_SERVICE, "", *self._companion_services()])
        if self._loop.state is LoopState.FAILED:
            await self._service.flush(FLUSH_S)
            raise EngineFailed("a step of the engine failed; the log has the cause")
        await self._drain(self._loop)
        if self._fleet_error is not None:
            raise self._fleet_error

    async def close(self) -> None:
        """End the streams with a clean status, then the server, then the loop and its executor."""
        await self._service.close(FLUSH_S)
        if self._companion is not None:
            await self._companion.close()
        if self._member is not None:
            await asyncio.to_thread(self._member.close)
        await self._server.stop(STOP_GRACE_S)
        if self._loop is not None:
            self._loop.stop()
            await asyncio.wait([asyncio.wrap_future(self._loop.ended)], timeout=LOOP_STOP_S)

    async def _drain(self, loop: EngineLoop) -> None:
        log.info("draining: no new requests; %g s for those running", self._shutdown.drain_timeout_s)
        if self._member is not None:
            self._member.leave()
        loop.drain()
        self._service.announce_draining()
        waits: list[asyncio.Future[Any]] = [asyncio.wrap_future(loop.drained)]
        if self._companion is not None:
            waits.append(asyncio.create_task(self._companion.drain()))
        if not await self._shutdown.wait_drained(*waits):
            log.warning("not drained in time; the requests left are aborted")
            loop.stop()
            await asyncio.wait([asyncio.wrap_future(loop.ended)], timeout=LOOP_STOP_S)

    def _make_member(self, join: Join, loaded: LoadedEngine, port: int) -> FleetMember:
        assert self._loop is not None
        if loaded.costs is None:
            raise ValueError("an engine in a fleet must know what its steps cost")
        model = loaded.description.model
        aio, boot_id = asyncio.get_running_loop(), self._service.boot_id
        return FleetMember(
            join,
            loaded.core,
            self._loop,
            boot_id,
            model,
            loaded.costs,
            port,
            joined=lambda: _call_soon(aio, self._on_joined),
            end=lambda error: _call_soon(aio, self._end, error),
        )

    def _end(self, error: Exception | None) -> None:
        """Drain, unless that is under way: a second request would stop it at once."""
        if not (self._is_ending or self._shutdown.drain.is_set()):
            self._is_ending = True
            self._fleet_error = error
            self._shutdown.request()

    def _companion_services(self) -> Sequence[str]:
        return self._companion.services if self._companion is not None else ()

    def _report_phase(self, phase: str) -> None:
        self._service.phase = phase


def _in_daemon_thread(work: Callable[[], LoadedEngine]) -> asyncio.Future[LoadedEngine]:
    """Not an executor's thread: those are waited for at exit, and a load may take minutes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[LoadedEngine] = loop.create_future()

    def settle(result: LoadedEngine | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the event loop has ended: nobody waits any more
            log.debug("loading ended after the process was asked to stop")

    threading.Thread(target=run, name="load", daemon=True).start()
    return future


def _call_soon(aio: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """From another thread."""
    try:
        aio.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the event loop has ended
        log.debug("the coordinator's order came after the end")


def _loopback(host: str, port: int) -> str:
    """Where this process reaches a server bound to `host`."""
    if host in ("0.0.0.0", ""):
        return f"127.0.0.1:{port}"
    if host == "::":
        return f"[::1]:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
